"""Housekeeping cleans up behind loaded runs, and touches nothing that is open or not ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import openai
import pytest
import sqlalchemy as sa

from include import ledger_tables as tables
from include import pipeline, run_mode
from include.artifacts import Artifacts
from include.audit import audit
from include.batch_api import BatchApi
from include.batch_view import BatchView
from include.errors import ConfigurationError
from include.housekeeping import Housekeeping, Keep
from include.ledger_records import Batch, BatchState, now
from include.provider import OPENAI
from include.request_queue import RequestQueue
from include.simulator.process import Simulator
from include.submission import Submission, SubmissionPolicy
from tests.faults.world import KEY, World, job

ROWS = 7  # two request files
DAY = timedelta(days=1)
LINE = (
    b'{"custom_id":"x","method":"POST","url":"/v1/chat/completions",'
    b'"body":{"model":"gpt-4o-mini","messages":[{"role":"user","content":"hi"}]}}\n'
)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Seven rows, and a simulator that answers at once."""
    with Simulator.start(tmp_path / "simulator", instant=True) as simulator:
        made = World(tmp_path, simulator)
        made.fill(ROWS)
        yield made
        made.close()


def keeper(
    world: World, *, apply: bool = True, later: timedelta = timedelta(0), **keep: Any
) -> Any:
    """The chores over a world, `later` than now."""
    return Housekeeping(
        world.ledger(),
        world.artifacts(),
        lambda _conn_id: world.api(),
        Keep(files_days=0.0, **keep),
        apply=apply,
        clock=lambda: now() + later,
    )


def client(world: World) -> openai.OpenAI:
    """Somebody else with the same key."""
    return openai.OpenAI(api_key=KEY, base_url=world.simulator.base_url)


def foreign_batch(world: World, **metadata: str) -> tuple[str, str]:
    """A batch of somebody else, and its input file."""
    sdk = client(world)
    file = sdk.files.create(file=("theirs.jsonl", LINE), purpose="batch")
    batch = sdk.batches.create(
        input_file_id=file.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata=metadata,
    )
    return batch.id, file.id


def stored(world: World) -> set[str]:
    """Every file at the provider."""
    return {one.file_id for one in world.api().files()}


def submitted(world: World) -> list[Batch]:
    """An open run with its batches at the API."""
    ledger = world.ledger()
    run = world._opened(ledger, run_mode.NORMAL)
    run = pipeline.extract(run, ledger, world.artifacts(), world.source)
    batches = pipeline.build(run, 1, ledger, world.artifacts(), world.target, most_shards=9)
    for batch in batches:
        world.submit(batch, ledger)
    return batches


def paths(world: World) -> list[str]:
    """Every artifact of the run."""
    run = world.ledger().run(world.run_ids[0])
    return sorted(world.artifacts().files(run.directory))


def findings(world: World) -> list[Any]:
    """What the audit of the last run finds."""
    return audit(world.run_ids[-1], world.ledger(), world.artifacts(), world.target(), world.api())


def test_a_dry_run_only_tells(world: World) -> None:
    """Without `apply` every chore counts what is due, and changes nothing."""
    world.run()
    before = stored(world), paths(world)

    dry = keeper(world, apply=False, later=20 * DAY)
    files, artifacts = dry.files(), dry.old_artifacts()

    assert files.counts == {"files": 4, "batches": 2}
    assert artifacts.counts["runs compressed"] == 1
    assert "dry run, nothing was changed" in files.text()
    assert (stored(world), paths(world)) == before


def test_files_of_a_loaded_run_are_deleted_and_no_others(world: World) -> None:
    """Input and output files go; files of others, and of an open run, stay."""
    world.run()
    ours = stored(world)
    theirs = {foreign_batch(world)[1], foreign_batch(world, submission_id="f" * 32)[1]}
    later = World(world.folder, world.simulator, day=1)
    later.fill(ROWS, text="another day")
    in_flight = {one.file_id for one in map(later.ledger().batch, _ids(submitted(later)))}

    done = keeper(world).files()

    assert done.counts == {"files": len(ours), "batches": 2}
    assert stored(world) & ours == set()
    assert theirs | in_flight <= stored(world)
    assert keeper(world).files().counts == {}
    assert findings(world) == []
    later.close()


def _ids(batches: list[Batch]) -> list[str]:
    return [one.submission_id for one in batches]


def test_a_file_that_somebody_else_has_deleted_is_fine(world: World) -> None:
    """What is gone needs no deleting."""
    world.run()
    client(world).files.delete(min(stored(world)))

    keeper(world).files()

    assert stored(world) == set()


def test_result_files_of_an_earlier_release_are_found(world: World) -> None:
    """Rows of before this release do not name them: the batch itself is asked."""
    world.run()
    with world.ledger().engine.begin() as connection:
        nothing = {"output_file_id": None, "error_file_id": None}
        connection.execute(sa.update(tables.batch).values(nothing))

    keeper(world).files()

    assert stored(world) == set()


def test_a_file_that_an_open_run_has_too_stays(world: World) -> None:
    """Some servers give the same bytes the same id: another day may still need it."""
    world.run()
    shared = world.ledger().batches(world.run_ids[0])[0].file_id
    later = World(world.folder, world.simulator, day=1)
    later.fill(ROWS, text="another day")
    waiting = submitted(later)[0].submission_id
    with world.ledger().engine.begin() as connection:
        known = tables.input_file.c.submission_id == waiting
        connection.execute(sa.update(tables.input_file).where(known).values(file_id=shared))

    keeper(world).files()

    assert shared in stored(world)
    later.close()


def test_a_file_is_looked_up_by_its_id(world: World) -> None:
    """By an index: it is asked of every file, however many were ever uploaded."""
    keeping = keeper(world)
    asked: list[tuple[str, Any]] = []

    def note(_conn: Any, _cursor: Any, statement: str, parameters: Any, *_rest: Any) -> None:
        asked.append((statement, parameters))

    sa.event.listen(keeping.ledger.engine, "before_cursor_execute", note)
    keeping._is_in_use("file-1")
    sa.event.remove(keeping.ledger.engine, "before_cursor_execute", note)

    ((statement, parameters),) = (one for one in asked if one[0].startswith("SELECT"))
    with keeping.ledger.engine.connect() as connection:
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
    (step,) = (one[3] for one in plan if "llm_batch_input_file" in one[3])
    assert "(file_id=?)" in step


def test_an_open_run_is_never_touched(world: World) -> None:
    """However old it is: files, batches, artifacts and history stay."""
    batches = submitted(world)
    before = stored(world), paths(world)
    late = keeper(world, later=1000 * DAY, orphan_days=2000.0)

    for chore in (late.orphans(), late.files(), late.old_artifacts(), late.old_history()):
        assert set(chore.counts) <= {"known"}

    # The output files of an instant simulator may have come meanwhile.
    assert before[0] <= stored(world)
    assert paths(world) == before[1]
    assert [one.state for one in map(world.ledger().batch, _ids(batches))] == ["SUBMITTED"] * 2


def test_batches_of_others_are_never_touched(tmp_path: Path) -> None:
    """No id, an id of another ledger: still at work afterwards."""
    with Simulator.start(tmp_path / "slow", seconds_in_progress=60) as simulator:
        world = World(tmp_path, simulator)
        world.fill(ROWS)
        submitted(world)
        theirs = [foreign_batch(world)[0], foreign_batch(world, submission_id="f" * 32)[0]]

        done = keeper(world).orphans()

        assert done.counts == {"not ours, left alone": 2, "known": 2}
        for one in theirs:
            assert world.api().retrieve(one).status in {"validating", "in_progress"}
        world.close()


def test_a_second_batch_of_a_submission_is_cancelled_and_recorded(tmp_path: Path) -> None:
    """One that appeared in the list after its run had looked for the last time."""
    with Simulator.start(tmp_path / "slow", seconds_in_progress=60) as simulator:
        world = World(tmp_path, simulator)
        world.fill(ROWS)
        first = submitted(world)[0]
        extra, _ = foreign_batch(world, submission_id=first.submission_id)

        keeper(world).orphans()

        assert world.api().retrieve(extra).status in {"cancelling", "cancelled"}
        (line,) = world.ledger().duplicates([first.submission_id])
        assert line["batch_id"] == extra
        kept = str(world.ledger().batch(first.submission_id).batch_id)
        assert world.api().retrieve(kept).status in {"validating", "in_progress"}
        world.close()


def used(world: World, conn_id: str) -> None:
    """Let the ledger say that the first of the batches went over this connection."""
    first = sa.select(sa.func.min(tables.batch.c.submission_id)).scalar_subquery()
    change = sa.update(tables.batch).where(tables.batch.c.submission_id == first)
    with world.ledger().engine.begin() as connection:
        connection.execute(change.values(conn_id=conn_id))


def beside(world: World, gone: Callable[[], BatchApi], **options: Any) -> Any:
    """The chores, with a second connection `gone`."""

    def api(conn_id: str) -> BatchApi:
        return gone() if conn_id == "gone" else world.api()

    return replace(keeper(world, **options), api=api)


def deleted() -> BatchApi:
    """A connection that was renamed or deleted."""
    raise ConfigurationError("no connection gone")


def test_a_connection_that_fails_keeps_no_other_back(world: World) -> None:
    """The files behind the others go, then the error is told; the quota tells it as a line."""
    world.run()
    used(world, "gone")

    with pytest.raises(ConfigurationError, match="no connection gone"):
        beside(world, deleted).files()

    assert len(stored(world)) == 2
    told = beside(world, deleted).quota()
    assert told.counts == {"files": 2}
    assert "gone: no connection gone" in told.lines


@pytest.mark.parametrize("is_deleted", [True, False])
def test_orphans_are_looked_for_behind_every_connection(world: World, *, is_deleted: bool) -> None:
    """A connection that fails, or whose server lists no batches, comes before the other one."""
    ids = left_behind(world)
    used(world, "gone")
    without_list = BatchApi(client(world), profile=replace(OPENAI, lists_batches=False))
    gone = deleted if is_deleted else lambda: without_list

    with suppress(ConfigurationError):
        assert beside(world, gone, later=timedelta(hours=2)).orphans().lines[0] == (
            "gone: the server lists no batches."
        )

    states = sorted(world.ledger().batch(one).state for one in ids)
    assert states == [BatchState.SUBMITTED, BatchState.SUBMITTING]


def left_behind(world: World) -> list[str]:
    """Both batches are made, and the process dies before it has recorded them."""

    class DiedError(Exception):
        pass

    def die(_batch: Batch, _made: BatchView) -> Batch:
        raise DiedError

    ledger = world.ledger()
    run = world._opened(ledger, run_mode.NORMAL)
    run = pipeline.extract(run, ledger, world.artifacts(), world.source)
    batches = pipeline.build(run, 1, ledger, world.artifacts(), world.target, most_shards=9)
    for batch in batches:
        submission = Submission(ledger, world.api(), world.artifacts(), SubmissionPolicy())
        submission._record = die  # type: ignore[method-assign, assignment]
        with pytest.raises(DiedError):
            submission.submit(batch.submission_id)
    return _ids(batches)


def test_a_batch_whose_maker_died_is_adopted(world: World) -> None:
    """The ledger names it afterwards, and the run goes on with it: nothing is paid twice."""
    ids = left_behind(world)

    done = keeper(world, later=timedelta(hours=2)).orphans()

    assert done.counts == {"adopted": 2}
    assert {world.ledger().batch(one).state for one in ids} == {BatchState.SUBMITTED}
    world.run()
    assert findings(world) == []
    assert len(world.simulator.batches()["batches"]) == 2


def test_an_orphan_that_another_run_has_overtaken_keeps_no_other_back(tmp_path: Path) -> None:
    """Nobody can ever collect it: it is cancelled, and the one after it is adopted."""
    with Simulator.start(tmp_path / "slow", seconds_in_progress=60) as simulator:
        world = World(tmp_path, simulator)
        world.fill(ROWS)
        late, other = (world.ledger().batch(one) for one in left_behind(world))
        ledger = world.ledger()
        assert ledger.release(late, "withdrawn: no batch was made")
        world.spec, world._is_open = job(sample=0.9), False
        done = world._opened(ledger, run_mode.NORMAL)
        ledger.finish_run(done.run_id, loaded=0, failed=0)

        chore = keeper(world, later=timedelta(hours=2)).orphans()

        assert chore.counts == {"of overtaken runs": 1, "adopted": 1}
        assert ledger.batch(other.submission_id).state == BatchState.SUBMITTED
        found = {
            one.submission_id: one.status for one in world.api().newest(now() - timedelta(hours=1))
        }
        assert found[late.submission_id] in {"cancelling", "cancelled"}
        world.close()


def test_a_submission_that_is_under_way_is_left_alone(world: World) -> None:
    """A moment after its intent, its maker may only be slow."""
    ids = left_behind(world)

    done = keeper(world).orphans()

    assert done.counts == {"being submitted, left alone": 2}
    assert {world.ledger().batch(one).state for one in ids} == {BatchState.SUBMITTING}


def test_old_artifacts_are_compressed_and_still_read(world: World) -> None:
    """JSONL becomes gzip; the audit, which reads all of it, holds as before."""
    world.run()
    before = paths(world)

    keeper(world, later=20 * DAY).old_artifacts()

    after = paths(world)
    assert [path.removesuffix(".gz") for path in after] == before
    assert sum(path.endswith(".jsonl.gz") for path in after) == 4
    assert not any(path.endswith(".jsonl") for path in after)
    assert findings(world) == []
    assert keeper(world, later=21 * DAY).old_artifacts().counts == {}


def test_very_old_artifacts_are_deleted(world: World) -> None:
    """Only those of loaded runs; the ledger still knows what they cost."""
    report = world.run()

    keeper(world, later=100 * DAY).old_artifacts()

    assert paths(world) == []
    run = world.ledger().run(world.run_ids[0])
    assert run.artifacts_deleted_at is not None
    assert run.cost_usd == report.cost_usd
    assert keeper(world, later=101 * DAY).old_artifacts().counts == {}


def test_an_old_run_keeps_its_money_and_is_not_paid_again(world: World) -> None:
    """Its history goes after its artifacts; another run of the day sends nothing."""
    report = world.run()
    late = keeper(world, later=800 * DAY)
    assert late.old_history().counts == {}  # its artifacts are still there
    late.files()
    late.old_artifacts()

    late.old_history()

    ledger = world.ledger()
    run = ledger.run(world.run_ids[0])
    assert ledger.history(run.run_id) == []
    assert run.cost_usd == report.cost_usd
    assert sum(one.cost_usd or 0 for one in ledger.batches(run.run_id)) == report.cost_usd
    assert late.old_history().counts == {}
    again = world.run()
    assert (again.reused, again.batches) == (ROWS, 0)


def test_zero_keeps_for_ever(world: World) -> None:
    """A retention of 0 days switches a chore off."""
    world.run()
    never = keeper(world, later=9999 * DAY, plain_days=0, artifacts_days=0, history_days=0)

    assert never.old_artifacts().counts == {}
    assert never.old_history().counts == {}


def test_the_quota_tells_what_is_stored_and_what_waits(tmp_path: Path) -> None:
    """Files at the provider, and the tokens of batches that are not done, by model."""
    with Simulator.start(tmp_path / "slow", seconds_in_progress=60) as simulator:
        world = World(tmp_path, simulator)
        world.fill(ROWS)
        tokens = sum(one.input_tokens for one in submitted(world))

        told = keeper(world).quota()

        assert told.counts == {"files": 2, "tokens in flight": tokens}
        assert any("gpt-4o-mini" in line for line in told.lines)
        world.close()


def test_a_compressed_artifact_reads_as_before(tmp_path: Path) -> None:
    """Whoever opens it does not notice; one that never was is still missing."""
    artifacts = Artifacts(tmp_path)
    with artifacts.create("a/x.jsonl") as stream:
        stream.write(b"1\n2\n")

    artifacts.compress("a/x.jsonl")

    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x.jsonl.gz"]
    assert artifacts.exists("a/x.jsonl")
    with artifacts.open("a/x.jsonl") as stream:
        assert stream.read() == b"1\n2\n"
    assert not artifacts.exists("a/y.jsonl")


def ended(world: World, **ages: timedelta) -> RequestQueue:
    """A queue with a request that waits, and one that was cancelled so long ago, for each name."""
    queue = RequestQueue(world.ledger().engine, jobs_root=None)
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hi"}]}
    for name, age in ages.items():
        for request_id in (name, f"{name}-waits"):
            queue.put(request_id, endpoint="/v1/chat/completions", body=body)
        queue.cancel(name)
        column = tables.queue.c
        with world.ledger().engine.begin() as connection:
            connection.execute(
                sa.update(tables.queue)
                .where(column.request_id == name)
                .values(ended_at=now() - age)
            )
    return queue


def test_finished_requests_are_deleted_when_they_are_old(world: World) -> None:
    """The dry run tells how many; what waits, and what is not old, stays."""
    queue = ended(world, old=40 * DAY, young=20 * DAY)

    told = keeper(world, apply=False, requests_days=30.0).old_requests()
    before = queue.statistics().total
    done = keeper(world, requests_days=30.0).old_requests()

    assert told.counts == done.counts == {"requests": 1}
    assert (before, queue.statistics().total) == (4, 3)
    assert queue.state("young") == "cancelled"


def test_finished_requests_stay_without_a_retention(world: World) -> None:
    """Answers belong to applications: nobody deletes them unasked."""
    queue = ended(world, old=4_000 * DAY)

    assert keeper(world).old_requests().counts == {}
    assert queue.state("old") == "cancelled"

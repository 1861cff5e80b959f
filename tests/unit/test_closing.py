"""A run that another one has replaced can be ended, and what it has paid for is kept."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import httpx2
import pytest
import sqlalchemy as sa

from include import actions, closing, dashboard, erasure, overview, pipeline, run_mode
from include.actions import ActionKind, Actor, Outcome
from include.closing import Places
from include.errors import BudgetExceededError, CanaryError, ConfigurationError
from include.housekeeping import Housekeeping, Keep
from include.ledger_database import reading
from include.ledger_records import Batch, BatchState, Partition, Run, RunState, now
from include.queue_drain import join
from include.simulator.process import Simulator
from include.span import Span
from include.submission import Submission
from tests.faults.queue_world import NAME, QueueWorld, queue_spec, request
from tests.faults.world import World, job
from tests.unit.conftest import ROWS

NIGHT = Actor("kim", "cli")


def opened(world: World) -> tuple[Run, list[Batch]]:
    """Build a run's first round."""
    ledger = world.ledger()
    run = world._opened(ledger, run_mode.NORMAL)
    run = pipeline.extract(run, ledger, world.artifacts(), world.source)
    built = pipeline.build(run, 1, ledger, world.artifacts(), world.target, most_shards=9)
    return run, built


def half_done(world: World) -> Run:
    """Collect the first of its two files, and leave it."""
    run, built = opened(world)
    world.shard(built[0], world.ledger())
    return run


def replaced(world: World) -> None:
    """Change the prompt, and open the run that it makes."""
    request = world.spec.request.model_copy(update={"prompt": "Name the note.\n---\n{{ body }}"})
    world.spec = world.spec.model_copy(update={"request": request})
    world._is_open = False
    world._opened(world.ledger(), run_mode.NORMAL)


def places(world: World) -> Places:
    return Places(
        world.ledger(),
        world.artifacts(),
        lambda _conn: Submission(world.ledger(), world.api(), world.artifacts(), world.policy),
    )


def nobody(_dag_id: str, _dag_run_id: str) -> bool:
    return False


def close(world: World, run: Run) -> actions.Action:
    plan = closing.plan_close(world.ledger(), run.run_id, is_alive=nobody)
    return closing.close(plan, places(world), NIGHT)


def test_a_replaced_run_is_closed_and_on_record(world: World) -> None:
    """Its state is final, its cost stays, and the page of who did what names the person."""
    run = half_done(world)
    replaced(world)
    plan = closing.plan_close(world.ledger(), run.run_id, is_alive=nobody)

    done = closing.close(plan, places(world), NIGHT)

    closed = world.ledger().run(run.run_id)
    first, second = world.ledger().batches(run.run_id)
    assert (plan.batches, plan.unsent) == (0, ROWS - first.requests)
    assert (closed.state, closed.cost_usd) == (RunState.CLOSED, first.cost_usd)
    assert second.state == BatchState.PREPARED
    assert (done.who, done.kind, done.outcome) == ("kim", ActionKind.CLOSE, Outcome.DONE)
    assert [one["run_id"] for one in overview.open_runs(world.ledger().engine)] == [
        world.run_ids[-1]
    ]


def test_what_its_batches_have_done_is_collected_first(world: World) -> None:
    """A batch that was left at the API is paid for: its cost and its answers are kept."""
    run, built = opened(world)
    for one in built:
        world.submit(one, world.ledger())
    replaced(world)

    close(world, run)

    batches = world.ledger().batches(run.run_id)
    assert {one.state for one in batches} == {BatchState.COLLECTED}
    assert sum(one.succeeded for one in batches) == ROWS
    costs = [one.cost_usd for one in batches if one.cost_usd is not None]
    assert world.ledger().run(run.run_id).cost_usd == sum(costs)


def test_a_submission_in_doubt_is_looked_for(world: World) -> None:
    """Without a batch at the API it was not sent; with one it is that batch's run."""
    run, built = opened(world)
    ledger = world.ledger()
    for one in built:
        ledger.claim(one.submission_id, owner="dead", lease=timedelta(0), enqueued_tokens=None)
    replaced(world)

    close(world, run)

    assert {one.state for one in ledger.batches(run.run_id)} == {BatchState.PREPARED}
    assert ledger.run(run.run_id).state == RunState.CLOSED


def test_a_batch_that_is_being_cancelled_comes_first(tmp_path: Path) -> None:
    """It is cancelled, the run stays open, and the message says to come back."""
    with Simulator.start(tmp_path / "slow", seconds_in_progress=60) as simulator:
        world = World(tmp_path, simulator, spec=job(limits={"requests_per_batch": 50}))
        world.fill(ROWS)
        run, (built,) = opened(world)
        world.submit(built, world.ledger())
        replaced(world)

        with pytest.raises(ConfigurationError, match="is not closed yet: 1 of its batches"):
            close(world, run)

        (batch,) = world.ledger().batches(run.run_id)
        assert world.api().retrieve(str(batch.batch_id)).status in {"cancelling", "cancelled"}
        assert world.ledger().run(run.run_id).state == RunState.OPEN
        world.close()


def test_the_newest_run_of_a_partition_is_not_closed(world: World) -> None:
    """Its rows have no other run: it is gone on with, or the job is changed first."""
    run = half_done(world)

    with pytest.raises(ConfigurationError, match="is the newest run of its partition"):
        close(world, run)

    assert world.ledger().run(run.run_id).state == RunState.OPEN


def test_a_run_with_a_file_of_its_own_is_not_closed(world: World) -> None:
    """Another file of the same interval does not take its place: both end with their batches."""
    run, _ = opened(world)
    partition = Partition(run.job, run.interval_start, run.interval_end)
    ours, _ = (
        world.ledger().open_run(
            partition, spec_digest=one, spec=run.spec, mode="file", dag_id="own", dag_run_id="own"
        )
        for one in ("a" * 64, "b" * 64)
    )

    with pytest.raises(ConfigurationError, match="has a request file of its own"):
        close(world, ours)


def test_a_run_that_somebody_works_on_is_not_closed(world: World) -> None:
    """The message names the Airflow run that has to end first."""
    run = half_done(world)
    replaced(world)

    with pytest.raises(ConfigurationError, match="Airflow run in-process of DAG note_labels"):
        closing.plan_close(world.ledger(), run.run_id, is_alive=lambda *_: True)


def test_a_closed_run_sends_and_loads_nothing(world: World) -> None:
    """Whoever clears one of its tasks is told; a second closing as well."""
    run, built = opened(world)
    replaced(world)
    close(world, run)
    ledger = world.ledger()

    with pytest.raises(ConfigurationError, match="is closed: nothing of it is sent or loaded"):
        world.submit(built[0], ledger)
    with pytest.raises(ConfigurationError, match="is closed: nothing of it is sent or loaded"):
        ledger.build_round(run.run_id, 2, [])
    with pytest.raises(ConfigurationError, match="is closed: nothing of it is loaded"):
        pipeline.load(ledger.run(run.run_id), ledger, world.artifacts(), world.target)
    with pytest.raises(ConfigurationError, match="is CLOSED: there is nothing left to close"):
        close(world, run)
    assert ledger.batch(built[0].submission_id).state == BatchState.PREPARED


def test_the_same_request_again_goes_on_with_what_was_paid(world: World) -> None:
    """A prompt that is changed back pays only for what was never answered."""
    before = world.spec
    run = half_done(world)
    replaced(world)
    world.run()
    close(world, run)
    world.spec = before
    first = world.ledger().batches(run.run_id)[0]

    report = world.run()

    assert (report.run_id, report.loaded) == (run.run_id, ROWS)
    ledger = world.ledger()
    assert ledger.batches(run.run_id)[0] == first
    assert ledger.run(run.run_id).state == RunState.DONE


def test_a_run_whose_rows_another_has_loaded_is_begun_anew(world: World) -> None:
    """Its files that were never sent may not be sent any more: opened again it could not end."""
    before = world.spec
    run = half_done(world)
    replaced(world)
    close(world, run)
    source = before.source.model_copy(update={"sql": f"{before.source.sql} DESC"})
    world.spec, world._is_open = before.model_copy(update={"source": source}), False
    world.run()
    world.spec = before

    report = world.run()

    assert (report.reused, report.run_id) == (ROWS, world.run_ids[-1])
    assert report.run_id != run.run_id


def test_erase_and_housekeeping_take_it_for_ended(world: World) -> None:
    """The row of a closed run can be erased; artifacts that are old are deleted."""
    run = half_done(world)
    replaced(world)
    world.run()
    close(world, run)
    ledger, artifacts = world.ledger(), world.artifacts()
    clock = lambda: now() + timedelta(days=100)  # noqa: E731
    keeping = Housekeeping(ledger, artifacts, lambda _: world.api(), Keep(), True, clock)

    found = erasure.traces("note_labels", ["n0003"], ledger, artifacts)
    files, old = keeping.files(), keeping.old_artifacts()

    assert run.run_id in {one.run.run_id for one in found}
    assert files.counts["batches"] == 3
    assert old.counts["runs deleted"] == 2
    assert ledger.run(run.run_id).artifacts_deleted_at is not None


def test_a_run_without_its_artifacts_is_begun_anew(world: World) -> None:
    """There is nothing left to go on with: the next generation sends the rows again."""
    before = world.spec
    run = half_done(world)
    replaced(world)
    close(world, run)
    world.ledger().count_run(run.run_id, artifacts_deleted_at=now())
    world.spec, world._is_open = before, False

    again = world._opened(world.ledger(), run_mode.NORMAL)

    assert (again.generation, again.state) == (run.generation + 1, RunState.OPEN)


def test_a_closed_run_is_no_base_for_a_redrive(world: World) -> None:
    """Its rows have not failed: they would be sent beside what it has paid for."""
    before = world.spec
    run = half_done(world)
    replaced(world)
    close(world, run)
    world.spec, world._is_open = before, False

    with pytest.raises(ConfigurationError, match="is not finished"):
        world._opened(world.ledger(), run_mode.REDRIVE)


def test_pages_count_its_cost_and_nothing_to_send(world: World) -> None:
    """Its day has cost what it paid for; its unsent file waits for nobody."""
    run = half_done(world)
    replaced(world)
    before = _waiting(world)

    close(world, run)

    span = Span(run.interval_start.date(), run.interval_start.date())
    with reading(world.ledger().engine) as connection:
        (day,), _ = dashboard.days(connection, [run.job], span)
    assert before == 1
    assert _waiting(world) == 0
    assert day.cost_usd == world.ledger().batches(run.run_id)[0].cost_usd


def _waiting(world: World) -> int:
    with reading(world.ledger().engine) as connection:
        found = dashboard.load(connection, [world.spec.name])
    return sum(one.batches for one in found if one.state == BatchState.PREPARED)


def test_a_batch_that_is_listed_too_late_is_cancelled(tmp_path: Path) -> None:
    """One that a lost answer has made, and that only housekeeping finds: nobody collects it."""
    with Simulator.start(tmp_path / "slow", seconds_in_progress=60) as simulator:
        world = World(tmp_path, simulator)
        world.fill(ROWS)
        run, built = opened(world)
        api, first = world.api(), built[0]
        world.ledger().claim(
            first.submission_id, owner="dead", lease=timedelta(0), enqueued_tokens=None
        )
        replaced(world)
        close(world, run)
        with world.artifacts().local(first.request_file) as path:
            file_id = api.upload(path, "late.jsonl", keep_seconds=None)
        metadata = {"submission_id": first.submission_id}
        view = api.create(
            file_id=file_id, endpoint=first.endpoint, metadata=metadata, keep_seconds=None
        )

        chore = Housekeeping(world.ledger(), world.artifacts(), lambda _: api, apply=True).orphans()

        assert chore.counts == {"of closed runs": 1}
        assert api.retrieve(view.batch_id).status in {"cancelling", "cancelled"}
        assert world.ledger().run(run.run_id).state == RunState.CLOSED
        world.close()


@pytest.fixture
def queue(empty_database: sa.Engine, tmp_path: Path) -> Iterator[QueueWorld]:
    """An empty queue on a simulator of its own."""
    with Simulator.start(tmp_path / "simulator", instant=True) as simulator:
        url = empty_database.url.render_as_string(hide_password=False)
        made = QueueWorld(tmp_path, simulator, url=url)
        made.ledger()
        yield made
        made.close()


def states(world: QueueWorld) -> Counter[str]:
    return Counter(one["state"] for one in world.rows().values())


def test_requests_that_were_not_sent_wait_again(queue: QueueWorld) -> None:
    """Its canary has stopped the run: the canary's requests end, the others get another run."""
    queue.queue = queue_spec(canary={"requests": 4, "max_failure_rate": 0})
    queue.application().put_many(request(3 * number) for number in range(20))
    queue.simulator.add_faults({"fault": "line_error", "status": 400, "fraction": 0.5})
    (run,) = queue.drain()
    with pytest.raises(CanaryError, match=f"close {run.run_id}"):
        queue.process(run)
    assert states(queue) == {"processing": 20}

    done = close(queue, run)

    assert states(queue)["queued"] == 16
    assert states(queue)["completed"] + states(queue)["failed"] == 4
    assert str(done.detail).endswith("16 queued again")
    with pytest.raises(ConfigurationError, match="is closed; the next drain"):
        join(queue.ledger(), queue.queue, run.run_id, dag_id=NAME, dag_run_id="again")
    queue.simulator.clear_faults()
    queue.drain_and_process()
    assert states(queue)["queued"] == states(queue)["processing"] == 0
    lines = list(queue.simulator.bill_lines())
    assert {one["billed"] for one in lines} == {0, 1}
    costs = [one["cost_usd"] or Decimal(0) for one in queue.rows().values()]
    assert sum(costs) == sum(Decimal(one["cost_usd"]) for one in lines)


def test_a_request_that_has_cost_something_ends(queue: QueueWorld) -> None:
    """A try that came to nothing was billed: it fails with its cost, and is not sent again."""
    queue.simulator.add_faults({"fault": "cut_off", "fraction": 1})
    body = {"model": "gpt-5-mini", "input": "one two three", "max_output_tokens": 4_000}
    queue.application().put("a", endpoint="/v1/responses", body=body)
    queue.queue = queue_spec(retry={"rounds": 3})
    (run,) = queue.drain()
    ledger = queue.ledger()
    run = pipeline.extract(run, ledger, queue.artifacts(), lambda: ledger.engine)
    for number in (1, 2):
        assert queue.round(run, number, ledger)

    close(queue, run)

    found = queue.application().result("a")
    closed = ledger.run(run.run_id)
    assert (found.state, found.reason, found.rounds) == ("failed", "cut_off", 2)
    assert found.cost_usd == closed.cost_usd
    assert (closed.state, closed.failed) == (RunState.CLOSED, 1)


class WithoutUsage(httpx2.HTTPTransport):
    """A server that does not tell what its answers used; files keep their length."""

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        answer = super().handle_request(request)
        if not request.url.path.endswith("/content"):
            return answer
        content = answer.read()
        lines = [json.loads(line) for line in content.split(b"\n") if line]
        for line in lines:
            line["response"]["body"].pop("usage")
        silent = b"\n".join(json.dumps(line).encode() for line in lines)
        return httpx2.Response(200, content=silent.ljust(len(content), b"\n"))


def test_a_request_that_was_processed_is_not_sent_again(queue: QueueWorld) -> None:
    """The model has answered it, though the server does not tell what that used: not 0."""
    queue.transport = WithoutUsage()
    queue.simulator.add_faults({"fault": "cut_off", "fraction": 1})
    body = {"model": "gpt-5-mini", "input": "one two three", "max_output_tokens": 4_000}
    queue.application().put("a", endpoint="/v1/responses", body=body)
    queue.queue = queue_spec(retry={"rounds": 3})
    (run,) = queue.drain()
    ledger = queue.ledger()
    run = pipeline.extract(run, ledger, queue.artifacts(), lambda: ledger.engine)
    assert queue.round(run, 1, ledger)

    close(queue, run)

    found = queue.application().result("a")
    assert (found.state, found.reason, found.rounds) == ("failed", "cut_off", 1)
    assert found.cost_usd is None


def test_what_a_budget_has_left_out_waits_again(queue: QueueWorld) -> None:
    """It has cost nothing: the next drain sends it, when there is money again."""
    queue.simulator.add_faults({"fault": "line_error", "status": 500, "fraction": 1})
    queue.application().put_many([request(0)])
    (run,) = queue.drain()
    ledger = queue.ledger()
    run = pipeline.extract(run, ledger, queue.artifacts(), lambda: ledger.engine)
    assert queue.round(run, 1, ledger)
    poor = queue_spec(budget={"max_usd": "0.000001"})
    run = join(ledger, poor, run.run_id, dag_id=NAME, dag_run_id="again")
    assert not queue.round(run, 2, ledger)

    close(queue, run)

    assert states(queue) == {"queued": 1}


def test_a_run_that_sent_nothing_gives_all_of_it_back(queue: QueueWorld) -> None:
    """Refused by its budget before anything was built."""
    queue.queue = queue_spec(budget={"max_usd": "0.000001"})
    queue.application().put_many(request(3 * number) for number in range(3))
    (run,) = queue.drain()
    with pytest.raises(BudgetExceededError):
        queue.process(run)

    close(queue, run)

    assert states(queue) == {"queued": 3}
    assert {one["run_id"] for one in queue.rows().values()} == {None}

"""What somebody on call is told of a ledger, with runs that the product has really made."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
import sqlalchemy as sa

from include import ledger_tables as tables
from include import overview, participants, pipeline, run_mode
from include.audit_report import AuditReport, audit_report
from include.errors import ConfigurationError
from include.ledger import Ledger
from include.ledger_records import Partition, Run, now
from include.report import run_report
from include.simulator.process import Simulator
from tests.faults.world import World, job

ROWS = 7
NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)  # far from the day's ends


@pytest.fixture
def world(tmp_path: Path, simulator: Simulator) -> Iterator[World]:
    """Seven rows: two request files."""
    made = World(tmp_path, simulator)
    made.fill(ROWS)
    yield made
    made.close()


def submitted(world: World) -> Run:
    """A run of which both batches are at the API."""
    ledger = world.ledger()
    run = world._opened(ledger, run_mode.NORMAL)
    run = pipeline.extract(run, ledger, world.artifacts(), world.source)
    for batch in pipeline.build(run, 1, ledger, world.artifacts(), world.target, most_shards=9):
        world.submit(batch, ledger)
    return run


def audited(world: World) -> AuditReport:
    """The audit of all runs."""
    engine = world.ledger().engine
    return audit_report(
        overview.runs(engine),
        Ledger(engine),
        world.artifacts(),
        lambda _spec: world.target(),
        lambda _conn_id: world.api(),
    )


def broken(report: AuditReport) -> set[str]:
    """The invariants that do not hold."""
    return {one.invariant for one in report.promises if not one.holds}


def test_what_is_at_the_api_is_counted(world: World) -> None:
    """An open run shows its batches and requests; nothing needs a look yet."""
    run = submitted(world)
    engine = world.ledger().engine

    (status,) = overview.job_statuses(engine)

    assert (status.open_runs, status.in_flight, status.requests) == (1, 2, ROWS)
    assert status.oldest is not None
    assert [one["run_id"] for one in overview.open_runs(engine)] == [run.run_id]
    assert len(overview.batches(engine)) == 2
    assert overview.notices(engine) == []


def test_an_open_run_has_cost_what_is_collected(world: World) -> None:
    """Unknown at first, then the collected batch alone; unknown when a price is."""
    run = submitted(world)
    ledger = world.ledger()
    assert run_report(run, ledger).cost_usd is None
    first = ledger.batches(run.run_id)[0].submission_id

    def collected(cost: Decimal | None) -> Decimal | None:
        changed = sa.update(tables.batch).where(tables.batch.c.submission_id == first)
        with ledger.engine.begin() as connection:
            connection.execute(changed.values(state="COLLECTED", cost_usd=cost))
        return run_report(run, ledger).cost_usd

    assert collected(Decimal("0.25")) == Decimal("0.25")
    assert collected(None) is None


def test_a_batch_of_an_open_run_has_cost_something_today(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is collected counts on its day, as in `costs`, also while its run is not done."""
    monkeypatch.setattr(overview, "now", lambda: NOON)
    run = submitted(world)
    ledger = world.ledger()
    first, second = (one.submission_id for one in ledger.batches(run.run_id))

    def collected(which: str, at: datetime) -> Decimal | None:
        values = {"state": "COLLECTED", "cost_usd": Decimal("0.25"), "collected_at": at}
        changed = sa.update(tables.batch).where(tables.batch.c.submission_id == which)
        with ledger.engine.begin() as connection:
            connection.execute(changed.values(**values))
        return overview.job_statuses(ledger.engine)[0].today_usd

    assert collected(first, NOON) == Decimal("0.25")
    assert collected(second, NOON - timedelta(days=1)) == Decimal("0.25")


def test_what_a_done_run_cost_today(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Done runs are no longer open, and their cost is the ledger's, to the digit."""
    report = world.run()
    engine = world.ledger().engine
    with engine.begin() as connection:
        connection.execute(sa.update(tables.batch).values(collected_at=NOON))
    monkeypatch.setattr(overview, "now", lambda: NOON)

    (status,) = overview.job_statuses(engine)

    assert (status.open_runs, status.in_flight) == (0, 0)
    assert status.today_usd == report.cost_usd != Decimal(0)
    assert status.last_done == world.partition.start
    assert overview.batches(engine) == []
    assert len(overview.batches(engine, every=True)) == 2


def test_a_batch_without_progress_needs_a_look(world: World) -> None:
    """After hours without progress both batches are told: what happens, and how to give them up."""
    submitted(world)
    engine = world.ledger().engine
    with engine.begin() as connection:
        connection.execute(sa.update(tables.batch).values(api_status="in_progress"))

    found = overview.notices(engine, at=now() + timedelta(hours=7))

    assert len(found) == 2
    assert all("without progress for 7 h" in one.what for one in found)
    assert all("deadline" in one.then for one in found)
    for batch, notice in zip(overview.batches(engine), found, strict=True):
        assert f"cancel {batch.run_id} --batch {batch.batch_id}`" in notice.then


def test_a_submission_that_nobody_finished_needs_a_look(world: World) -> None:
    """A process that died between its intent and the answer, and was not tried again."""
    submitted(world)
    engine = world.ledger().engine
    with engine.begin() as connection:
        connection.execute(sa.update(tables.batch).values(state="SUBMITTING", batch_id=None))

    found = overview.notices(engine, at=now() + timedelta(hours=2))

    assert [one.then[:25] for one in found] == ["Clear its submit task in "] * 2


def test_a_run_that_nobody_works_on_needs_a_look(world: World) -> None:
    """Open, nothing at the API, quiet for hours: a task is red, or the DAG is paused."""
    ledger = world.ledger()
    run = world._opened(ledger, run_mode.NORMAL)

    assert overview.notices(ledger.engine) == []
    (found,) = overview.notices(ledger.engine, at=now() + timedelta(hours=3))
    assert run.run_id in found.about
    assert "Look for a red task" in found.then


def test_a_run_whose_airflow_run_has_failed_needs_a_look_at_once(world: World) -> None:
    """Until a task of it is cleared; what it has at the API is told."""
    run = submitted(world)
    ledger = world.ledger()
    participants.leave(ledger, run.job, "in-process")

    (found,) = overview.notices(ledger.engine)

    assert run.run_id in found.about
    assert found.what.endswith("no Airflow run goes on with it; 2 batches of it at the API")
    assert "clear that task" in found.then
    participants.go_on(ledger, run.run_id, run.job, "in-process")
    assert overview.notices(ledger.engine) == []


def test_a_run_that_a_later_one_has_overtaken_is_left(world: World) -> None:
    """The job was changed and the day run again: clearing the old run would pay for it too."""
    ledger = world.ledger()
    old = world._opened(ledger, run_mode.NORMAL)
    world.spec, world._is_open = job(sample=0.9), False

    new = world.run().run_id

    (found,) = overview.notices(ledger.engine, at=now() + timedelta(hours=3))
    assert old.run_id in found.about
    assert f"Run {new} has done this partition since" in found.then


def test_another_group_of_one_drain_has_not_overtaken_a_run(world: World) -> None:
    """Runs over the queue begin at one moment: their requests are not the same for it."""
    ledger = world.ledger()
    stuck = world._opened(ledger, run_mode.NORMAL)
    end = stuck.interval_end + timedelta(microseconds=1)
    other = ledger.open_run(
        Partition(stuck.job, stuck.interval_start, end),
        spec_digest="e" * 64, spec=stuck.spec, mode="normal", dag_id="q", dag_run_id="other",
    )  # fmt: skip
    ledger.finish_run(other.run_id, loaded=1, failed=0)

    (found,) = overview.notices(ledger.engine, at=now() + timedelta(hours=3))

    assert stuck.run_id in found.about
    assert other.run_id not in found.then


def test_the_oldest_of_very_many_batches_needs_a_look(world: World) -> None:
    """However many newer ones are at the API beside it."""
    run = submitted(world)
    engine = world.ledger().engine
    with engine.begin() as connection:
        row = dict(connection.execute(sa.select(tables.batch)).mappings().first() or {})
        later = {"first_intent_at": now(), "submitted_at": now(), "progress_at": now()}
        more = [
            {**row, **later, "submission_id": f"s{n}", "batch_id": f"b{n}", "shard": n + 10}
            for n in range(1_000)
        ]
        connection.execute(sa.insert(tables.batch), more)
        long_ago = now() - timedelta(hours=7)
        connection.execute(
            sa.update(tables.batch)
            .where(tables.batch.c.batch_id == row["batch_id"])
            .values(
                first_intent_at=long_ago,
                submitted_at=long_ago,
                progress_at=long_ago,
                api_status="in_progress",
            )
        )

    (found,) = overview.notices(engine)

    assert "without progress for 7 h" in found.what
    assert run.run_id in found.then


def test_too_many_failed_rows_need_a_look(world: World) -> None:
    """A run over its alert is told until a redrive has loaded its rows; the way out is named."""
    world.spec = job(alert={"failure_rate": 0.1, "min_failed": 2})
    world.simulator.add_faults({"fault": "line_error", "status": 400, "times": 1})
    failed = world.run().failed
    engine = world.ledger().engine

    (found,) = overview.notices(engine)

    assert failed == 5, "one of the two request files"
    assert f"{failed} failed rows beside {ROWS - failed} loaded" in found.what
    assert "redrive note_labels 2026-" in found.then
    assert overview.notices(engine, "another") == []
    assert overview.notices(engine, at=now() + timedelta(days=8)) == []
    world.run(mode=run_mode.REDRIVE)
    assert overview.notices(engine) == []


def test_few_failed_rows_need_no_look(world: World) -> None:
    """Within the job's alert, or without one, nobody is sent to look."""
    world.simulator.add_faults({"fault": "line_error", "status": 400, "times": 1})

    world.run()

    assert overview.notices(world.ledger().engine) == []


def test_a_run_is_found_by_the_beginning_of_its_id(world: World) -> None:
    """Four characters that only one run has; fewer, or none that fits, is an error."""
    run = submitted(world)
    engine = world.ledger().engine

    assert overview.find_run(engine, run.run_id[:6]).run_id == run.run_id
    for wrong in ("", run.run_id[:3], "zzzz", "%%%%"):
        with pytest.raises(ConfigurationError):
            overview.find_run(engine, wrong)


def test_the_audit_of_whole_runs_holds(world: World) -> None:
    """Every promise holds for a run that nobody has touched."""
    world.run()

    report = audited(world)

    assert report.runs == world.run_ids
    assert broken(report) == set()


def test_the_audit_names_what_is_broken(world: World) -> None:
    """A row taken from the target, a byte added to a request file: each breaks its promise."""
    world.run()
    with world.target().begin() as connection:
        connection.exec_driver_sql("DELETE FROM note_labels WHERE note_id = 'n0003'")
    first = world.ledger().batches(world.run_ids[0])[0]
    with (world.folder / "artifacts" / first.request_file).open("ab") as stream:
        stream.write(b"\n")

    report = audited(world)

    assert broken(report) == {"I1", "I6"}
    assert all(one.mend for one in report.promises)


def test_a_run_without_artifacts_is_not_called_broken(world: World) -> None:
    """What retention has deleted cannot be audited any more, and is told as that."""
    world.run()
    (world.folder / "artifacts").rename(world.folder / "elsewhere")

    report = audited(world)

    assert report.runs == []
    assert report.holds
    assert "is missing" in report.skipped[world.run_ids[0]]


def test_only_the_newest_run_of_a_partition_is_audited(world: World) -> None:
    """A later run changes the target; the earlier one is told as not looked at."""
    world.run()
    world.run(mode=run_mode.FORCE)

    report = audited(world)

    assert report.runs == [world.run_ids[1]]
    assert report.skipped == {world.run_ids[0]: "a later run of its partition is there"}

"""Cancel and redrive say their consequences first, do what they say, and are on record."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from itertools import count
from pathlib import Path

import pytest

from include import actions, ledger_queries, pipeline, run_mode
from include.actions import ActionKind, Actor, Outcome
from include.errors import ConfigurationError, TransientError
from include.job_spec import with_overrides
from include.ledger import Ledger
from include.ledger_records import Batch
from include.partition_state import failures_left
from include.simulator.process import Simulator
from tests.faults.world import World

ROWS = 4
DAYS = count()  # of worlds on one simulator
NIGHT = Actor("kim", "ui")
WORKING = {"validating", "in_progress"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    """A simulator whose batches stay in progress for a minute."""
    with Simulator.start(tmp_path_factory.mktemp("simulator"), seconds_in_progress=60) as simulator:
        yield simulator


@pytest.fixture
def world(service: Simulator, tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path, service, next(DAYS))
    world.fill(ROWS)
    yield world
    world.close()


def _at_the_api(world: World) -> tuple[Ledger, Batch]:
    """Submit the one batch of a new run."""
    ledger = world.ledger()
    run = world._opened(ledger, run_mode.NORMAL)
    run = pipeline.extract(run, ledger, world.artifacts(), world.source)
    (built,) = pipeline.build(run, 1, ledger, world.artifacts(), world.target, most_shards=9)
    world.submit(built, ledger)
    return ledger, ledger.batch(built.submission_id)


def _status(world: World, batch: Batch) -> str:
    return world.api().retrieve(str(batch.batch_id)).status


def test_a_plan_tells_rows_and_money_and_does_nothing(world: World) -> None:
    """What is answered is paid for and kept, what is open is saved."""
    ledger, batch = _at_the_api(world)
    ledger.polled(str(batch.batch_id), api_status="in_progress", done=2, failed=0)

    plan = actions.plan_cancel(ledger, batch.run_id, batch.submission_id)

    estimate = ledger.run(batch.run_id).estimate_usd
    assert estimate is not None
    assert (plan.requests, plan.answered, plan.open) == (ROWS, 2, ROWS - 2)
    assert plan.paid_usd == estimate / ROWS * 2
    assert plan.saved_usd == estimate / ROWS * (ROWS - 2)
    assert _status(world, batch) in WORKING
    assert actions.history(ledger, run_id=batch.run_id) == []


def test_a_cancelled_batch_is_cancelled_at_the_api_and_on_record(world: World) -> None:
    """The line says who, what and when, and the ledger shows the new status at once."""
    ledger, batch = _at_the_api(world)
    plan = actions.plan_cancel(ledger, batch.run_id, batch.submission_id)

    done = actions.cancel(plan, ledger, lambda _conn: world.api(), NIGHT)

    assert _status(world, batch) in {"cancelling", "cancelled"}
    assert ledger.batch(batch.submission_id).api_status in {"cancelling", "cancelled"}
    assert (done.who, done.via, done.kind) == ("kim", "ui", ActionKind.CANCEL_BATCH)
    assert (done.submission_id, done.outcome) == (batch.submission_id, Outcome.DONE)
    assert str(batch.batch_id) in str(done.detail)


def test_a_run_is_ended_before_its_batches_are_cancelled(world: World) -> None:
    """Otherwise a task could wake up and send what was cancelled in the next round."""
    ledger, batch = _at_the_api(world)
    seen: list[tuple[str, ...]] = []
    run = ledger.run(batch.run_id)

    done = actions.cancel(
        actions.plan_cancel(ledger, batch.run_id),
        ledger,
        lambda _conn: world.api(),
        NIGHT,
        end_run=lambda *one: seen.append((_status(world, batch), *one)),
    )

    assert [one[1:] for one in seen] == [(run.dag_id, run.dag_run_id)]
    assert seen[0][0] in WORKING
    assert _status(world, batch) in {"cancelling", "cancelled"}
    assert (done.kind, done.submission_id) == (ActionKind.CANCEL_RUN, None)


def test_a_batch_that_is_made_meanwhile_is_cancelled_with_its_run(world: World) -> None:
    """Between the question and the yes, a task of the run has submitted it."""
    ledger, run = world.ledger(), world._opened(world.ledger(), run_mode.NORMAL)
    run = pipeline.extract(run, ledger, world.artifacts(), world.source)
    (built,) = pipeline.build(run, 1, ledger, world.artifacts(), world.target, most_shards=9)
    plan = actions.plan_cancel(ledger, run.run_id)
    world.submit(built, ledger)

    actions.cancel(plan, ledger, lambda _conn: world.api(), NIGHT)

    batch = ledger.batch(built.submission_id)
    assert plan.batches == ()
    assert _status(world, batch) in {"cancelling", "cancelled"}


def test_an_airflow_run_that_joins_meanwhile_is_ended_with_the_others(world: World) -> None:
    """Between the question and the yes: it would begin the next round with what is cancelled."""
    ledger, batch = _at_the_api(world)
    plan = actions.plan_cancel(ledger, batch.run_id)
    with ledger.engine.begin() as connection:
        ledger_queries.take_part(connection, batch.run_id, plan.run.dag_id, "another")
    ended: list[str] = []

    def end_run(_dag_id: str, dag_run_id: str) -> None:
        ended.append(dag_run_id)

    actions.cancel(plan, ledger, lambda _conn: world.api(), NIGHT, end_run=end_run)

    assert ended == ["another", plan.run.dag_run_id]


def test_a_run_that_has_ended_meanwhile_keeps_no_other_back(world: World) -> None:
    """Of all open runs, one is done before it is looked at: the others can be cancelled."""
    ledger, batch = _at_the_api(world)
    world._is_open = False
    world.spec = with_overrides(world.spec, sample=0.9)
    done = world._opened(ledger, run_mode.NORMAL)
    ledger.finish_run(done.run_id, loaded=0, failed=0)

    plans = actions.plan_cancel_all(ledger, [done.run_id, batch.run_id])

    assert [one.run.run_id for one in plans] == [batch.run_id]


def test_an_action_that_fails_is_on_record_and_told(world: World) -> None:
    """The line says FAILED with the reason, and the error goes on to whoever asked."""
    ledger, batch = _at_the_api(world)

    def away(_conn: str) -> None:
        raise TransientError("the API is away")

    with pytest.raises(TransientError, match="the API is away"):
        actions.cancel(actions.plan_cancel(ledger, batch.run_id), ledger, away, NIGHT)  # type: ignore[arg-type]

    (line,) = actions.history(ledger, run_id=batch.run_id)
    assert (line.outcome, line.detail) == (Outcome.FAILED, "the API is away")
    assert line.ended_at is not None


def test_an_action_that_dies_on_its_way_is_on_record(world: World) -> None:
    """The line is there before anything is asked of the API, with nothing of the error's text."""
    ledger, batch = _at_the_api(world)

    def die(_plan: object) -> str:
        (line,) = actions.history(ledger, run_id=batch.run_id)
        assert line.outcome == Outcome.ASKED
        raise RuntimeError("secret row text")

    plan = actions.Redrive(ledger.run(batch.run_id), 1, None)
    with pytest.raises(RuntimeError):
        actions.redrive(plan, ledger, NIGHT, trigger=die)

    (line,) = actions.history(ledger, run_id=batch.run_id)
    assert (line.outcome, line.detail) == (Outcome.FAILED, "RuntimeError")


def test_only_a_batch_at_the_api_can_be_cancelled(world: World) -> None:
    """The message says where the batch is; a run that is done has nothing to cancel."""
    ledger, batch = _at_the_api(world)
    ledger.ended(batch, api_status="completed", done=ROWS, failed=0)

    with pytest.raises(ConfigurationError, match="is ENDED: only a batch"):
        actions.plan_cancel(ledger, batch.run_id, batch.submission_id)
    with pytest.raises(ConfigurationError, match="lists its batches"):
        actions.plan_cancel(ledger, batch.run_id, "f" * 32)
    ledger.finish_run(batch.run_id, loaded=ROWS, failed=0)
    with pytest.raises(ConfigurationError, match="nothing left to cancel"):
        actions.plan_cancel(ledger, batch.run_id)


def test_a_redrive_waits_for_the_run_and_for_failures(world: World) -> None:
    """An open run is named; without failures there is nothing to do."""
    ledger, batch = _at_the_api(world)

    with pytest.raises(ConfigurationError, match="is not finished"):
        actions.plan_redrive(ledger, batch.run_id)
    ledger.finish_run(batch.run_id, loaded=ROWS, failed=0)
    with pytest.raises(ConfigurationError, match="no row of the partition has failed"):
        actions.plan_redrive(ledger, batch.run_id)


def test_a_redrive_tells_its_rows_and_price_and_starts_one_run(world: World) -> None:
    """Each failed row costs what a row of the run cost."""
    ledger, batch = _at_the_api(world)
    ledger.finish_run(batch.run_id, loaded=2, failed=2)

    plan = actions.plan_redrive(ledger, batch.run_id)
    done = actions.redrive(plan, ledger, NIGHT, trigger=lambda one: f"manual__{one.rows}")

    assert plan.rows == 2
    assert plan.cost_usd == Decimal(2) * (ledger.run(batch.run_id).estimate_usd or 0) / ROWS
    assert (done.kind, done.detail) == (ActionKind.REDRIVE, "Airflow run manual__2")


class _Counts:
    def __init__(self, mode: str, reused: int, failed: int) -> None:
        self.mode, self.reused, self.failed = mode, reused, failed


@pytest.mark.parametrize(
    ("runs", "left"),
    [
        ([], 0),
        ([_Counts("normal", 0, 5)], 5),
        ([_Counts("normal", 0, 5), _Counts("normal", 100, 0)], 5),
        ([_Counts("normal", 0, 5), _Counts("normal", 95, 2)], 7),
        ([_Counts("normal", 0, 5), _Counts("redrive", 95, 1)], 1),
        ([_Counts("normal", 0, 5), _Counts("force", 0, 0)], 0),
    ],
)
def test_failures_of_a_partition_add_up(runs: list[_Counts], left: int) -> None:
    """A normal run keeps what failed before; a redrive, a forced or a fresh run says it anew."""
    assert failures_left(runs) == left

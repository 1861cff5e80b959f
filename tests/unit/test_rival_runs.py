"""Two open runs of a partition never pay for the same request, whatever made them two."""

from __future__ import annotations

from decimal import Decimal

import pytest

from include import closing, ledger_queries, participants, pipeline, run_mode
from include.actions import Actor
from include.errors import ConfigurationError, PartitionBusyError
from include.job_spec import JobSpec
from include.ledger_records import BatchState, Run
from tests.faults.audit import bill_of
from tests.faults.world import World, job
from tests.unit.conftest import ROWS

OTHER_SQL = {
    "conn_id": "source_db",
    "key": ["note_id"],
    "sql": "SELECT note_id, body FROM notes WHERE written_at >= :interval_start"
    " AND written_at < :interval_end ORDER BY note_id DESC",
}


def built(world: World, spec: JobSpec, mode: str = run_mode.NORMAL) -> Run:
    """A run of another spec or mode whose request files are written."""
    usual, world.spec = world.spec, spec
    ledger = world.ledger()
    run = world._opened(ledger, mode)
    run = pipeline.extract(run, ledger, world.artifacts(), world.source)
    pipeline.build(run, 1, ledger, world.artifacts(), world.target, most_shards=9)
    world.spec, world._is_open = usual, False
    return run


def attended(run: Run, world: World) -> Run:
    """Let another Airflow run work on it as well."""
    with world.ledger().engine.begin() as connection:
        ledger_queries.take_part(connection, run.run_id, world.spec.name, "another")
    return run


def sent(run: Run, world: World) -> Run:
    """Submit its batches."""
    for batch in world.ledger().batches(run.run_id, 1):
        world.submit(batch, world.ledger())
    return run


def states(run: Run, world: World) -> set[str]:
    """The states of its batches."""
    return {one.state for one in world.ledger().batches(run.run_id, 1)}


def finish(world: World, spec: JobSpec, mode: str) -> None:
    """Go on with that run to its end."""
    usual, world.spec, world._is_open = world.spec, spec, False
    world.run(mode=mode)
    world.spec = usual


def billed(world: World) -> int:
    return sum(bill_of(world, run_id)[0] for run_id in set(world.run_ids))


@pytest.mark.parametrize(
    ("spec", "mode"),
    [
        (job().model_copy(update={"sample": Decimal("0.5")}), run_mode.NORMAL),
        (job(source=OTHER_SQL), run_mode.NORMAL),
        (job(target={"conn_id": "results_db", "table": "others"}), run_mode.NORMAL),
        (job(), run_mode.REDRIVE),
        (job(), run_mode.FORCE),
    ],
    ids=["sample", "sql", "target", "redrive", "force"],
)
def test_a_run_waits_for_another_that_asks_the_same(world: World, spec: JobSpec, mode: str) -> None:
    """Nothing is sent meanwhile; when the other one is loaded, its rows are reused."""
    rival = attended(built(world, spec, mode), world)

    with pytest.raises(PartitionBusyError, match=f"waits for run {rival.run_id} .*asks the same"):
        world.run()
    assert billed(world) == 0

    finish(world, spec, mode)
    world.run()
    same_target = spec.target == world.spec.target
    assert billed(world) == ROWS if same_target else 2 * ROWS


def test_another_question_is_asked_at_once(world: World) -> None:
    """A changed prompt is another request: the run before it does not stand in the way."""
    request = job().request.model_dump() | {"prompt": "Name the note.\n---\n{{ body }}"}
    built(world, job(request=request), run_mode.NORMAL)

    assert world.run().loaded == ROWS


def test_force_waits_for_nobody(world: World) -> None:
    """It pays again, and was asked for."""
    built(world, job(), run_mode.NORMAL)

    assert world.run(mode=run_mode.FORCE).loaded == ROWS


def test_a_run_that_failed_before_it_sent_anything_is_no_rival(world: World) -> None:
    """Nobody works on it, and nothing of it is at the API."""
    built(world, job(source=OTHER_SQL), run_mode.NORMAL)
    participants.leave(world.ledger(), world.spec.name, "in-process")

    assert world.run().loaded == ROWS


def test_a_run_that_nobody_goes_on_with_is_not_waited_for(world: World) -> None:
    """It would never end: what it has at the API needs a person."""
    rival = sent(built(world, job(source=OTHER_SQL), run_mode.NORMAL), world)
    participants.leave(world.ledger(), world.spec.name, "in-process")

    with pytest.raises(ConfigurationError, match=f"llm_batch close {rival.run_id}"):
        world.run()


def test_an_airflow_run_that_was_cleared_works_on_its_new_run_alone(world: World) -> None:
    """The SQL was changed in between: what it had built before is nobody's, and never sent."""
    built(world, job(source=OTHER_SQL), run_mode.NORMAL)

    assert world.run().loaded == ROWS
    assert billed(world) == ROWS


def test_an_airflow_run_does_not_wait_for_itself(world: World) -> None:
    """Cleared after the SQL was changed, it finds what it has sent before: that needs a person."""
    rival = sent(built(world, job(source=OTHER_SQL), run_mode.NORMAL), world)

    with pytest.raises(ConfigurationError, match=f"llm_batch close {rival.run_id}"):
        world.run()


def test_a_run_that_was_overtaken_sends_nothing(world: World) -> None:
    """Another has loaded its rows since it was built: closed, and begun anew, it pays nothing."""
    old = built(world, job(), run_mode.NORMAL)
    participants.leave(world.ledger(), world.spec.name, "in-process")
    finish(world, job(source=OTHER_SQL), run_mode.NORMAL)
    world._is_open = False

    with pytest.raises(ConfigurationError, match=f"asked the same and was loaded.*{old.run_id}"):
        world.run()

    world.ledger().close_run(old.run_id)
    world._is_open = False
    assert world.run().reused == ROWS
    assert billed(world) == ROWS


@pytest.mark.parametrize("first", [0, 1], ids=["the older", "the newer"])
def test_of_two_built_runs_the_first_to_send_goes_on(world: World, first: int) -> None:
    """One had failed while the other was built, and a task of it was cleared."""
    older = built(world, job())
    participants.leave(world.ledger(), world.spec.name, "in-process")
    runs = (older, built(world, job(source=OTHER_SQL)))
    winner, loser = sent(runs[first], world), runs[1 - first]

    with pytest.raises(ConfigurationError, match=f"run {winner.run_id} .* sent .*{loser.run_id}"):
        sent(loser, world)

    assert states(loser, world) == {BatchState.PREPARED}
    assert states(winner, world) == {BatchState.SUBMITTED}


def test_the_newest_run_is_closed_when_an_earlier_one_was_sent(world: World) -> None:
    """As its error says: without that it would stay open for ever. Begun anew, it pays nothing."""
    old = built(world, job())
    participants.leave(world.ledger(), world.spec.name, "in-process")
    late = built(world, job(source=OTHER_SQL))
    sent(old, world)
    with pytest.raises(ConfigurationError, match=f"llm_batch close {late.run_id}"):
        sent(late, world)

    plan = closing.plan_close(world.ledger(), late.run_id, is_alive=lambda *_: False)
    places = closing.Places(world.ledger(), world.artifacts(), lambda _: pytest.fail("no call"))
    closing.close(plan, places, Actor("kim", "cli"))

    assert (plan.is_replaced, plan.successor.run_id) == (True, old.run_id)
    participants.leave(world.ledger(), world.spec.name, "in-process")
    world._opened(world.ledger(), run_mode.NORMAL)
    finish(world, job(), run_mode.NORMAL)
    finish(world, job(source=OTHER_SQL), run_mode.NORMAL)
    assert billed(world) == ROWS


def test_force_sends_beside_another(world: World) -> None:
    """It pays again, and was asked for."""
    sent(built(world, job()), world)

    forced = sent(built(world, job(), run_mode.FORCE), world)

    assert states(forced, world) == {BatchState.SUBMITTED}


def test_a_run_of_which_a_task_was_cleared_is_waited_for(world: World) -> None:
    """Its Airflow run had failed; since a step of it goes on, so does the whole."""
    rival = attended(built(world, job(source=OTHER_SQL)), world)
    for airflow_run in ("in-process", "another"):
        participants.leave(world.ledger(), world.spec.name, airflow_run)

    participants.go_on(world.ledger(), rival.run_id, world.spec.name, "another")

    with pytest.raises(PartitionBusyError, match=rival.run_id):
        world.run()

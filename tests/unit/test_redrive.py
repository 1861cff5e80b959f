"""A redrive sends what has failed; what has not failed yet belongs to the run that is open."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from include import actions, pipeline, run_mode
from include.errors import ConfigurationError
from include.job_spec import JobSpec, load_job, with_overrides
from include.ledger import Ledger
from include.ledger_records import Partition, Run
from tests.faults.world import World
from tests.unit.conftest import ROWS

START = datetime(2026, 11, 1, tzinfo=UTC)
DAY = Partition("ticket_triage", START, START + timedelta(days=1))
NEXT_DAY = Partition("ticket_triage", DAY.end, DAY.end + timedelta(days=1))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(sa.create_engine(f"sqlite:///{tmp_path}/ledger.db"))


@pytest.fixture(scope="module")
def spec() -> JobSpec:
    return load_job("ticket_triage")


def opened(ledger: Ledger, spec: JobSpec, mode: str, partition: Partition = DAY) -> Run:
    return pipeline.open_run(ledger, spec, partition, mode=mode, dag_id="d", dag_run_id="r")


def test_an_open_run_is_finished_before_a_redrive(ledger: Ledger, spec: JobSpec) -> None:
    """Beside an open run, a redrive would pay again for what its batches are doing."""
    run = opened(ledger, spec, run_mode.NORMAL)

    with pytest.raises(ConfigurationError, match=f"{run.run_id} is not finished.*without redrive"):
        opened(ledger, spec, run_mode.REDRIVE)


def test_a_done_run_can_be_redriven(ledger: Ledger, spec: JobSpec) -> None:
    """Other days and other requests do not matter; a second redrive joins the first."""
    ledger.finish_run(opened(ledger, spec, run_mode.NORMAL).run_id, loaded=1, failed=1)
    opened(ledger, spec, run_mode.NORMAL, NEXT_DAY)
    opened(ledger, with_overrides(spec, model="gpt-5-nano"), run_mode.NORMAL)

    first = opened(ledger, spec, run_mode.REDRIVE)

    assert first.mode == run_mode.REDRIVE
    assert opened(ledger, spec, run_mode.REDRIVE).run_id == first.run_id


def test_a_redrive_asks_what_its_run_has_asked(world: World) -> None:
    """Another model, a part of the rows: the failed ones are sent, as was told, and no others."""
    usual = world.spec
    world.spec = with_overrides(usual, model="gpt-4.1-mini", sample="0.9")
    world.simulator.add_faults({"fault": "line_error", "status": 400, "times": 1})
    first = world.run()
    run = world.ledger().run(world.run_ids[0])
    plan = actions.plan_redrive(world.ledger(), run.run_id)

    params = actions.redrive_params(run)
    world.spec = with_overrides(usual, model=params.get("model"), sample=params.get("sample"))
    again = world.run(mode=run_mode.REDRIVE)

    assert 0 < plan.rows == first.failed < first.rows < ROWS
    assert (again.requests, again.rows, again.model) == (plan.rows, first.rows, "gpt-4.1-mini")
    world.simulator.clear_faults()


def test_a_redrive_of_a_changed_job_tells_all_rows(world: World) -> None:
    """A changed prompt is another request: no row is loaded with it, and each one is paid for."""
    world.simulator.add_faults({"fault": "line_error", "status": 400, "times": 1})
    first = world.run()
    ledger = world.ledger()
    same = actions.plan_redrive(ledger, first.run_id, world.spec)
    request = world.spec.request.model_copy(update={"prompt": "Name the note.\n---\n{{ body }}"})
    world.spec = world.spec.model_copy(update={"request": request})

    plan = actions.plan_redrive(ledger, first.run_id, world.spec)
    again = world.run(mode=run_mode.REDRIVE)

    assert (same.rows, same.is_changed) == (first.failed, False)
    assert (plan.rows, plan.is_changed) == (again.requests, True)
    assert again.requests == ROWS
    assert plan.cost_usd is not None
    assert same.cost_usd is not None
    assert plan.cost_usd == same.cost_usd / first.failed * ROWS
    world.simulator.clear_faults()


def test_another_model_of_a_run_is_no_change_of_its_job(world: World) -> None:
    """Its redrive has that model as its param; limits and budget shape no request either."""
    usual = world.spec
    world.spec = with_overrides(usual, model="gpt-4.1-mini")
    world.simulator.add_faults({"fault": "line_error", "status": 400, "times": 1})
    first = world.run()
    limits = usual.limits.model_copy(update={"requests_per_batch": 7})

    plan = actions.plan_redrive(
        world.ledger(), first.run_id, usual.model_copy(update={"limits": limits})
    )

    assert (plan.rows, plan.is_changed) == (first.failed, False)
    world.simulator.clear_faults()


def test_the_params_of_a_redrive_are_those_of_airflow(ledger: Ledger, spec: JobSpec) -> None:
    """Plain JSON; of a run over all rows without a sample."""
    whole = opened(ledger, spec, run_mode.NORMAL)
    part = opened(ledger, with_overrides(spec, sample=0.25), run_mode.NORMAL)

    assert actions.redrive_params(whole) == {"redrive": True, "model": spec.request.model}
    assert actions.redrive_params(part)["sample"] == 0.25


def test_the_jobs_own_model_keeps_its_price(spec: JobSpec) -> None:
    """A run that names it as its param is no other run, and costs no other money."""
    request = spec.request.model_copy(update={"priced_as": "gpt-4o"})
    deployed = spec.model_copy(update={"request": request})

    assert with_overrides(deployed, model=request.model) == deployed
    assert with_overrides(deployed, model="gpt-5-nano").request.priced_as is None

"""What the plugin does when an Airflow run has failed, and that it leaves other DAGs alone."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa

from include import ledger_tables as tables
from include import participants, pipeline, run_mode
from include.simulator.process import Simulator
from tests.airflow.workshop import wait_for_listener
from tests.faults.world import KEY, World

Fail = Callable[[Any], None]


@pytest.fixture
def ledger_file(airflow_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a ledger appears when somebody opens it."""
    path = tmp_path / "ledger.db"
    connection = json.dumps({"conn_type": "sqlite", "host": str(path)})
    monkeypatch.setenv("AIRFLOW_CONN_LLM_BATCH_DB", connection)
    return path


@pytest.fixture
def fail() -> Fail:
    """Tell the listener that a run of the DAG has failed, and wait for what it began."""
    from llm_batch import listener

    def tell(dag: Any) -> None:
        run = SimpleNamespace(dag=dag, dag_id="of_a_test", run_id="manual__1")
        listener.on_dag_run_failed(run, "")  # type: ignore[arg-type]
        wait_for_listener()

    return tell


def as_the_scheduler_has_it(dag: Any) -> Any:
    """A DAG as it comes from Airflow's database."""
    from airflow.serialization.serialized_objects import DagSerialization

    return DagSerialization.from_dict(DagSerialization.to_dict(dag))


def test_a_dag_without_batches_costs_nothing(ledger_file: Path, fail: Fail) -> None:
    """No thread, no connection: the ledger is not even made."""
    from airflow.providers.standard.operators.empty import EmptyOperator
    from airflow.sdk import DAG

    with DAG("of_another_team", schedule=None) as dag:
        EmptyOperator(task_id="nothing")

    fail(as_the_scheduler_has_it(dag))

    assert not ledger_file.exists()


@pytest.mark.parametrize("name", ["ticket_triage", "request_queue"])
def test_a_dag_of_ours_is_looked_at(airflow_home: Path, name: str) -> None:
    """Its tasks are mapped, and in groups."""
    from airflow.dag_processing.dagbag import DagBag
    from llm_batch import own_dags

    dag = DagBag(os.environ["AIRFLOW__CORE__DAGS_FOLDER"]).dags[name]
    run: Any = SimpleNamespace(dag=as_the_scheduler_has_it(dag))

    # Not by the ledger that is opened: the note of its run would open it as well.
    assert own_dags.may_submit(run)
    assert own_dags.may_report(run)


def test_a_dag_of_a_users_own_operator_is_looked_at(ledger_file: Path, fail: Fail) -> None:
    """A class that is based on ours makes batches as well."""
    from airflow.sdk import DAG
    from llm_batch.operators import SubmitBatchOperator

    class SubmitOurs(SubmitBatchOperator):
        """With another name."""

    with DAG("of_a_user", schedule=None) as dag:
        SubmitOurs(task_id="submit", request_file="requests.jsonl")

    fail(as_the_scheduler_has_it(dag))

    assert ledger_file.exists()


def test_a_dag_that_is_not_at_hand_may_be_ours(ledger_file: Path, fail: Fail) -> None:
    """To leave batches running would cost more than a look."""
    fail(None)

    assert ledger_file.exists()


def test_a_batch_that_cannot_be_cancelled_keeps_no_other_at_work(
    ledger_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that the API has lost comes first: the spend of the other one is stopped all the same."""
    from llm_batch import listener

    with Simulator.start(tmp_path / "slow", seconds_in_progress=3600) as simulator:
        address = {"conn_type": "openai", "host": simulator.base_url, "password": KEY}
        monkeypatch.setenv("AIRFLOW_CONN_OPENAI_DEFAULT", json.dumps(address))
        world = World(tmp_path, simulator)
        world.fill(7)
        ledger = world.ledger()
        run = world._opened(ledger, run_mode.NORMAL)
        run = pipeline.extract(run, ledger, world.artifacts(), world.source)
        for batch in pipeline.build(run, 1, ledger, world.artifacts(), world.target, most_shards=9):
            world.submit(batch, ledger)
        lost, other = ledger.batches(run.run_id)
        with ledger.engine.begin() as connection:
            change = sa.update(tables.batch).where(tables.batch.c.batch_id == lost.batch_id)
            connection.execute(change.values(batch_id="batch_lost"))

        listener.cancel_in_flight(world.spec.name, "in-process")

        assert world.api().retrieve(str(other.batch_id)).status in {"cancelling", "cancelled"}
        world.close()


@pytest.mark.parametrize(
    "step", ["build", "approve", "submit", "wait", "collect", "settle", "load"]
)
def test_a_task_that_is_cleared_goes_on_with_the_run(
    ledger_file: Path, tmp_path: Path, simulator: Simulator, step: str
) -> None:
    """The Airflow run had failed and left: whichever task is cleared, others wait for it again."""
    world = World(tmp_path, simulator)
    world.fill(3)
    ledger = world.ledger()
    run = world._opened(ledger, run_mode.NORMAL)
    run = pipeline.extract(run, ledger, world.artifacts(), world.source)
    (batch,) = pipeline.build(run, 1, ledger, world.artifacts(), world.target, most_shards=9)
    participants.leave(ledger, run.job, "in-process")
    assert participants.names(ledger, run.run_id) == []

    airflow_run = SimpleNamespace(dag_id=run.job, run_id="in-process")
    task(step, run.run_id, batch.submission_id).pre_execute({"dag_run": airflow_run})

    assert participants.names(ledger, run.run_id) == [(run.job, "in-process")]
    world.close()


def task(step: str, run_id: str, submission_id: str) -> Any:
    """The operator of one step of that run."""
    from llm_batch import approval, build_operators, operators
    from llm_batch.sensors import BatchSensor

    run, shard = {"run_id": run_id}, {"submission_id": submission_id}
    return {
        "build": lambda: build_operators.BuildRequestsOperator(
            task_id=step, run=run, round_number=1
        ),
        "approve": lambda: approval.ApproveSpendOperator(
            task_id=step, run=run, subject="Spend $1?", body=""
        ),
        "submit": lambda: operators.SubmitBatchOperator(task_id=step, submission=shard),
        "wait": lambda: BatchSensor(task_id=step, batch=shard),
        "collect": lambda: operators.CollectResultsOperator(task_id=step, batch=shard),
        "settle": lambda: operators.SettleRoundOperator(task_id=step, run=run, round_number=1),
        "load": lambda: operators.LoadResultsOperator(task_id=step, run=run),
    }[step]()

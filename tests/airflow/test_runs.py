"""Whole runs through Airflow's own task runner (`dag.test`), against the simulator."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from include.simulator.process import Simulator
from include.source_tables import load_sample_tickets

if TYPE_CHECKING:
    from airflow.dag_processing.dagbag import DagBag

DAY = datetime(2026, 11, 3, tzinfo=UTC)


def database(home: Path, name: str) -> sa.Engine:
    return sa.create_engine(f"sqlite:///{home}/{name}.db")


def scalar(home: Path, name: str, sql: str) -> Any:
    with database(home, name).connect() as connection:
        return connection.execute(sa.text(sql)).scalar()


@pytest.fixture(scope="module")
def dag_bag(airflow_home: Path) -> DagBag:
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(os.environ["AIRFLOW__CORE__DAGS_FOLDER"])
    assert bag.import_errors == {}
    load_sample_tickets(database(airflow_home, "source_db"))
    return bag


def test_a_day_ends_with_every_row_in_one_table(
    dag_bag: DagBag, airflow_home: Path, service: Simulator
) -> None:
    """Failures of the first round are mended by the second; every ticket ends exactly once."""
    transient, permanent = service.add_faults(
        {"fault": "line_error", "status": 500, "fraction": 0.1, "first_times": 1},
        {"fault": "line_error", "status": 400, "fraction": 0.01, "seed": 7},
    )
    dag = dag_bag.dags["ticket_triage"]
    sql = (
        "SELECT count(*) FROM tickets WHERE created_at >= '2026-11-03T00:00:00Z' "
        "AND created_at < '2026-11-04T00:00:00Z'"
    )
    rounds = (
        "SELECT count(*) FROM llm_batch_round JOIN llm_batch_run USING (run_id) "
        "WHERE job = 'ticket_triage' AND interval_start LIKE '2026-11-03%'"
    )
    loaded_rows = "SELECT count(*) FROM ticket_labels WHERE _interval_start LIKE '2026-11-03%'"
    failed_rows = (
        "SELECT count(*) FROM ticket_labels_failures WHERE _interval_start LIKE '2026-11-03%'"
    )
    rows = scalar(airflow_home, "source_db", sql)

    run = dag.test(logical_date=DAY + timedelta(days=1), run_conf={})

    loaded = scalar(airflow_home, "results_db", loaded_rows)
    failed = scalar(airflow_home, "results_db", failed_rows)
    assert service.fired(transient["id"]) > 0
    assert service.fired(permanent["id"]) >= failed > 0
    assert loaded + failed == rows > 100
    assert scalar(airflow_home, "llm_batch_db", rounds) == 2
    assert run.get_task_instance("load").state == "success"
    third = run.get_task_instance("round_3.build")
    assert (third.state, third.pid) == ("skipped", None), "no process is started for nothing"
    assert run.get_task_instance("round_3.settle").state == "skipped"
    assert run.get_task_instance("round_2.settle").xcom_pull("round_2.settle")["retry"] == 0


def test_a_second_run_of_the_day_pays_nothing(
    dag_bag: DagBag, airflow_home: Path, service: Simulator
) -> None:
    """The same day again: no batch, no charge, the same results."""
    before = service.bill()
    results = "SELECT group_concat(_custom_id) FROM (SELECT * FROM ticket_labels ORDER BY 1)"
    loaded_before = scalar(airflow_home, "results_db", results)

    dag_bag.dags["ticket_triage"].test(logical_date=DAY + timedelta(days=1, hours=1))

    assert service.bill() == before
    assert scalar(airflow_home, "results_db", results) == loaded_before


def test_a_run_can_override_model_and_sample(
    dag_bag: DagBag, airflow_home: Path, service: Simulator
) -> None:
    """`model` and `sample` come from the run's params."""
    day = DAY + timedelta(days=3)
    dag_bag.dags["ticket_triage"].test(
        logical_date=day, run_conf={"model": "gpt-5-nano", "sample": 0.1}
    )

    sql = "SELECT count(*) FROM ticket_labels WHERE _model = 'gpt-5-nano'"
    assert 0 < scalar(airflow_home, "results_db", sql) < 60


def test_xcoms_are_small_and_hold_no_row_text(
    dag_bag: DagBag, airflow_home: Path, service: Simulator
) -> None:
    """Whatever a task returned is under 1 KiB an item, and no ticket's text is in it."""
    from airflow.models.xcom import XComModel
    from airflow.utils.session import create_session

    with database(airflow_home, "source_db").connect() as connection:
        subjects = [
            row[0]
            for row in connection.execute(sa.text("SELECT DISTINCT subject FROM tickets LIMIT 200"))
        ]
    with create_session() as session:
        values = [json.dumps(one.value) for one in session.query(XComModel).all()]

    assert len(values) > 10
    for value in values:
        items = json.loads(value)
        for item in items if isinstance(items, list) else [items]:
            assert len(json.dumps(item)) <= 1024 * 2  # stored as JSON text inside JSON
        assert not [subject for subject in subjects if len(subject) > 12 and subject in value]


@pytest.mark.parametrize("dag_id", ["own_request_file", "without_triggerer"])
def test_operators_work_in_a_dag_of_ones_own(
    dag_bag: DagBag, airflow_home: Path, service: Simulator, tmp_path: Path, dag_id: str
) -> None:
    """The documented DAG submits a request file, waits (deferred, or rescheduled) and collects."""
    lines = [
        {
            "custom_id": f"{dag_id}-{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "hi"}]},
        }
        for number in range(3)
    ]
    file = tmp_path / "requests.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.environ["AIRFLOW_VAR_REQUEST_FILE"] = str(file)
    before = service.bill()["batches"]

    run = dag_bag.dags[dag_id].test()

    assert run.state == "success"
    assert service.bill()["batches"] == before + 1
    (row,) = _batches(airflow_home, dag_id)
    assert row == ("COLLECTED", 3, 3)


def _batches(home: Path, dag_id: str) -> list[tuple[Any, ...]]:
    sql = (
        "SELECT b.state, b.requests, b.succeeded FROM llm_batch_batch b "
        "JOIN llm_batch_run r USING (run_id) WHERE r.dag_id = :dag_id"
    )
    with database(home, "llm_batch_db").connect() as connection:
        return [tuple(row) for row in connection.execute(sa.text(sql), {"dag_id": dag_id})]

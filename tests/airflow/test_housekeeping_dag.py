"""The DAG batch_housekeeping: a dry run by default, the real thing with the param."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from include.simulator.process import Simulator

LONG_AGO = "2026-01-01 00:00:00.000000"


@pytest.fixture
def loaded_day(
    service: Simulator, airflow_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A day of ticket_triage that was loaded long ago; the file of its ledger."""
    from airflow.sdk.timezone import datetime
    from llm_batch import connections

    from include.source_tables import load_sample_tickets

    path = tmp_path / "ledger.db"
    connection = json.dumps({"conn_type": "sqlite", "host": str(path)})
    monkeypatch.setenv("AIRFLOW_CONN_LLM_BATCH_DB", connection)
    load_sample_tickets(connections.engine("source_db"))
    dag("ticket_triage").test(
        logical_date=datetime(2026, 11, 10), run_conf={"force": True, "sample": 0.1}
    )
    with sa.create_engine(f"sqlite:///{path}").begin() as ledger:
        ledger.exec_driver_sql("UPDATE llm_batch_run SET done_at = ?", (LONG_AGO,))
    return path


def dag(name: str) -> Any:
    """A DAG of the project."""
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(os.environ["AIRFLOW__CORE__DAGS_FOLDER"])
    return bag.dags[name]


def removed(ledger: Path) -> tuple[int, int]:
    """How many batches have lost their files, and how many runs their artifacts."""
    with sa.create_engine(f"sqlite:///{ledger}").connect() as connection:
        files = "SELECT count(*) FROM llm_batch_batch WHERE files_deleted_at IS NOT NULL"
        artifacts = "SELECT count(*) FROM llm_batch_run WHERE artifacts_deleted_at IS NOT NULL"
        return tuple(connection.exec_driver_sql(one).scalar_one() for one in (files, artifacts))


def test_it_tells_first_and_does_it_when_told(loaded_day: Path) -> None:
    """Every chore ends well both ways; only `apply` removes something."""
    told = dag("batch_housekeeping").test(run_conf={})
    after_telling = removed(loaded_day)
    done = dag("batch_housekeeping").test(run_conf={"apply": True})

    assert after_telling == (0, 0)
    assert removed(loaded_day) == (1, 1)
    for run in (told, done):
        assert {one.state for one in run.get_task_instances()} == {"success"}

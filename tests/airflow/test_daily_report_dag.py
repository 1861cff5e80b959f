"""The DAG of the daily report, run by Airflow."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from include.simulator.process import Simulator


def test_the_report_dag_writes_the_page_and_its_text(
    airflow_home: Path, service: Simulator
) -> None:
    """Two files of the day before appear below the artifacts; the return value says where."""
    from airflow.dag_processing.dagbag import DagBag

    dag = DagBag(str(airflow_home / "dags" / "batch_report.py")).dags["batch_report"]

    run = dag.test(logical_date=datetime(2026, 11, 12, tzinfo=UTC))

    written = run.get_task_instance("report").xcom_pull(task_ids="report")
    page = airflow_home / "artifacts" / "reports" / "2026-11-11.html"
    assert run.state == "success"
    assert written["html"].endswith("/artifacts/reports/2026-11-11.html")
    assert page.read_text().startswith("<!doctype html>")
    assert "LLM batches on 2026-11-11" in page.with_suffix(".txt").read_text()

"""A job whose target is a Parquet dataset, through Airflow's own task runner."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from airflow.dag_processing.dagbag import DagBag

from include.simulator.process import Simulator
from tests.airflow.workshop import FILES, Job

ROWS: list[tuple[str, str | None]] = [("n1", "one"), ("n2", "two"), ("n3", None)]
TABLE = "  conn_id: results_db\n  table: to_parquet_labels\n"


@pytest.fixture
def job(airflow_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    """A job of this test; there is no connection that its target could name."""
    monkeypatch.setenv("AIRFLOW__LLM_BATCH__JOBS", str(tmp_path / "jobs"))
    monkeypatch.delenv("AIRFLOW_CONN_RESULTS_DB")
    made = Job("to_parquet", tmp_path / "jobs", airflow_home / "dags", airflow_home)
    assert TABLE.replace("to_parquet_labels", "{table}") in FILES["job.yaml"]
    made.write(job_yaml=(TABLE, f"  path: {(tmp_path / 'labels').as_uri()}\n"))
    made.fill(ROWS)
    yield made
    made.dag_file.unlink()


def test_a_day_ends_in_the_dataset(job: Job, tmp_path: Path, service: Simulator) -> None:
    """Results and failures are files; a second run of the day sends nothing."""
    before = service.bill()["requests"]
    states = job.run()
    paid = service.bill()["requests"]
    again = job.run()

    results = pd.read_parquet(tmp_path / "labels" / "results")
    failures = pd.read_parquet(tmp_path / "labels" / "failures")
    assert (states["load"], again["load"]) == ("success", "success")
    assert sorted(results["note_id"]) == ["n1", "n2"]
    assert dict(zip(failures["note_id"], failures["_reason"], strict=True)) == {"n3": "null_column"}
    assert again["round_1.build"] == "skipped"
    assert service.bill()["requests"] == paid == before + 2


def test_the_page_of_the_dag_names_the_folders(job: Job, tmp_path: Path) -> None:
    """Where a table would be named."""
    text = str(DagBag(str(job.dag_file)).dags["to_parquet"].doc_md)

    assert f"{tmp_path.as_uri()}/labels/results` and `{tmp_path.as_uri()}/labels/failures" in text
    assert "(Parquet)" in text

"""OpenLineage: the datasets, rows and figures of a run, as they leave Airflow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from include.job_spec import JOBS_ROOT
from include.ledger import Ledger
from include.simulator.process import Simulator
from tests.airflow.workshop import Job

ROW_TEXT = "canary-row-93ab"


@pytest.fixture
def job(airflow_home: Path, tmp_path: Path) -> Iterator[Job]:
    """A job of three rows."""
    shutil.copytree(JOBS_ROOT, tmp_path / "jobs")
    job = Job("with_lineage", tmp_path / "jobs", airflow_home / "dags", airflow_home)
    job.write()
    job.fill([(f"n{number}", ROW_TEXT) for number in range(3)])
    yield job
    job.dag_file.unlink()


def test_a_run_tells_what_it_read_and_wrote(job: Job, service: Simulator, tmp_path: Path) -> None:
    """Source table, snapshot, results and failures with their rows, and cost and counts."""
    events = told(job, tmp_path / "events.jsonl")
    ledger = Ledger(sa.create_engine(f"sqlite:///{job.home}/llm_batch_db.db"))
    (run,) = ledger.runs(job.name)

    extract, load, report = (events[name] for name in ("extract", "load", "report"))

    assert [one["name"].split(".")[-1] for one in extract["inputs"]] == ["with_lineage_notes"]
    assert extract["outputs"][0]["name"] == load["inputs"][0]["name"]
    assert rows(extract)[extract["outputs"][0]["name"]] == 3
    assert rows(load) == {"with_lineage_labels": 3, "with_lineage_labels_failures": 0}
    figures = report["run"]["facets"]["llmBatch"]
    assert (figures["rows"], figures["loaded"], figures["cost_usd"]) == (3, 3, str(run.cost_usd))
    assert ROW_TEXT not in json.dumps(events)


def told(job: Job, file: Path) -> dict[str, Any]:
    """Run the job with the file transport; the last event of each of its tasks.

    In a process of its own: whether the listener is there is settled when Airflow starts.
    """
    transport = {"type": "file", "log_file_path": str(file), "append": True}
    settings = {
        "AIRFLOW__OPENLINEAGE__TRANSPORT": json.dumps(transport),
        "AIRFLOW__OPENLINEAGE__EXECUTION_TIMEOUT": "600",  # seconds, after which an event is lost
        "AIRFLOW__LLM_BATCH__JOBS": str(job.jobs),
    }
    command = [sys.executable, "-m", "airflow", "dags", "test", job.name, "2026-11-04"]
    subprocess.run(command, env=os.environ | settings, check=True, capture_output=True, timeout=900)
    events = [json.loads(line) for line in file.read_text().splitlines()]
    return {
        event["job"]["name"].removeprefix(f"{job.name}."): event
        for event in events
        if event["eventType"] == "COMPLETE"
    }


def rows(event: dict[str, Any]) -> dict[str, int]:
    """Rows by dataset written."""
    return {
        one["name"]: one["outputFacets"]["outputStatistics"]["rowCount"] for one in event["outputs"]
    }

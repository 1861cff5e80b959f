"""A DAG of somebody else starts from a loaded partition, with its figures."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from include.job_spec import JOBS_ROOT
from include.simulator.process import Simulator
from tests.airflow.workshop import Job


def test_a_loaded_partition_tells_its_figures_to_dags_that_wait_for_it(
    airflow_home: Path, service: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event of the job's asset has counts, cost and partition; a DAG may be scheduled on it."""
    from airflow.models.asset import AssetEvent, AssetModel
    from airflow.sdk import DAG, Asset
    from airflow.utils.session import create_session

    shutil.copytree(JOBS_ROOT, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("AIRFLOW__LLM_BATCH__JOBS", str(tmp_path))
    job = Job("told_downstream", tmp_path, airflow_home / "dags", airflow_home)
    job.write()
    job.fill([(f"n{number}", "text") for number in range(3)])

    states = job.run()
    job.dag_file.unlink()

    with create_session() as session:
        (event,) = (
            session.query(AssetEvent)
            .join(AssetModel, AssetModel.id == AssetEvent.asset_id)
            .filter(AssetModel.name == job.name)
            .all()
        )
        uri, extra = event.asset.uri, event.extra
    waiting = DAG("after_labels", schedule=[Asset("told_downstream")])
    (asset,) = waiting.timetable.asset_condition.objects
    assert states["report"] == "success"
    assert (extra["rows"], extra["loaded"], extra["failed"]) == (3, 3, 0)
    assert float(extra["cost_usd"]) > 0
    assert extra["interval_start"] == "2026-11-03T00:00:00+00:00"
    assert asset.uri == uri

"""What a real scheduler makes of a run that has ended: a note, and the run of another DAG."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from include.job_spec import JOBS_ROOT
from include.local_stack.component import Component, stop_all
from include.local_stack.environment import PROJECT
from include.local_stack.rest import wait_until
from include.run_note import SIGN
from include.simulator.process import Simulator
from tests.airflow.workshop import Job

JOB = "ends_in_scheduler"
DOWNSTREAM = "after_labels"
PATIENCE = 300.0  # seconds for a scheduler to start and to look at its runs


def documented_dag() -> str:
    """The downstream DAG that docs/signals.md shows, for our job."""
    text = (PROJECT / "docs" / "signals.md").read_text()
    shown = text.split("## Asset events")[1].split("```python\n")[1].split("```")[0]
    return shown.replace('"ticket_triage"', f'"{JOB}"')


@pytest.fixture
def job(
    airflow_home: Path, service: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Job]:
    """A job that has run, and the DAG that waits for its asset."""
    downstream = airflow_home / "dags" / f"{DOWNSTREAM}.py"
    downstream.write_text(documented_dag())
    known(downstream)
    shutil.copytree(JOBS_ROOT, tmp_path / "jobs")
    monkeypatch.setenv("AIRFLOW__LLM_BATCH__JOBS", str(tmp_path / "jobs"))
    job = Job(JOB, tmp_path / "jobs", airflow_home / "dags", airflow_home)
    job.write()
    job.fill([(f"n{number}", "text") for number in range(3)])
    job.run()
    yield job
    for file in (downstream, job.dag_file):
        file.unlink()


def test_an_ended_run_gets_its_note_and_starts_who_waits_for_it(job: Job, tmp_path: Path) -> None:
    """The scheduler itself has the note written, and hands the figures to the DAG of the docs."""
    not_ended_yet()

    with scheduler(tmp_path / "scheduler.log"):
        note = wait_until("the note", PATIENCE, note_of_the_run)
        figures = wait_until("the other DAG's run", PATIENCE, told_downstream)

    assert note.startswith(f"{SIGN}3 of 3 rows loaded, 0 failed")
    assert (figures["loaded"], figures["interval_start"]) == (3, "2026-11-03T00:00:00+00:00")
    assert float(figures["cost_usd"]) > 0


def known(file: Path) -> None:
    """Let Airflow know the DAG of a file, as its DAG processor would, and unpause it."""
    from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db
    from airflow.models.dag import DagModel
    from airflow.models.dagbundle import DagBundleModel
    from airflow.utils.session import create_session

    with create_session() as session:
        session.merge(DagBundleModel(name="scheduler-tests"))
        session.flush()
        sync_bag_to_db(DagBag(str(file)), "scheduler-tests", None, session=session)
        session.flush()
        session.query(DagModel).filter_by(dag_id=file.stem).update({"is_paused": False})


def not_ended_yet() -> None:
    """Make the run one whose end no scheduler has seen yet, without a note."""
    from airflow.models.dag import DagModel
    from airflow.models.dagrun import DagRun, DagRunNote
    from airflow.utils.session import create_session

    wait_until("the first note", PATIENCE, note_of_the_run)
    with create_session() as session:
        run = session.query(DagRun).filter_by(dag_id=JOB).one()
        session.query(DagRunNote).filter_by(dag_run_id=run.id).delete()
        run.state = "running"
        only_this_run = {"is_paused": False, "next_dagrun_create_after": None}
        session.query(DagModel).filter_by(dag_id=JOB).update(only_this_run)


@contextmanager
def scheduler(log: Path) -> Iterator[None]:
    """A scheduler without slots: nobody is there to run a task."""
    command = [sys.executable, "-m", "airflow", "scheduler", "--skip-serve-logs"]
    env = os.environ | {"AIRFLOW__CORE__PARALLELISM": "1"}
    running = Component("scheduler", command, log, env)
    set_slots(0)
    try:
        running.start()
        yield
    finally:
        stop_all([running])
        set_slots(128)


def set_slots(slots: int) -> None:
    from airflow.models.pool import Pool
    from airflow.utils.session import create_session

    with create_session() as session:
        session.query(Pool).update({"slots": slots})


def note_of_the_run() -> Any:
    from airflow.models.dagrun import DagRun
    from airflow.utils.session import create_session

    with create_session() as session:
        return session.query(DagRun).filter_by(dag_id=JOB).one().note


def told_downstream() -> Any:
    """What the run of the other DAG has been started with."""
    from airflow.models.dagrun import DagRun
    from airflow.utils.session import create_session

    with create_session() as session:
        run = session.query(DagRun).filter_by(dag_id=DOWNSTREAM).one_or_none()
        return run and next(event.extra for event in run.consumed_asset_events)

"""What Airflow's own views show of a run: note, rendered templates, links."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from include.job_spec import JOBS_ROOT
from include.local_stack.rest import wait_until
from include.run_note import SIGN
from include.simulator.process import Simulator
from tests.airflow.workshop import Job

JOB = "in_views"
PAGES = "https://llm.example/batches/"
CANARY = "canary-row-7c1e"
WITH_A_BATCH = {"submit", "wait", "collect"}
PATIENCE = 120.0  # seconds for a note: it is written after the run has ended


@pytest.fixture(scope="module")
def batch_id(
    airflow_home: Path, openai_simulator: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Run a job of three rows once; the id of its batch."""
    jobs = tmp_path_factory.mktemp("jobs")
    shutil.copytree(JOBS_ROOT, jobs, dirs_exist_ok=True)
    openai_simulator.clear_faults()
    before = {one["id"] for one in openai_simulator.batches()["batches"]}
    openai = json.loads(os.environ["AIRFLOW_CONN_OPENAI_DEFAULT"])
    openai["extra"] = {"provider_options": {"batch_page": PAGES}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRFLOW__LLM_BATCH__JOBS", str(jobs))
        patch.setenv("AIRFLOW_CONN_OPENAI_DEFAULT", json.dumps(openai))
        job = Job(JOB, jobs, airflow_home / "dags", airflow_home)
        job.write()
        job.fill([(f"n{number}", CANARY) for number in range(3)])
        job.run()
        job.dag_file.unlink()
        (made,) = {one["id"] for one in openai_simulator.batches()["batches"]} - before
        yield made


def records(model: Any, **which: Any) -> list[Any]:
    """Rows of one of Airflow's own tables that belong to the job."""
    from airflow.utils.session import create_session

    with create_session() as session:
        found = session.query(model).filter_by(dag_id=JOB, **which).all()
        session.expunge_all()
        return list(found)


def note() -> str | None:
    from airflow.models.dagrun import DagRun
    from airflow.utils.session import create_session

    with create_session() as session:
        found: str | None = session.query(DagRun).filter_by(dag_id=JOB).one().note
        return found


def test_rendered_templates_hold_no_row_text(batch_id: str) -> None:
    """Ids and counts only: neither a row nor the prompt is shown under Rendered Templates."""
    from airflow.models.renderedtifields import RenderedTaskInstanceFields

    found = {one.task_id: one.rendered_fields for one in records(RenderedTaskInstanceFields)}

    assert found["round_1.shard.collect"]["batch"]["batch_id"] == batch_id
    assert {task.rsplit(".", 1)[-1] for task in found} >= {*WITH_A_BATCH, "build", "load", "report"}
    assert CANARY not in repr(found)
    assert "Sum the note up" not in repr(found)


def test_every_task_with_a_batch_links_to_it(batch_id: str) -> None:
    """What Airflow keeps for the button is the page of this very batch."""
    from airflow.models.xcom import XComModel

    found = records(XComModel, key="_link_BatchLink")

    assert {one.task_id.rsplit(".", 1)[-1] for one in found} == WITH_A_BATCH
    assert {str(one.value).strip('"') for one in found} == {f"{PAGES}{batch_id}"}


@pytest.mark.parametrize("returned", [{"batch_id": "batch_1", "page": ""}, {"batch_id": "b"}, None])
def test_a_batch_without_a_page_has_no_link(
    returned: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Airflow shows no button for an empty address; nor for what an earlier release returned."""
    from airflow.sdk.execution_time.xcom import XCom
    from airflow.sdk.types import TaskInstanceKey
    from llm_batch.links import BatchLink

    monkeypatch.setattr(XCom, "get_one", lambda **_: returned)
    key = TaskInstanceKey("dag", "task", "run")

    assert BatchLink().get_link(None, ti_key=key) == ""  # type: ignore[arg-type]


def test_a_ledger_that_is_away_costs_one_note(
    batch_id: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever names an ended run never waits and gets no error; the next note is written."""
    from airflow.models.dagrun import DagRun, DagRunNote
    from airflow.utils.session import create_session
    from llm_batch.run_notes import RunNotes

    (run,) = records(DagRun)
    wait_until("the first note", PATIENCE, note)
    with create_session() as session:
        session.query(DagRunNote).filter_by(dag_run_id=run.id).delete()
    notes = RunNotes()

    with monkeypatch.context() as patch:
        nowhere = {"conn_type": "sqlite", "host": "/nowhere/ledger.db"}
        patch.setenv("AIRFLOW_CONN_LLM_BATCH_DB", json.dumps(nowhere))
        notes.add(run)
        wait_until("a line in the log", PATIENCE, lambda: "gets no note" in caplog.text)
    before = note()
    notes.add(run)

    assert before is None
    assert wait_until("the next note", PATIENCE, note).startswith(SIGN)


def test_a_run_ends_with_a_note_but_that_of_a_person_stays(batch_id: str) -> None:
    """Rows and money where people look first; what somebody wrote is not written over."""
    from airflow.models.dagrun import DagRun
    from airflow.utils.session import create_session
    from llm_batch import run_notes

    ours = wait_until("a note", PATIENCE, note)
    with create_session() as session:
        run = session.query(DagRun).filter_by(dag_id=JOB).one()
        run.dag_run_note.content, run.dag_run_note.user_id = "The source was late.", "ann"
        run_id = run.run_id
    run_notes.write(JOB, run_id)

    assert ours.startswith(f"{SIGN}3 of 3 rows loaded, 0 failed")
    assert "3 requests, 1 batch, 1 round" in ours
    assert CANARY not in ours
    assert note() == "The source was late."

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import openai
import pytest
from airflow.sdk.module_loading import import_string

from include.local_stack.component import Component, stop_all
from include.local_stack.rest import wait_until
from include.simulator.process import Simulator

RECORDED = sorted((Path(__file__).parents[1] / "upgrade").glob("*/notes.json"))

OWN_DAG = "own_request_file"
DAY = datetime(2026, 11, 9, tzinfo=UTC)
PATIENCE = 300.0  # seconds for a triggerer to start and to poll
SOME_POLLS = timedelta(seconds=8)  # enough for the first ones, on a slow machine too
STORED = {
    "conn_id": "openai_default",
    "batch_id": "batch_1",
    "deadline": "2026-11-02T00:00:00+00:00",
}


def test_a_trigger_stored_by_an_earlier_release_still_loads(airflow_home: Path) -> None:
    """Every argument that is not one of the three ids and times has a default."""
    from llm_batch.triggers import BatchTrigger

    path, arguments = BatchTrigger(**STORED).serialize()

    assert path == "llm_batch.triggers.BatchTrigger"
    assert arguments.items() >= STORED.items()
    assert BatchTrigger(**arguments).serialize() == (path, arguments)


async def test_the_deadline_ends_the_wait_whatever_the_polls_say(
    airflow_home: Path, service: Simulator, tmp_path: Path
) -> None:
    """A batch that never ends, and polls that fail: at the deadline there is one event."""
    from llm_batch.triggers import BatchTrigger

    service.add_faults({"fault": "stuck"})
    (polls,) = service.add_faults(
        {"fault": "fail_before", "method": "GET", "path": "/batches/", "status": 500,
         "nth": 1, "every": 2}
    )  # fmt: skip
    batch_id = _batch(service, tmp_path)
    trigger = BatchTrigger(
        conn_id="openai_default",
        batch_id=batch_id,
        deadline=(datetime.now(UTC) + SOME_POLLS).isoformat(),
        poll_interval=0.2,
        first_poll=0.0,
    )

    events = [event async for event in trigger.run()]

    assert [event.payload for event in events] == [{"batch_id": batch_id, "status": "deadline"}]
    assert service.fired(polls["id"]) > 0


async def test_a_batch_that_the_api_does_not_know_is_waited_for(
    airflow_home: Path, service: Simulator
) -> None:
    """It may come back: the first answers that there is none do not wake the task."""
    from llm_batch.triggers import BatchTrigger

    soon = (datetime.now(UTC) + SOME_POLLS).isoformat()
    arguments = {**STORED, "batch_id": "batch_unknown", "deadline": soon}
    trigger = BatchTrigger(**arguments, poll_interval=0.2, first_poll=0.0)

    events = [event async for event in trigger.run()]

    assert [event.payload["status"] for event in events] == ["deadline"]
    assert [one for one in service.requests() if "batch_unknown" in one["path"]]


@pytest.mark.parametrize("notes", RECORDED, ids=lambda notes: f"from {notes.parent.name}")
async def test_a_trigger_of_an_earlier_release_goes_on(
    airflow_home: Path, service: Simulator, tmp_path: Path, notes: Path
) -> None:
    """What it had put into Airflow's database is loaded by this release, and ends its wait."""
    path, stored = _recorded_trigger(notes)
    batch_id = _batch(service, tmp_path)
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    quick = {"first_poll": 0.0, "poll_interval": 0.2, "deadline": later, "batch_id": batch_id}
    assert stored.keys() >= quick.keys()

    trigger = import_string(path)(**{**stored, **quick})
    events = [event async for event in trigger.run()]

    assert [event.payload for event in events] == [{"batch_id": batch_id, "status": "completed"}]


def test_progress_is_shown_while_the_task_is_deferred(
    airflow_home: Path, service: Simulator, tmp_path: Path
) -> None:
    """The XCom `progress` of a deferred task says what its batch has done."""
    service.add_faults({"fault": "stuck", "times": 1})
    batch_id = _batch(service, tmp_path)

    with _deferred(batch_id) as ti_id, _triggerer(tmp_path / "triggerer.log"):
        progress = wait_until("progress", PATIENCE, lambda: _shown(ti_id))
    service.release()

    assert progress["batch_id"] == batch_id
    assert progress["status"] == "in_progress"
    assert (progress["done"], progress["failed"], progress["total"]) == (0, 0, 1)


def _recorded_trigger(notes: Path) -> tuple[str, dict[str, Any]]:
    path, stored = json.loads(notes.read_text())["trigger"]
    return path, stored


def _batch(service: Simulator, folder: Path) -> str:
    """A batch of one request."""
    file = folder / "requests.jsonl"
    file.write_text(
        '{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", '
        '"body": {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "x"}]}}\n'
    )
    client = openai.OpenAI(api_key="sk-test", base_url=service.base_url)
    with file.open("rb") as stream:
        uploaded = client.files.create(file=stream, purpose="batch")
    made = client.batches.create(
        input_file_id=uploaded.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    return str(made.id)


@contextmanager
def _deferred(batch_id: str) -> Iterator[Any]:
    """A task instance that waits for the batch, as long as this lasts; its id."""
    from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db
    from airflow.models.dagbundle import DagBundleModel
    from airflow.models.dagrun import DagRun
    from airflow.models.serialized_dag import SerializedDagModel
    from airflow.models.trigger import Trigger
    from airflow.utils.session import create_session
    from airflow.utils.state import DagRunState, TaskInstanceState
    from airflow.utils.types import DagRunTriggeredByType, DagRunType
    from llm_batch.triggers import BatchTrigger

    bag = DagBag(f"{os.environ['AIRFLOW__CORE__DAGS_FOLDER']}/{OWN_DAG}.py")
    with create_session() as session:
        session.merge(DagBundleModel(name="trigger-tests"))
        session.flush()
        sync_bag_to_db(bag, "trigger-tests", None, session=session)
    trigger = BatchTrigger(
        conn_id="openai_default",
        batch_id=batch_id,
        deadline=(datetime.now(UTC) + timedelta(hours=1)).isoformat(),
        requests=1,
        first_poll=0.1,
        poll_interval=0.5,
    )
    with create_session() as session:
        dag = SerializedDagModel.get_dag(OWN_DAG, session=session)
        run = dag.create_dagrun(
            run_id="progress",
            logical_date=DAY,
            data_interval=(DAY, DAY),
            run_after=DAY,
            run_type=DagRunType.MANUAL,
            triggered_by=DagRunTriggeredByType.TEST,
            state=DagRunState.RUNNING,
            session=session,
        )
        ti = next(one for one in run.get_task_instances(session=session) if one.task_id == "wait")
        row = Trigger.from_object(trigger)
        session.add(row)
        session.flush()
        ti.state, ti.trigger_id = TaskInstanceState.DEFERRED, row.id
        ti.next_method, ti.next_kwargs = "execute_complete", {}
        ti.start_date = datetime.now(UTC)
        ti_id, run_id, trigger_id = ti.id, run.id, row.id
    try:
        yield ti_id
    finally:
        with create_session() as session:
            session.query(DagRun).filter_by(id=run_id).delete()
            session.query(Trigger).filter_by(id=trigger_id).delete()


@contextmanager
def _triggerer(log: Path) -> Iterator[None]:
    command = [sys.executable, "-m", "airflow", "triggerer", "--skip-serve-logs"]
    it = Component("triggerer", command, log, os.environ)
    it.start()
    try:
        yield
    finally:
        stop_all([it])


def _shown(ti_id: Any) -> Any:
    """What the XCom `progress` holds, while the task is still deferred."""
    from airflow.models.taskinstance import TaskInstance
    from airflow.models.xcom import XComModel
    from airflow.utils.session import create_session

    with create_session() as session:
        ti = session.query(TaskInstance).filter_by(id=ti_id).one()
        assert ti.state == "deferred"
        found = (
            session.query(XComModel)
            .filter_by(dag_id=ti.dag_id, run_id=ti.run_id, task_id="wait", key="progress")
            .one_or_none()
        )
        return found and XComModel.deserialize_value(found)

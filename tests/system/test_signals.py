"""What a run says while it goes and when it has ended, to people and to other DAGs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from include.local_stack.environment import OPENAI, PROJECT, simulator_connection
from include.local_stack.rest import FINAL_RUN_STATES, AirflowApiError, wait_until
from include.local_stack.stack import Stack
from include.run_note import SIGN
from include.simulator.process import Simulator
from include.source_tables import load_sample_tickets

pytestmark = [pytest.mark.system, pytest.mark.long]

JOB = "ticket_triage"
DOWNSTREAM = "after_labels"
DAY = datetime(2026, 11, 1, tzinfo=UTC)
PATIENCE = 400.0  # seconds


def documented_dag() -> str:
    """The downstream DAG that docs/signals.md shows."""
    text = (PROJECT / "docs" / "signals.md").read_text()
    return text.split("## Asset events")[1].split("```python\n")[1].split("```")[0]


@pytest.fixture
def stack(tmp_path: Path, simulator: Simulator) -> Iterator[Stack]:
    """A stack with one job and the DAG that waits for its asset."""
    dags = tmp_path / "dags"
    dags.mkdir()
    shutil.copy(PROJECT / "dags" / f"{JOB}.py", dags)
    (dags / f"{DOWNSTREAM}.py").write_text(documented_dag())
    env = {
        OPENAI: simulator_connection(simulator.base_url),
        "AIRFLOW__LLM_BATCH__FIRST_POLL": "2",
        "AIRFLOW__LLM_BATCH__POLL_INTERVAL": "2",
    }
    with Stack(tmp_path / "home", dags=dags, env=env) as running:
        load_sample_tickets(sa.create_engine(f"sqlite:///{running.home}/data/source.db"))
        for dag_id in (JOB, DOWNSTREAM):
            running.wait_for_dag(dag_id, PATIENCE)
            running.client.set_paused(dag_id, paused=False)
        yield running


@pytest.fixture
def simulator(tmp_path: Path) -> Iterator[Simulator]:
    with Simulator.start(tmp_path / "simulator") as running:
        yield running


def test_a_run_makes_itself_heard(stack: Stack, simulator: Simulator) -> None:
    """Progress while it is deferred, a note when it has ended, and a DAG that starts from it."""
    simulator.add_faults({"fault": "stuck", "times": 1})
    run_id = stack.client.trigger(
        JOB,
        logical_date=DAY + timedelta(days=1),
        interval=(DAY, DAY + timedelta(days=1)),
        conf={"sample": 0.2},
    )

    waiting = heard(stack, "progress", lambda: progress_while_deferred(stack, run_id))
    simulator.release()
    state = heard(stack, "the end of the run", lambda: final_state(stack, run_id))
    done = stack.client.xcom(JOB, run_id, "round_1.shard.wait", key="progress", index=0)
    report = stack.client.xcom(JOB, run_id, "report")
    note = heard(stack, "the note", lambda: note_of(stack, run_id))
    told = heard(stack, "the other DAG", lambda: told_downstream(stack))

    assert state == "success"
    assert waiting["status"] in {"validating", "in_progress", "finalizing"}
    assert (done["status"], done["done"], done["failed"]) == ("completed", done["total"], 0)
    assert waiting["batch_id"] == done["batch_id"]
    assert waiting["total"] == done["total"] == report["requests"] > 0
    assert note.startswith(f"{SIGN}{report['loaded']} of {report['rows']} rows loaded")
    assert told == {name: report[name] for name in ("interval_start", "loaded", "cost_usd")}


def heard(stack: Stack, what: str, probe: Callable[[], Any]) -> Any:
    """Wait for what `probe` finds, while SQLite may end a component of Airflow."""

    def found() -> Any:
        stack.keep_running()
        return probe()

    return wait_until(what, PATIENCE, found)


def final_state(stack: Stack, run_id: str) -> str | None:
    state = stack.client.run(JOB, run_id).state
    return state if state in FINAL_RUN_STATES else None


def progress_while_deferred(stack: Stack, run_id: str) -> Any:
    """The XCom `progress`, when it was there before its task went on."""
    try:
        found = stack.client.xcom(JOB, run_id, "round_1.shard.wait", key="progress", index=0)
    except AirflowApiError:
        return None
    state = stack.client.task_states(JOB, run_id).get("round_1.shard.wait[0]")
    assert state == "deferred"
    return found


def note_of(stack: Stack, run_id: str) -> Any:
    return stack.client.call("GET", f"/dags/{JOB}/dagRuns/{run_id}")["note"]


def told_downstream(stack: Stack) -> Any:
    """What the other DAG has been told of the day, as soon as a run of it has succeeded.

    The schedule begins a run of its own over yesterday, which has no tickets.
    """
    runs = stack.client.call("GET", f"/dags/{DOWNSTREAM}/dagRuns")["dag_runs"]
    ended = [run["dag_run_id"] for run in runs if run["state"] == "success"]
    told = [stack.client.xcom(DOWNSTREAM, run_id, "publish") for run_id in ended]
    return next((one for one in told if one["interval_start"] == DAY.isoformat()), None)

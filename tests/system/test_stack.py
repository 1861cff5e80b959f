"""The local stack starts, runs, survives the loss of a component, and leaves nothing behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path

import psutil
import pytest

from include.errors import ConfigurationError
from include.local_stack.backfill import (
    Days,
    How,
    cancel,
    hold,
    intervals_of,
    start_backfill,
    wait_for_runs,
)
from include.local_stack.component import ComponentDiedError, kill_marked, marked_processes
from include.local_stack.environment import PROJECT, is_port_free
from include.local_stack.rest import wait_until
from include.local_stack.stack import Stack

pytestmark = pytest.mark.system

DAG = """
from datetime import UTC, datetime

from airflow.sdk import DAG, CronDataIntervalTimetable, task

with DAG(
    "tiny",
    schedule=CronDataIntervalTimetable("@daily", timezone="UTC"),
    start_date=datetime(2026, 11, 1, tzinfo=UTC),
    catchup=False,
):

    @task
    def count(data_interval_start=None):
        return data_interval_start.day

    count()
"""
SLOW_DAG = """
import time
from datetime import datetime
from zoneinfo import ZoneInfo

from airflow.sdk import DAG, CronDataIntervalTimetable, task

with DAG(
    "slow",
    schedule=CronDataIntervalTimetable("@daily", timezone="Europe/Berlin"),
    start_date=datetime(2025, 11, 1, tzinfo=ZoneInfo("Europe/Berlin")),
    catchup=False,
):

    @task
    def wait():
        time.sleep(600)

    wait()
"""
DAYS = Days("tiny", date(2026, 11, 1), date(2026, 11, 2))
PATIENCE = 300.0  # seconds


@pytest.fixture(scope="module")
def dags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DAG folder with nothing of the product: one DAG that works and one that does not."""
    folder = tmp_path_factory.mktemp("dags")
    (folder / "tiny.py").write_text(DAG)
    (folder / "slow.py").write_text(SLOW_DAG)
    (folder / "broken.py").write_text("from airflow.sdk import DAG, nothing_of_this_name\n")
    return folder


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, dags: Path) -> Iterator[Stack]:
    """A running stack."""
    with Stack(tmp_path_factory.mktemp("stack"), dags=dags) as running:
        running.wait_for_dag("tiny", PATIENCE)
        yield running


def test_backfill_runs_every_day_again(stack: Stack) -> None:
    """A second backfill right after the first is not refused, and runs the same days again."""
    for _ in range(2):
        dates = start_backfill(stack.client, DAYS, {})
        runs = wait_for_runs(
            stack.client, "tiny", dates, seconds=PATIENCE, watch=lambda _runs: stack.keep_running()
        )

        assert [run.state for run in runs] == ["success", "success"]
    values = [stack.client.xcom("tiny", run.run_id, "count") for run in runs]
    assert values == [1, 2]


def test_an_interval_ends_where_the_next_begins(stack: Stack) -> None:
    """What a dry run counts is what runs work on: days of the schedule's own time zone."""
    stack.wait_for_dag("slow", PATIENCE)
    found = intervals_of(
        stack.client, Days("slow", date(2026, 3, 28), date(2026, 3, 30), "Europe/Berlin")
    )

    assert [f"{end:%d %H:%M}" for _, end in found] == ["28 23:00", "29 22:00", "30 22:00"]
    assert [f"{start:%d %H:%M}" for start, _ in found] == ["27 23:00", "28 23:00", "29 22:00"]


def test_a_backfill_is_paused_and_cancelled(stack: Stack) -> None:
    """Paused, it begins no other run; cancelled, those that run are ended as well."""
    client = stack.client
    stack.wait_for_dag("slow", PATIENCE)
    days = Days("slow", date(2026, 3, 1), date(2026, 3, 4), "Europe/Berlin")
    start_backfill(client, days, {}, How(max_active_runs=1, backwards=True))

    def states() -> list[str]:
        return [run.state for run in client.runs("slow", *days.bounds)]

    wait_until("a running run", PATIENCE, lambda: "running" in states())
    assert states() == ["queued", "queued", "queued", "running"]  # the last day is the first
    assert hold(client, "slow", paused=True) == 4
    (running,) = [run for run in client.runs("slow", *days.bounds) if run.state == "running"]
    client.mark_run("slow", running.run_id, "success")
    for _ in range(2):  # what begins before the first of them may have looked before the mark
        wait_for_heartbeat(stack, "scheduler", since=datetime.now(UTC))
    assert states() == ["queued", "queued", "queued", "success"]

    hold(client, "slow", paused=False)
    wait_until("the next run", PATIENCE, lambda: "running" in states())
    assert cancel(client, "slow") == 1
    assert states() == ["failed", "failed", "failed", "success"]
    assert not client.active_backfills("slow")


def wait_for_heartbeat(stack: Stack, component: str, *, since: datetime) -> None:
    """Wait until a component has gone through its loop."""

    def has_beaten() -> bool:
        stack.keep_running()
        report = stack.client.call("GET", "/monitor/health")[component]
        latest = report[f"latest_{component}_heartbeat"]
        return bool(latest) and datetime.fromisoformat(latest) > since

    wait_until(f"a heartbeat of the {component}", PATIENCE, has_beaten)


def test_broken_dag_is_reported_at_once(stack: Stack) -> None:
    """Waiting for a DAG whose file cannot be imported ends with the reason, not with a timeout."""
    with pytest.raises(ConfigurationError, match="nothing_of_this_name"):
        stack.wait_for_dag("broken", PATIENCE)


def test_only_the_loopback_interface_listens(stack: Stack) -> None:
    """No process of the stack can be reached from another machine."""
    listening = {
        address for process in marked_processes(stack.home) for address in _listening(process)
    }

    assert listening == {"127.0.0.1"}


def _listening(process: psutil.Process) -> set[str]:
    try:
        connections = process.net_connections()
    except psutil.NoSuchProcess:  # a task that has ended meanwhile
        return set()
    return {one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN}


def test_lost_component_is_noticed_and_comes_back(stack: Stack) -> None:
    """A killed triggerer is an error with its log, until it is started again."""
    triggerer = stack.components["triggerer"]
    triggerer.kill()

    with pytest.raises(ComponentDiedError, match="triggerer ended with exit code -9"):
        stack.check()
    began = datetime.now(UTC)
    stack.keep_running()
    wait_for_heartbeat(stack, "triggerer", since=began)
    assert triggerer.is_running


def test_second_stack_in_the_same_home_is_refused(stack: Stack, dags: Path) -> None:
    """Somebody's running stack is neither stopped nor doubled."""
    stack.keep_running()
    before = {name: one.pid for name, one in stack.components.items()}
    with pytest.raises(ConfigurationError, match="already runs"), Stack(stack.home, dags=dags):
        pass

    stack.wait_healthy()
    assert {name: one.pid for name, one in stack.components.items()} == before


OWNER = """
import sys
from pathlib import Path
from include.local_stack.stack import Stack

with Stack(Path(sys.argv[1]), dags=Path(sys.argv[2])):
    input()
"""


@contextmanager
def _starting_stack(home: Path, dags: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that starts a stack, and has started its components."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(home), str(dags)],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as owner:
        try:
            wait_until("started components", PATIENCE, (home / "stack.json").exists)
            yield owner
            owner.wait(PATIENCE)
        except BaseException:
            owner.kill()
            kill_marked(home)
            raise


def test_interrupt_leaves_nothing_behind(tmp_path: Path, dags: Path) -> None:
    """Ctrl-C while the components start stops all of them."""
    with _starting_stack(tmp_path, dags) as owner:
        before = marked_processes(tmp_path)
        owner.send_signal(signal.SIGINT)

    assert before
    assert owner.returncode != 0
    assert marked_processes(tmp_path) == []


def test_leftovers_of_a_killed_owner_are_cleared(tmp_path: Path, dags: Path) -> None:
    """After kill -9 of the owner, the next start ends what was left and begins anew."""
    with _starting_stack(tmp_path, dags) as owner:
        owner.kill()
    left = marked_processes(tmp_path)

    with Stack(tmp_path, dags=dags) as stack:
        assert left
        assert not [process for process in left if process.is_running()]
    assert marked_processes(tmp_path) == []
    assert is_port_free(stack.port)

"""What the command line can do: demo, up, backfill, redrive, load-commits, load-tickets, clean."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from include.errors import ConfigurationError
from include.job_spec import load_job
from include.local_stack.backfill import Days
from include.local_stack.component import kill_processes, marked_processes
from include.local_stack.databases import engine_of
from include.local_stack.environment import (
    LOOPBACK,
    OPENAI,
    PROJECT,
    SOURCE_DB,
    default_connections,
    jobs_root,
)
from include.local_stack.rest import AirflowClient
from include.local_stack.session import Session
from include.local_stack.showing import find_table
from include.local_stack.stack import Stack, home_lock, running_stack

DEFAULT_HOME = PROJECT / ".demo"
DEMO_TIMEOUT = 15 * 60.0  # seconds; with a simulator
API_TIMEOUT = 26 * 3600.0  # seconds; the real API may take a day
UI_PORT = 8080
WATCH_INTERVAL = 2.0  # seconds
# During a demo nobody edits a DAG file, and only the days that were asked for shall run.
DEMO_PACE = {
    "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "60",
    "AIRFLOW__SCHEDULER__USE_JOB_SCHEDULE": "False",
}
JOBS_SOURCE = "source_db"


@dataclass(frozen=True)
class Order:
    """A job, its days, and how to run it."""

    days: Days
    model: str | None
    home: Path
    redrive: bool = False  #: Send the failed rows of these days again, and only them.

    @property
    def conf(self) -> dict[str, Any]:
        """The params of the Airflow runs."""
        model = {"model": self.model} if self.model else {}
        return model | ({"redrive": True} if self.redrive else {})


def demo(order: Order) -> int:
    """Start everything, process the days, print the result, stop everything."""
    began = time.monotonic()
    # A mistake in the job folder is told before anything starts.
    load_job(order.days.job, jobs_root(os.environ))
    simulator = demo_simulator()
    _prepare(order.home)
    _say(f"Starting Airflow below {order.home} ({_api_name(simulator)}) ...")
    with Stack(order.home, simulator=simulator, env=DEMO_PACE) as stack:
        stack.wait_for_dag(order.days.job)
        _say(f"Airflow is up after {time.monotonic() - began:.0f} s: {stack.url}")
        whole = _session(stack, order.days.job).process(
            order.days,
            conf=order.conf,
            seconds=DEMO_TIMEOUT if simulator is not None else API_TIMEOUT,
            replace=True,
            keep_running=stack.keep_running,
        )
    _say(f"Stopped after {time.monotonic() - began:.0f} s.")
    return 0 if whole else 1


def up(home: Path, port: int = UI_PORT) -> int:
    """Start everything and stay until Ctrl-C."""
    simulator = demo_simulator()
    _prepare(home)
    _say(f"Starting Airflow below {home} ({_api_name(simulator)}) ...")
    with Stack(home, port=port, simulator=simulator) as stack:
        _say(f"Airflow is up: {stack.url}")
        _say("Nobody has to log in: whoever reaches this port of 127.0.0.1 is an admin.")
        _say("In another terminal: make backfill JOB=ticket_triage FROM=2026-11-01 TO=2026-11-07")
        _say("Ctrl-C stops it.")
        while True:
            time.sleep(WATCH_INTERVAL)
            stack.keep_running()


def backfill(order: Order) -> int:
    """Process days, or redrive them, on the stack that `up` started."""
    state = running_stack(order.home)
    session = Session.open(
        AirflowClient(state["url"]),
        order.days.job,
        caller_environment(order.home),
        logs=_task_logs(order.home),
        simulator_url=state["simulator_url"],
    )
    whole = session.process(order.days, conf=order.conf, seconds=API_TIMEOUT, replace=False)
    return 0 if whole else 1


def load_commits(home: Path, csv: Path) -> int:
    """Load a CSV file of commits into the source database."""
    from include import source_tables

    if not csv.is_file():
        raise ConfigurationError(f"{csv} is not a file: say CSV=path/to/commits.csv[.gz]")
    rows = source_tables.load_csv(engine_of(caller_environment(home), JOBS_SOURCE), csv, "commits")
    _say(f"{rows:,} commits are in table commits of {JOBS_SOURCE}.")
    return 0


def load_tickets(home: Path) -> int:
    """Load the sample tickets into the source database."""
    from include import source_tables

    source_tables.load_sample_tickets(engine_of(caller_environment(home), JOBS_SOURCE))
    _say(f"The sample tickets are in table tickets of {JOBS_SOURCE}.")
    return 0


def clean(home: Path) -> int:
    """Delete the home: databases, artifacts, logs and the simulator's memory."""
    if not home.exists():
        return 0
    if not (home / "secrets.json").exists() and any(home.iterdir()):
        raise ConfigurationError(f"{home} does not look like the home of a stack; not deleted")
    with home_lock(home):
        kill_processes(marked_processes(home))
        shutil.rmtree(home)
    _say(f"Deleted {home}.")
    return 0


def demo_simulator() -> tuple[str, ...] | None:
    """Arguments of the simulator; None when the caller brings an API of their own."""
    return None if os.environ.get(OPENAI) else ("--demo-faults",)


def caller_environment(home: Path) -> dict[str, str]:
    """The connections that a stack in `home` uses when started from here."""
    return {**default_connections(home), **os.environ}


def days_of(job: str, first: date, last: date) -> Days:
    """A checked range of days."""
    if last < first:
        raise ConfigurationError(f"the range ends ({last}) before it begins ({first})")
    return Days(job, first, last)


def _prepare(home: Path) -> None:
    """Put the sample tickets where the jobs read.

    A source database of the caller's own gets them only when it has no table of that name.
    """
    from include import source_tables

    source = engine_of(caller_environment(home), JOBS_SOURCE)
    if SOURCE_DB not in os.environ or find_table(source, "tickets") is None:
        source_tables.load_sample_tickets(source)


def _session(stack: Stack, job: str) -> Session:
    return Session.open(
        stack.client,
        job,
        stack.env,
        logs=_task_logs(stack.home),
        simulator_url=stack.simulator_url,
    )


def _task_logs(home: Path) -> Path:
    return home / "airflow" / "logs"


def _api_name(simulator: Mapping[str, str] | tuple[str, ...] | None) -> str:
    if simulator is None:
        return f"the API of {OPENAI}"
    return f"simulated API on {LOOPBACK}, no key, no cost"


def _say(text: str) -> None:
    print(text, flush=True)

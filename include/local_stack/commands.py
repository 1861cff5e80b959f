"""What the command line can do: demo, up, backfill, redrive, on-call, load-…, clean."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

from include.backfill_estimate import check_limit
from include.errors import ConfigurationError
from include.figures import counted
from include.job_spec import load_job
from include.local_stack import backfill as backfills
from include.local_stack.backfill import USUAL, Days, How
from include.local_stack.component import kill_marked
from include.local_stack.databases import engine_of
from include.local_stack.environment import (
    LOOPBACK,
    OPENAI,
    PROJECT,
    SOURCE_DB,
    default_connections,
    jobs_root,
    simulator_connection,
    stack_environment,
)
from include.local_stack.rest import AirflowClient
from include.local_stack.session import Session
from include.local_stack.stack import Stack, home_lock
from include.local_stack.stack_state import running_stack
from include.spend_limits import PARAM, SpendLimit

DEFAULT_HOME = PROJECT / ".demo"
DEMO_TIMEOUT = 15 * 60.0  # seconds; with a simulator
API_TIMEOUT = 26 * 3600.0  # seconds; the real API may take a day
UI_PORT = 8080
WATCH_INTERVAL = 2.0  # seconds
# Only the days that were asked for shall run.
DEMO_PACE = {"AIRFLOW__SCHEDULER__USE_JOB_SCHEDULE": "False"}
JOBS_SOURCE = "source_db"


@dataclass(frozen=True)
class Order:
    """A job, its days, and how to run it."""

    days: Days
    model: str | None
    home: Path
    redrive: bool = False  #: Send the failed rows of these days again, and only them.
    how: How = USUAL
    budget: Decimal | None = None  #: US dollars for all days together
    dry_run: bool = False

    @property
    def conf(self) -> dict[str, Any]:
        """The params of the Airflow runs."""
        conf: dict[str, Any] = {"model": self.model} if self.model else {}
        if self.redrive:
            conf["redrive"] = True
        if self.budget is not None:
            conf[PARAM] = SpendLimit(self.limit_name, self.budget).as_param()
        return conf

    @property
    def limit_name(self) -> str:
        """The name that the runs of these days share: the same range goes on with its budget."""
        return f"backfill {self.days.job} {self.days.first} {self.days.last}"


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
            in_timezone(stack.client, order.days),
            conf=order.conf,
            seconds=DEMO_TIMEOUT if simulator is not None else API_TIMEOUT,
            how=How(replace=True),
            keep_running=stack.keep_running,
        )
    _say(f"Stopped after {time.monotonic() - began:.0f} s.")
    return 0 if whole else 1


def up(home: Path, port: int = UI_PORT, database: str | None = None) -> int:
    """Start everything and stay until Ctrl-C; `database` is a URL for Airflow's metadata."""
    simulator = demo_simulator()
    _prepare(home)
    _say(f"Starting Airflow below {home} ({_api_name(simulator)}) ...")
    with Stack(home, port=port, simulator=simulator, database=database) as stack:
        _say(f"Airflow is up: {stack.url}")
        if stack.simulator_url:
            _say(f"Simulated API: {stack.simulator_url} (docs/rehearsal.md says how to break it)")
        _say("Nobody has to log in: whoever reaches this port of 127.0.0.1 is an admin.")
        _say("In another terminal: make backfill JOB=ticket_triage FROM=2026-11-01 TO=2026-11-07")
        _say("Ctrl-C stops it.")
        while True:
            time.sleep(WATCH_INTERVAL)
            stack.keep_running()


def backfill(order: Order) -> int:
    """Process days, or redrive them, on the stack that `up` started."""
    state = running_stack(order.home)
    client = AirflowClient(state["url"])
    session = Session.open(
        client,
        order.days.job,
        caller_environment(order.home),
        logs=_task_logs(order.home),
        simulator_url=state["simulator_url"],
    )
    order = replace(order, days=in_timezone(client, order.days))
    if order.dry_run or order.budget is not None:
        found = session.estimate(order.days, conf=order.conf, reprocess=order.how.reprocess)
        if order.budget is not None:
            check_limit(found, order.budget)
        if order.dry_run:
            return 0
    whole = session.process(order.days, conf=order.conf, seconds=API_TIMEOUT, how=order.how)
    return 0 if whole else 1


def change_backfill(home: Path, job: str, what: str) -> int:
    """Pause, resume or cancel the backfill of a job that runs on the stack of `up`."""
    client = AirflowClient(running_stack(home)["url"])
    if what == "cancel":
        ended = backfills.cancel(client, job)
        _say(
            f"The backfill of {job} is cancelled, {counted(ended, 'run')} ended, batches included. "
            "What they have done is kept: make backfill REPROCESS=failed goes on."
        )
        return 0
    left = backfills.hold(client, job, paused=what == "pause")
    state = "begins no more runs; those that run go on" if what == "pause" else "goes on"
    _say(f"The backfill of {job} {state}. {counted(left, 'run is', 'runs are')} not finished.")
    return 0


def in_timezone(client: AirflowClient, days: Days) -> Days:
    """The same days in Airflow's default time zone."""
    return replace(days, timezone=client.timezone(days.job))


def on_call(home: Path, arguments: Sequence[str]) -> int:
    """Run `python -m llm_batch` with the environment of the stack that `up` started."""
    state = running_stack(home)
    simulator = state["simulator_url"]
    extra = {} if simulator is None else {OPENAI: simulator_connection(f"{simulator}/v1")}
    port = int(state["url"].rpartition(":")[2])
    return subprocess.run(
        [sys.executable, "-m", "llm_batch", *arguments],
        env=stack_environment(home, port, database=state["database"], extra=extra),
        check=False,
    ).returncode


def load_commits(home: Path, csv: Path) -> int:
    """Load a CSV file of commits into the source database."""
    from include import source_tables

    if not csv.is_file():
        raise ConfigurationError(f"{csv} is not a file: say CSV=path/to/commits.csv[.gz]")
    rows = source_tables.load_csv(engine_of(caller_environment(home), JOBS_SOURCE), csv, "commits")
    _say(f"{counted(rows, 'commit is', 'commits are')} in table commits of {JOBS_SOURCE}.")
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
        kill_marked(home)
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
    """Put the sample tickets and reviews where the jobs read, unless that is the caller's own."""
    from include import source_tables

    if SOURCE_DB in os.environ:
        _say(f"{SOURCE_DB} is read as it is: no sample rows are written there.")
        return
    source = engine_of(caller_environment(home), JOBS_SOURCE)
    source_tables.load_sample_tickets(source)
    source_tables.load_sample_reviews(source)


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

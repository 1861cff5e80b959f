"""`python -m include.bench.year`: a backfill of many small days on a whole Airflow, in figures.

Airflow's own work is what a day costs here: the API is the simulator, a day has few rows. Metadata,
ledger, source and target are databases of a PostgreSQL server, made anew and removed afterwards.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import openai
import psutil  # type: ignore[import-untyped]
import sqlalchemy as sa

from include.artifacts import Artifacts
from include.audit import audit
from include.batch_api import BatchApi
from include.bench import postgres
from include.job_spec import JOBS_ROOT
from include.ledger import Ledger
from include.local_stack.backfill import Days, How, start_backfill, wait_for_runs
from include.local_stack.environment import JOBS, LEDGER_DB, RESULTS_DB, SOURCE_DB
from include.local_stack.rest import DagRun
from include.local_stack.session import simulator_bill
from include.local_stack.stack import Stack
from include.source_tables import TABLES

JOB = "ticket_triage"
LAST = date(2026, 10, 31)
PATIENCE = 6 * 3600.0  # seconds
TOLD_EVERY = 30.0  # seconds
NAMES = ("llm_batch_year_airflow", "llm_batch_year_data")
DAG = '''"""Airflow DAG of the measurement."""

from datetime import UTC, datetime

from llm_batch.dag import batch_dag

dag = batch_dag("ticket_triage", schedule="@daily", start_date=datetime(2020, 1, 1, tzinfo=UTC))
'''


@dataclass(frozen=True)
class Figures:
    """What the backfill came to."""

    days: int
    rows: int
    tasks: int
    batches: int
    seconds: float
    cpu_seconds: dict[str, float]
    ledger_bytes: int
    findings: int
    bill: dict[str, Any]
    states: dict[str, int]

    def __str__(self) -> str:
        """Lines for people."""
        minutes = self.seconds / 60
        cpu = ", ".join(f"{name} {spent:.0f}" for name, spent in self.cpu_seconds.items())
        size = f"{self.rows:,} rows, {self.batches} batches, {self.tasks:,} tasks"
        bill = f"{self.bill['requests']} paid answers in {self.bill['batches']} batches"
        lines = [
            f"{self.days} runs {self.states}: {size} in {minutes:.1f} minutes",
            f"{self.days / minutes:.1f} runs and {self.tasks / minutes:.0f} tasks a minute",
            f"CPU seconds: {cpu}",
            f"ledger: {self.ledger_bytes / self.days / 1000:.1f} KB a run",
            f"audit findings: {self.findings}; bill: {bill}",
        ]
        return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m include.bench.year", description=__doc__)
    parser.add_argument("--days", type=int, default=365)
    parser.add_argument("--rows", type=int, default=20, help="a day")
    parser.add_argument("--runs", type=int, default=12, help="at once")
    parser.add_argument("--slots", type=int, default=4, help="tasks at once")
    options = parser.parse_args(arguments)
    home = Path(tempfile.mkdtemp(prefix="llm-batch-year-"))
    with _databases() as (airflow, data):
        print(measure(home, airflow, data, options))
    shutil.rmtree(home)
    return 0


def measure(home: Path, airflow: sa.URL, data: sa.URL, options: argparse.Namespace) -> Figures:
    """Start everything, fill the source, backfill, and add up."""
    engine = sa.create_engine(data)
    days = Days(JOB, LAST - timedelta(days=options.days - 1), LAST)
    _fill(engine, days, options.rows)
    with _stack(home, airflow, data, options.slots) as stack:
        stack.wait_for_dag(JOB)
        began = time.monotonic()
        dates = start_backfill(stack.client, days, {}, How(max_active_runs=options.runs))
        runs = wait_for_runs(
            stack.client, JOB, dates, seconds=PATIENCE, watch=_Teller(stack, len(dates))
        )
        return _figures(stack, runs, engine, time.monotonic() - began)


def _stack(home: Path, airflow: sa.URL, data: sa.URL, slots: int) -> Stack:
    (home / "dags").mkdir()
    (home / "dags" / f"{JOB}.py").write_text(DAG)
    _write_job(home / "jobs" / JOB)
    connection = data.set(drivername="postgresql").render_as_string(hide_password=False)
    env = {
        "AIRFLOW__CORE__PARALLELISM": str(slots),
        "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "300",
        "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "1",  # Airflow's own: nobody waits
        JOBS: str(home / "jobs"),
        **dict.fromkeys((SOURCE_DB, RESULTS_DB, LEDGER_DB), connection),
    }
    database = airflow.set(drivername="postgresql+psycopg2").render_as_string(hide_password=False)
    return Stack(home, dags=home / "dags", database=database, env=env, simulator=())


def _write_job(folder: Path) -> None:
    """The sample job with one round: what a day costs at the least."""
    shutil.copytree(JOBS_ROOT / JOB, folder)
    text = (folder / "job.yaml").read_text("utf-8")
    (folder / "job.yaml").write_text(text.replace("{rounds: 3}", "{rounds: 1}"), "utf-8")


def _fill(engine: sa.Engine, days: Days, rows: int) -> None:
    table = TABLES["tickets"]
    key, moment, *texts = (column.name for column in table.columns)
    start, _ = days.bounds
    table.create(engine)
    with engine.begin() as connection:
        for day in range(days.count):
            at = start + timedelta(days=day, hours=9)
            found = [
                {key: f"t-{day:04d}-{row:03d}", moment: at}
                | {text: f"{text} of ticket {row} of day {day}" for text in texts}
                for row in range(rows)
            ]
            connection.execute(sa.insert(table), found)


class _Teller:
    """Says now and then how far it is, and keeps the components running."""

    def __init__(self, stack: Stack, count: int) -> None:
        self._stack, self._count, self._next = stack, count, 0.0

    def __call__(self, runs: list[DagRun]) -> None:
        self._stack.keep_running()
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + TOLD_EVERY
            done = sum(run.state == "success" for run in runs)
            print(f"{datetime.now(UTC):%H:%M:%S}  {done} of {self._count}", file=sys.stderr)


def _figures(stack: Stack, runs: list[DagRun], engine: sa.Engine, seconds: float) -> Figures:
    ledger = Ledger(engine)
    known = ledger.runs(limit=len(runs) + 1)
    api = BatchApi(openai.OpenAI(api_key="sk-bench", base_url=f"{stack.simulator_url}/v1"))
    artifacts = Artifacts(stack.home / "artifacts")
    findings = [
        found for run in known for found in audit(run.run_id, ledger, artifacts, engine, api)
    ]
    return Figures(
        days=len(runs),
        rows=sum(run.rows for run in known),
        tasks=_tasks(stack),
        batches=sum(len(ledger.batches(run.run_id)) for run in known),
        seconds=seconds,
        cpu_seconds={name: _cpu(one.pid) for name, one in stack.components.items()},
        ledger_bytes=_ledger_bytes(engine),
        findings=len(findings),
        bill=simulator_bill(str(stack.simulator_url)),
        states=dict(Counter(run.state for run in runs)),
    )


def _tasks(stack: Stack) -> int:
    engine = sa.create_engine(stack.env["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"])
    query = sa.text("SELECT count(*) FROM task_instance WHERE state = 'success'")
    with engine.connect() as connection:
        return int(connection.execute(query).scalar_one())


def _cpu(pid: int) -> float:
    """CPU seconds of a process, its children, and those that have ended and been waited for."""
    total = 0.0
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                total += sum(one.cpu_times()[:4])
    return total


def _ledger_bytes(engine: sa.Engine) -> int:
    query = sa.text(
        "SELECT coalesce(sum(pg_total_relation_size(oid)), 0) FROM pg_class "
        "WHERE relkind = 'r' AND relname LIKE 'llm_batch_%'"
    )
    with engine.connect() as connection:
        return int(connection.execute(query).scalar_one())


@contextmanager
def _databases() -> Iterator[tuple[sa.URL, sa.URL]]:
    """Yield two new databases of the bench's server."""
    server = sa.make_url(os.environ.get(postgres.SERVER, postgres.DEFAULT))
    server = server.set(drivername="postgresql+psycopg")
    admin = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    own = [f"{name}_{os.getpid()}" for name in NAMES]
    with admin.connect() as connection:
        for name in own:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
    try:
        yield server.set(database=own[0]), server.set(database=own[1])
    finally:
        with admin.connect() as connection:
            for name in own:
                connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
        admin.dispose()


if __name__ == "__main__":
    sys.exit(main())

"""`python -m include.bench.pages`: how fast the UI's pages answer over a full ledger.

A real API server over HTTP on this machine, and a ledger with 5,000 batches and 1,000,000 requests,
on SQLite and, where there is one, on PostgreSQL. Milliseconds from the request to the last byte.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import sqlalchemy as sa

from include.bench import postgres
from include.bench.full_ledger import Size, fill
from include.local_stack.component import stop_all
from include.local_stack.environment import LEDGER_DB, sqlite_connection
from include.local_stack.rest import wait_until
from include.local_stack.stack import Stack

LIMIT = 300.0  # milliseconds, for the page over all jobs
PAGES = {"all jobs": "/llm-batch/jobs", "one DAG": "/llm-batch/dag?dag_id=job_00"}
START_TIMEOUT = 120.0  # seconds
DAGS = """
from datetime import datetime
from airflow.sdk import DAG
for number in range({jobs}):
    dag = DAG(f"job_{{number:02d}}", start_date=datetime(2026, 1, 1), schedule=None)
    globals()[dag.dag_id] = dag
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when the page over all jobs is slower than it may be."""
    parser = argparse.ArgumentParser(prog="python -m include.bench.pages", description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="how often each page is asked for")
    options = parser.parse_args(arguments)
    size = Size()
    print(f"{size.batches:,} batches, {size.batches * size.requests:,} requests in the ledger")
    print(f"{'ledger':<12}{'page':<10}{'median ms':>10}{'slowest ms':>12}{'KB':>6}")
    slowest = 0.0
    with tempfile.TemporaryDirectory(prefix="llm-batch-pages-") as folder:
        for name, ledger, connection in _ledgers(Path(folder), size):
            with _server(Path(folder) / name, connection, size) as url:
                for page, path in PAGES.items():
                    times, kilobytes = _measured(url + path, options.runs)
                    print(
                        f"{name:<12}{page:<10}{median(times):>10.0f}{max(times):>12.0f}"
                        f"{kilobytes:>6.0f}"
                    )
                    slowest = max(slowest, median(times))
            ledger.dispose()
    return int(slowest > LIMIT)


def _ledgers(folder: Path, size: Size) -> Iterator[tuple[str, sa.Engine, str]]:
    """Yield a full ledger on each database: its name, engine and Airflow connection."""
    path = folder / "ledger.db"
    engine = sa.create_engine(f"sqlite:///{path}")
    fill(engine, size)
    yield "SQLite", engine, sqlite_connection(path)
    if why := postgres.create():
        print(f"PostgreSQL is left out: {why}", file=sys.stderr)
        return
    try:
        engine = postgres.engine()
        fill(engine, size)
        yield "PostgreSQL", engine, _postgres_connection(engine.url)
    finally:
        postgres.drop()


def _postgres_connection(url: sa.URL) -> str:
    parts = {
        "conn_type": "postgres",
        "host": url.host,
        "port": url.port,
        "login": url.username,
        "password": url.password,
        "schema": url.database,
    }
    return json.dumps({name: value for name, value in parts.items() if value is not None})


@contextmanager
def _server(home: Path, connection: str, size: Size) -> Iterator[str]:
    """Yield the address of an API server that knows the DAGs of the ledger's jobs."""
    dags = home / "dags"
    dags.mkdir(parents=True)
    (dags / "jobs.py").write_text(DAGS.format(jobs=size.jobs))
    env: Mapping[str, str] = {LEDGER_DB: connection}
    stack = Stack(home, dags=dags, env=env)
    (home / "airflow").mkdir(parents=True, exist_ok=True)
    stack.airflow("db", "migrate")
    stack.airflow("dags", "reserialize")
    server = stack.components["api-server"]
    server.start()
    try:
        wait_until("the API server", START_TIMEOUT, lambda: _answers(f"{stack.url}/api/v2/version"))
        yield stack.url
    finally:
        stop_all([server])


def _measured(url: str, runs: int) -> tuple[list[float], float]:
    """Return milliseconds of each answer after a first one, and the size of the last."""
    kilobytes = 0.0
    times = []
    for _ in range(runs + 1):
        before = time.perf_counter()
        kilobytes = len(_read(url)) / 1_000
        times.append((time.perf_counter() - before) * 1_000)
    return times[1:], kilobytes


def _answers(url: str) -> bool:
    try:
        return bool(_read(url))
    except OSError:
        return False


def _read(url: str) -> bytes:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=60) as answer:  # an address of our own
        body: bytes = answer.read()
    return body


if __name__ == "__main__":
    sys.exit(main())

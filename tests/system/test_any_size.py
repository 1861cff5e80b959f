"""A partition of any size goes through the real Airflow in the same little memory.

Run by `make size ROWS=2000000`; it takes minutes, or hours, so no other command does.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
import sqlalchemy as sa

from include.ledger import Ledger
from include.local_stack.environment import (
    LEDGER_DB,
    OPENAI,
    RESULTS_DB,
    SOURCE_DB,
    simulator_connection,
    sqlite_connection,
)
from include.local_stack.stack import Stack
from include.simulator.process import Simulator
from tests.system.postgres_server import PostgresServer

pytestmark = [pytest.mark.system, pytest.mark.long, pytest.mark.size]

ROWS = int(os.environ.get("LLM_BATCH_TEST_ROWS", "120000"))
JOB = "many_notes"
DAY = datetime(2026, 11, 1, tzinfo=UTC)
SECONDS = 120 + ROWS / 1_000
PEAK = re.compile(r"Peak memory of this task's process: (\d+) MB")
MOST_MEMORY = 400  # MB
JOB_FILES = {
    "job.yaml": """
source: {conn_id: source_db, sql: rows.sql, key: [note_id]}
request:
  endpoint: /v1/chat/completions
  model: gpt-4o-mini
  prompt: prompt.md
  output_schema: output.schema.json
  params: {max_completion_tokens: 200}
target: {conn_id: results_db, table: note_labels}
""",
    "rows.sql": "SELECT note_id, body FROM notes WHERE written_at >= :interval_start"
    " AND written_at < :interval_end ORDER BY note_id",
    "prompt.md": "Label the note.\n---\n{{ body }}",
    "output.schema.json": '{"type": "object", "properties": {"urgent": {"type": "boolean"}},'
    ' "required": ["urgent"], "additionalProperties": false}',
}
DAG = f"""
from datetime import UTC, datetime
from llm_batch.dag import batch_dag

# the words airflow and DAG make Airflow look into this file
dag = batch_dag("{JOB}", schedule="@daily", start_date=datetime(2026, 11, 1, tzinfo=UTC))
"""
TEXT = "'The parcel ' || n || ' came late 遅い 🙂 and nobody answers the telephone.'"
FILL = {
    "sqlite": "WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers"
    " WHERE n < {rows}) INSERT INTO notes SELECT 'n' || printf('%08d', n),"
    " '2026-11-01T12:00:00+00:00', {text} FROM numbers",
    "postgresql": "INSERT INTO notes SELECT 'n' || lpad(n::text, 8, '0'),"
    " '2026-11-01T12:00:00+00:00', {text} FROM generate_series(1, {rows}) n",
}
FAULTS = [{"fault": "line_error", "status": 500, "fraction": 0.01, "first_times": 1}]


@pytest.fixture(params=["sqlite", "postgresql"])
def databases(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str | None, str, sa.Engine]:
    """Airflow's database (None: its own SQLite), the connection for the rest, and its engine."""
    if request.param == "sqlite":
        file = tmp_path / "data.db"
        return None, sqlite_connection(file), sa.create_engine(f"sqlite:///{file}")
    server: PostgresServer = request.getfixturevalue("database")
    return server.airflow_url, server.airflow_connection, sa.create_engine(server.url)


@pytest.fixture
def simulator(tmp_path: Path) -> Iterator[Simulator]:
    """A server that answers at once, but for the faults."""
    with Simulator.start(tmp_path / "simulator", instant=True, faults=FAULTS) as running:
        yield running


def test_memory_does_not_grow_with_the_rows(
    tmp_path: Path, databases: tuple[str | None, str, sa.Engine], simulator: Simulator
) -> None:
    """Every row ends once, at the price of the bill, and no task takes more than 400 MB."""
    metadata, connection, engine = databases
    _fill(engine)
    _write_job(tmp_path)
    home = tmp_path / "home"
    env = {
        "AIRFLOW__LLM_BATCH__JOBS": str(tmp_path / "jobs"),
        "AIRFLOW__LLM_BATCH__FIRST_POLL": "2",
        "AIRFLOW__LLM_BATCH__POLL_INTERVAL": "2",
        OPENAI: simulator_connection(simulator.base_url),
        **dict.fromkeys((SOURCE_DB, RESULTS_DB, LEDGER_DB), connection),
    }

    with Stack(home, database=metadata, dags=tmp_path / "dags", env=env) as stack:
        stack.wait_for_dag(JOB)
        stack.client.set_paused(JOB, paused=False)
        began = time.monotonic()
        run_id = stack.client.trigger(
            JOB, logical_date=DAY + timedelta(hours=30), interval=(DAY, DAY + timedelta(days=1))
        )
        dag_run = stack.client.wait_for_run(JOB, run_id, seconds=SECONDS)
    seconds = time.monotonic() - began

    assert dag_run.state == "success"
    peaks = _peaks(home / "airflow" / "logs")
    ledger = Ledger(engine)
    (run,) = (one for one in ledger.runs() if one.interval_start == DAY)
    bill = simulator.bill()
    print(
        f"{engine.dialect.name}: {ROWS:,} rows, {bill['batches']} batches, "
        f"{len(ledger.rounds(run.run_id))} rounds, {seconds:.0f} s, "
        f"peak {max(peaks.values())} MB in {max(peaks, key=lambda task: peaks[task])}"
    )
    assert len(ledger.rounds(run.run_id)) == 2
    assert (run.rows, run.loaded + run.failed) == (ROWS, ROWS)
    assert _count(engine, "note_labels") + _count(engine, "note_labels_failures") == ROWS
    assert run.cost_usd == Decimal(bill["cost_usd"])
    assert bill["requests"] == ROWS  # as many answers were paid for as there are rows
    assert bill["error_lines"] > 0
    assert max(peaks.values()) <= MOST_MEMORY, peaks


def _fill(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE IF EXISTS notes")
        connection.exec_driver_sql("CREATE TABLE notes (note_id TEXT, written_at TEXT, body TEXT)")
        connection.exec_driver_sql(FILL[engine.dialect.name].format(rows=ROWS, text=TEXT))


def _write_job(folder: Path) -> None:
    job = folder / "jobs" / JOB
    shutil.rmtree(job, ignore_errors=True)
    job.mkdir(parents=True)
    for name, text in JOB_FILES.items():
        (job / name).write_text(text, encoding="utf-8")
    (folder / "dags").mkdir()
    (folder / "dags" / f"{JOB}.py").write_text(DAG)


def _peaks(logs: Path) -> dict[str, int]:
    """The most memory that each task has logged, in MB."""
    return {
        str(path.relative_to(logs)): max(map(int, found))
        for path in logs.rglob("*.log")
        if (found := PEAK.findall(path.read_text(encoding="utf-8", errors="replace")))
    }


def _count(engine: sa.Engine, table: str) -> int:
    with engine.connect() as connection:
        return int(connection.scalar(sa.select(sa.func.count()).select_from(sa.table(table))) or 0)

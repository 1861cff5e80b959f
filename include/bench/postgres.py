"""A database of the bench's own on a PostgreSQL server, and what the server's work costs."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Engine

SERVER = "LLM_BATCH_BENCH_POSTGRES"
DEFAULT = "postgresql://root@127.0.0.1:5432/postgres"
DATABASE = "llm_batch_bench"
PROCESSES = sa.text(
    "SELECT pid FROM pg_stat_activity WHERE datname = current_database() "
    "OR (datname IS NULL AND backend_type IN ('checkpointer', 'background writer', 'walwriter'))"
)


def engine() -> Engine:
    """Return an engine for the bench's database."""
    return sa.create_engine(_server().set(database=DATABASE), connect_args={"connect_timeout": 3})


def create() -> str | None:
    """Create an empty database; return why there is none, or None."""
    try:
        _admin(f"DROP DATABASE IF EXISTS {DATABASE} WITH (FORCE)")
        _admin(f"CREATE DATABASE {DATABASE}")
    except sa.exc.SQLAlchemyError as error:
        return f"{_server().host}: {type(error).__name__}; {SERVER} names another server"
    return None


def drop() -> None:
    """Remove the database."""
    with suppress(sa.exc.SQLAlchemyError):
        _admin(f"DROP DATABASE IF EXISTS {DATABASE} WITH (FORCE)")


class ServerCpu:
    """CPU seconds of the server's processes that work for the bench; 0 when they are remote.

    `engine` must keep the connection that did the work in its pool.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._first: dict[int, float] = {}

    def __call__(self) -> float:
        """Return what they have spent since the first call."""
        with self._engine.connect() as connection:
            pids = connection.scalars(PROCESSES).all()
        now = {pid: _seconds(pid) for pid in pids}
        if not self._first:
            self._first = now
        # A connection that was opened since began at 0.
        return sum(spent - self._first.get(pid, 0.0) for pid, spent in now.items())


def _seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _server() -> sa.URL:
    return sa.make_url(os.environ.get(SERVER, DEFAULT)).set(drivername="postgresql+psycopg")


def _admin(statement: str) -> None:
    admin = sa.create_engine(
        _server(), isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": 3}
    )
    with admin.connect() as connection:
        connection.exec_driver_sql(statement)
    admin.dispose()

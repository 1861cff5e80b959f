"""The database behind the ledger: how its transactions begin, and its migrations.

SQLite and PostgreSQL go through the same code. On SQLite a write transaction takes the lock at
its first statement (`BEGIN IMMEDIATE`) and waits for others, so that two tasks never deadlock.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import tenacity
from sqlalchemy.engine import Connection, Engine

from include.database_errors import first_line, is_configuration
from include.errors import ConfigurationError, TransientError

MIGRATIONS = Path(__file__).parent / "migrations"
HEAD = "0011"  # the newest migration; the test suite compares it with the files
SQLITE_BUSY = 60_000  # milliseconds to wait for another writer
RIGHTS = (
    "Its user needs to connect, to create tables in its schema (USAGE and CREATE), and to own the "
    "tables llm_batch_… or hold SELECT, INSERT, UPDATE and DELETE on them and USAGE on their "
    "sequences. Grant that, or correct the connection, then clear this task: nothing was lost."
)
UNMOUNTED = "unable to open database"  # SQLite: its folder is not there; a disk may come back
LOCK_KEY = 7_316_640_211  # PostgreSQL advisory lock of this ledger


def prepare(engine: Engine) -> Engine:
    """Return `engine`, set up so that several tasks can write at once."""
    if engine.dialect.name == "sqlite" and not sa.event.contains(engine, "begin", _begin_sqlite):
        sa.event.listen(engine, "connect", _connect_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _connect_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver must not open transactions of its own
    connection.execute(f"PRAGMA busy_timeout={SQLITE_BUSY}")
    _use_wal(connection)
    connection.execute("PRAGMA synchronous=FULL")


@tenacity.retry(
    retry=tenacity.retry_if_exception_message(match="database is locked"),
    wait=tenacity.wait_random(0.002, 0.05),
    stop=tenacity.stop_after_delay(SQLITE_BUSY / 1000),
    reraise=True,
)
def _use_wal(connection: Any) -> None:
    """Set the journal of a file; of several who are the first, SQLite lets none wait for it."""
    connection.execute("PRAGMA journal_mode=WAL")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("ledger_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Yield a connection that only reads."""
    with translated(), engine.connect() as connection:
        yield connection


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """Yield a connection whose changes are committed together, or not at all."""
    with (
        translated(),
        engine.connect().execution_options(ledger_writes=True) as connection,
        connection.begin(),
    ):
        yield connection


@contextmanager
def translated() -> Iterator[None]:
    """Turn what the database says into errors of this project, without its SQL parameters.

    One that is away or busy is a `TransientError`, a right that is missing a `ConfigurationError`.
    """
    try:
        yield
    except sa.exc.DBAPIError as error:
        if is_configuration(error) and UNMOUNTED not in first_line(error):
            raise ConfigurationError(f"{_refused(error)} {RIGHTS}") from None
        if not isinstance(error, sa.exc.OperationalError):
            raise
        raise TransientError(
            f"The ledger database did not answer: {first_line(error)}. Nothing was lost; the "
            "task's next try goes on from the last committed step. Check the connection "
            "llm_batch_db."
        ) from None


def _refused(error: sa.exc.DBAPIError) -> str:
    return f"The ledger database (connection llm_batch_db) refused: {first_line(error)}."


def exclusive(connection: Connection) -> None:
    """Hold the ledger's lock until the transaction ends (SQLite has taken it already)."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK_KEY})


def version(connection: Connection) -> str | None:
    """Return the newest migration that has been applied; None for an empty database."""
    if not sa.inspect(connection).has_table("llm_batch_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM llm_batch_version")).scalar()


def check(engine: Engine) -> None:
    """Raise `ConfigurationError` unless the ledger is at `HEAD`; changes nothing.

    For people who look: a checkout on somebody's desk must not upgrade the ledger of workers that
    run an older release.
    """
    with reading(prepare(engine)) as connection:
        found = version(connection)
    _refuse_newer(found)
    if found != HEAD:
        raise ConfigurationError(
            f"The ledger is at migration {found or 'none'}, this release needs {HEAD}. When this "
            "is the release that the workers run, say `python -m llm_batch migrate`."
        )


def migrate(engine: Engine) -> None:
    """Bring the ledger to `HEAD`; several tasks may call it at once.

    Raises `ConfigurationError` when the database was migrated by a newer release.
    """
    with reading(engine) as connection:
        if version(connection) == HEAD:
            return
    with writing(engine) as connection:
        exclusive(connection)
        found = version(connection)
        if found == HEAD:
            return
        _refuse_newer(found)
        upgrade(connection)


def _refuse_newer(found: str | None) -> None:
    if found is not None and found > HEAD:
        raise ConfigurationError(
            f"The ledger is at migration {found}, this release knows {HEAD}. "
            "Run the newer release again, or restore the ledger from before the upgrade."
        )


def upgrade(connection: Connection, to: str = "head") -> None:
    """Apply every migration up to `to` inside the transaction of `connection`."""
    # Alembic is needed only here, once per release: importing it costs every task 0.1 s.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, to)

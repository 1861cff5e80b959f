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
from sqlalchemy.engine import Connection, Engine

from include.errors import ConfigurationError, TransientError

MIGRATIONS = Path(__file__).parent / "migrations"
HEAD = "0001"  # the newest migration; the test suite compares it with the files
SQLITE_BUSY = 60_000  # milliseconds to wait for another writer
LOCK_KEY = 7_316_640_211  # PostgreSQL advisory lock of this ledger


def prepare(engine: Engine) -> Engine:
    """Return `engine`, set up so that several tasks can write at once."""
    if engine.dialect.name == "sqlite" and not sa.event.contains(engine, "begin", _begin_sqlite):
        sa.event.listen(engine, "connect", _connect_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _connect_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver must not open transactions of its own
    for pragma in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={SQLITE_BUSY}"):
        connection.execute(f"PRAGMA {pragma}")


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
    """Turn a database that is away or busy into `TransientError`, without its SQL parameters."""
    try:
        yield
    except sa.exc.OperationalError as error:
        first_line = str(error.orig).splitlines()[0] if error.orig else type(error).__name__
        raise TransientError(
            f"The ledger database did not answer: {first_line}. Nothing was lost; the task's next "
            "try goes on from the last committed step. Check the connection llm_batch_db."
        ) from None


def exclusive(connection: Connection) -> None:
    """Hold the ledger's lock until the transaction ends (SQLite has taken it already)."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK_KEY})


def version(connection: Connection) -> str | None:
    """Return the newest migration that has been applied; None for an empty database."""
    if not sa.inspect(connection).has_table("llm_batch_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM llm_batch_version")).scalar()


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
        if found is not None and found > HEAD:
            raise ConfigurationError(
                f"The ledger is at migration {found}, this release knows {HEAD}. "
                "Run the newer release again, or restore the ledger from before the upgrade."
            )
        _upgrade(connection)


def _upgrade(connection: Connection) -> None:
    # Alembic is needed only here, once per release: importing it costs every task 0.1 s.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")

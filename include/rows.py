r"""Extract: the rows of one partition, streamed from a database into a snapshot.

`rows.sql` sees `:interval_start` and `:interval_end`. Both are bound as ISO 8601 text in UTC, such
as `2026-11-01T00:00:00Z`, on every database. SQLite compares it as text, so a text column must be
written in the same form (else compare `datetime(column)` with `datetime(:interval_start)`).
PostgreSQL reads an untyped text as the type of what it is compared with, so the same SQL serves
`timestamptz`, `timestamp` and text columns; in arithmetic write
`CAST(:interval_start AS timestamptz)`.

Types: see `include.column_types`. Memory: `ROWS_PER_FETCH` rows and one row group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, cast

from sqlalchemy import Connection, CursorResult, Engine, text
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from include.artifacts import Artifacts
from include.column_types import declared_type
from include.errors import ConfigurationError, LLMBatchError, TransientError
from include.extraction import Extraction, extraction
from include.interval import interval_text
from include.job_spec import JobSpec
from include.snapshot import Snapshot

ROWS_PER_FETCH = 1_000
# PostgreSQL error classes whose message names SQL and objects, never a value of a row.
_SAFE_CLASSES = ("3D", "3F", "42", "25")
_SQLITE_TEMPORARY = ("locked", "busy")


def extract_sql(
    engine: Engine,
    spec: JobSpec,
    interval_start: datetime,
    interval_end: datetime,
    *,
    artifacts: Artifacts,
    directory: str,
) -> Snapshot:
    """Copy the rows of [interval_start, interval_end) into a snapshot under `directory`.

    The file is named by its content, so extracting again never changes what a round has read.
    Raises `ConfigurationError` when the SQL is refused or lacks a column that the job needs, and
    `TransientError` when the database cannot be reached or is busy.
    """
    interval = {"interval_start": interval_start, "interval_end": interval_end}
    with extraction(spec) as found:
        with (
            _database_errors(spec),
            _connection(engine) as connection,
            _execute(connection, spec, interval) as result,  # an open cursor locks SQLite
        ):
            _copy(found, result)
        return found.publish(artifacts, directory)


def _copy(found: Extraction, result: CursorResult[Any]) -> None:
    """Stream the rows of `result` into the snapshot."""
    names = tuple(result.keys())
    cursor = result.cursor
    codes = [item[1] for item in cursor.description or ()] if cursor else [None] * len(names)
    dialect = result.dialect.name
    found.begin(names, [declared_type(dialect, code) for code in codes])
    for rows in result.partitions(ROWS_PER_FETCH):
        found.add(rows)


def _execute(
    connection: Connection, spec: JobSpec, interval: dict[str, datetime]
) -> CursorResult[Any]:
    """Run rows.sql with a server-side cursor."""
    statement = text(spec.source.sql.strip().rstrip(";"))
    used = {name: interval_text(interval[name]) for name in statement._bindparams}  # noqa: SLF001
    result = connection.execution_options(stream_results=True, yield_per=ROWS_PER_FETCH).execute(
        statement, used
    )
    if not result.returns_rows:
        raise ConfigurationError(
            f"{spec.name}: {spec.source.sql_file} returns no columns; it must be one SELECT."
        )
    return result


@contextmanager
def _connection(engine: Engine) -> Iterator[Connection]:
    """Yield a connection that can only read, and reads text that is not UTF-8 without failing."""
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            yield connection.execution_options(postgresql_readonly=True)
            return
        if engine.dialect.name != "sqlite":
            yield connection
            return
        raw = cast("Any", connection.connection.dbapi_connection)
        factory, raw.text_factory = raw.text_factory, _lenient_text
        raw.execute("PRAGMA query_only = ON")
        try:
            yield connection
        finally:
            raw.execute("PRAGMA query_only = OFF")
            raw.text_factory = factory


def _lenient_text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")


@contextmanager
def _database_errors(spec: JobSpec) -> Iterator[None]:
    """Turn the driver's errors into ours; a message that could hold a value is left out."""
    try:
        yield
    except LLMBatchError:
        raise
    except DBAPIError as error:
        raise _translated(spec, error) from None
    except SQLAlchemyError as error:
        raise ConfigurationError(
            f"{spec.name}: {spec.source.sql_file} cannot be run: {type(error).__name__}."
        ) from None


def _translated(spec: JobSpec, error: DBAPIError) -> LLMBatchError:
    name = type(error.orig).__name__
    state = getattr(error.orig, "pgcode", None) or getattr(error.orig, "sqlstate", None)
    first_line = str(error.orig).partition("\n")[0]
    where = f"{spec.name}: {spec.source.sql_file} on connection {spec.source.conn_id}"
    if _is_sqlite(error):
        if any(word in first_line for word in _SQLITE_TEMPORARY):
            return TransientError(f"{where}: the database is busy: {first_line}.")
        return ConfigurationError(f"{where} was refused: {first_line}.")
    if state is None and isinstance(error, OperationalError):
        return TransientError(f"{where}: the database cannot be reached: {first_line}.")
    if state is not None and state[:2] in ("08", "53", "57", "40"):
        return TransientError(f"{where}: the database could not answer now ({name}, {state}).")
    shown = first_line if (state or "").startswith(_SAFE_CLASSES) else "message withheld"
    return ConfigurationError(f"{where} was refused: {shown} ({name}, {state}).")


def _is_sqlite(error: DBAPIError) -> bool:
    return type(error.orig).__module__.startswith("sqlite3")

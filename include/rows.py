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

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from hashlib import file_digest
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import Connection, CursorResult, Engine, text
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

from include.arrow_columns import integer_array, text_array
from include.artifacts import Artifacts
from include.column_types import declared_type
from include.duplicate_keys import DuplicateKeys, Rows
from include.errors import ConfigurationError, LLMBatchError, TransientError
from include.job_spec import JobSpec, check_columns
from include.row_identity import as_text, key_digest, key_json
from include.snapshot import REJECTIONS_SCHEMA, Snapshot, SnapshotWriter

ROWS_PER_FETCH = 1_000
REJECTIONS_PER_GROUP = 100_000
DIGEST_CHARACTERS = 16  # of the content digest in a file name
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
    with tempfile.TemporaryDirectory(prefix="llm-batch-") as folder:
        with DuplicateKeys(Path(folder)) as keys:
            with (
                _database_errors(spec),
                _connection(engine) as connection,
                _execute(connection, spec, interval) as result,  # an open cursor locks SQLite
            ):
                found = _copy(result, spec, Path(folder), keys)
            rejections = found.rejections(keys)
        return _publish(found, rejections, artifacts, directory)


@dataclass
class _Extraction:
    """What has been seen of the rows so far."""

    writer: SnapshotWriter
    columns: tuple[str, ...]
    rows: int = 0
    unsampled: int = 0
    null_keys: list[int] = field(default_factory=list)
    bad_texts: list[int] = field(default_factory=list)
    duplicate_keys: int = 0

    def rejections(self, keys: DuplicateKeys) -> tuple[Rows, list[str], Rows]:
        """Return (rows, reasons, source rows) of everything that cannot become a request."""
        shared, counts = keys.find()
        null_keys = np.array(self.null_keys, dtype=np.int64)
        bad_texts = np.array(self.bad_texts, dtype=np.int64)
        alone = np.setdiff1d(np.union1d(null_keys, bad_texts), shared, assume_unique=True)
        rows = np.concatenate([shared, alone])
        order = np.argsort(rows)
        rows, sources = rows[order], np.concatenate([counts, np.ones_like(alone)])[order]
        is_null, is_shared = np.isin(rows, null_keys), np.isin(rows, shared)
        reasons = np.where(is_null, "null_key", np.where(is_shared, "duplicate_key", "bad_text"))
        self.duplicate_keys = int(np.count_nonzero((sources > 0) & is_shared & ~is_null))
        return rows, reasons.tolist(), sources


def _copy(
    result: CursorResult[Any], spec: JobSpec, folder: Path, keys: DuplicateKeys
) -> _Extraction:
    """Stream the rows of `result` into a snapshot file."""
    names = tuple(result.keys())
    check_columns(spec, names)
    cursor = result.cursor
    codes = [item[1] for item in cursor.description or ()] if cursor else [None] * len(names)
    dialect = result.dialect.name
    writer = SnapshotWriter(folder, names, [declared_type(dialect, code) for code in codes])
    found = _Extraction(writer, names)
    key_positions = [names.index(name) for name in spec.source.key]
    for rows in result.partitions(ROWS_PER_FETCH):
        _add(found, rows, key_positions, spec.sample, keys)
    writer.close()
    return found


def _add(
    found: _Extraction,
    rows: Sequence[Sequence[Any]],
    key_positions: list[int],
    sample: Decimal,
    keys: DuplicateKeys,
) -> None:
    """Append the sampled ones of `rows`, and note their keys."""
    texts = [
        [None if row[at] is None else as_text(row[at]) for at in key_positions] for row in rows
    ]
    digests = [key_digest(_key_bytes(key)) for key in texts]
    if sample < 1:
        taken = [at for at, digest in enumerate(digests) if in_sample(digest, sample)]
        found.unsampled += len(rows) - len(taken)
        rows, texts = [rows[at] for at in taken], [texts[at] for at in taken]
        digests = [digests[at] for at in taken]
    if not rows:
        return
    first = found.rows
    bad = found.writer.write(list(zip(*rows, strict=True)))
    keys.add(b"".join(digests), first)
    found.null_keys.extend(first + at for at, key in enumerate(texts) if None in key)
    found.bad_texts.extend(first + at for at in bad)
    found.rows += len(rows)


def in_sample(digest: bytes, sample: Decimal) -> bool:
    """Tell whether a key belongs to the sample: the same keys every time, and more for more."""
    return int.from_bytes(digest[:8], "big") < int(sample * 2**64)


def _key_bytes(key: list[str | None]) -> bytes:
    try:
        return key_json(key)
    except TypeError:  # a lone surrogate; the row is rejected, but its key must still be one
        return repr(key).encode("utf-8", "backslashreplace")


def _publish(
    found: _Extraction,
    rejections: tuple[Rows, list[str], Rows],
    artifacts: Artifacts,
    directory: str,
) -> Snapshot:
    """Move the finished files to the artifacts, under names made of the content."""
    with found.writer.path.open("rb") as source:
        digest = file_digest(source, "sha256").hexdigest()[:DIGEST_CHARACTERS]
        source.seek(0)
        path = f"{directory}/snapshot-{digest}.parquet"
        with artifacts.create(path) as target:
            shutil.copyfileobj(source, target, 1 << 20)
    rejections_file = None
    if rejections[1]:
        rejections_file = f"{directory}/snapshot-{digest}.rejections.parquet"
        _write_rejections(rejections, artifacts, rejections_file)
    return Snapshot(
        path, found.rows, found.columns, rejections_file, found.duplicate_keys, found.unsampled
    )


def _write_rejections(
    rejections: tuple[Rows, list[str], Rows], artifacts: Artifacts, path: str
) -> None:
    rows, reasons, sources = rejections
    with artifacts.create(path) as stream, pq.ParquetWriter(stream, REJECTIONS_SCHEMA) as writer:
        for start in range(0, len(rows), REJECTIONS_PER_GROUP):
            part = slice(start, start + REJECTIONS_PER_GROUP)
            arrays = [integer_array(rows[part]), text_array(reasons[part])]
            arrays.append(integer_array(sources[part]))
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=REJECTIONS_SCHEMA))


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


def interval_text(moment: datetime) -> str:
    """Return an aware datetime as `2026-11-01T00:00:00Z`, with microseconds if it has any."""
    if moment.tzinfo is None:
        raise ValueError("interval bounds must be aware datetimes")
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat() + "Z"


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

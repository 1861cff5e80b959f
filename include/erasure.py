"""One row's data, deleted on request from everywhere that this project has put it.

That is: the snapshot, request and result files of every run that had the row, their files at the
provider, and the row's own lines in results and failures. Snapshots and request files hold many
rows and are never rewritten, so all artifacts of these runs go. What they cost stays on record.

A run whose artifacts are gone, by age or for another row, no longer tells which rows it had: the
lines in the tables are therefore looked for by the key itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from include import ledger_database
from include import ledger_tables as tables
from include.artifacts import Artifacts
from include.audit import stored_keys
from include.column_types import column_texts
from include.errors import ConfigurationError
from include.housekeeping import Housekeeping
from include.job_spec import JobSpec
from include.ledger import Ledger
from include.ledger_records import Run, RunState
from include.queue_records import ENDED
from include.row_identity import key_digest, key_json
from include.snapshot import Snapshot
from include.target_place import Place
from include.target_table import Family, create_tables, key_families, sql_family

READERS: Mapping[Family, Callable[[str], Any]] = {
    Family.INTEGER: int,
    Family.REAL: float,
    Family.NUMERIC: Decimal,
    Family.BOOLEAN: {"true": True, "false": False}.__getitem__,
    Family.DATE: date.fromisoformat,
    Family.TIME: datetime.fromisoformat,
    Family.AWARE_TIME: datetime.fromisoformat,
}
CHUNK_ROWS = 10_000  # keys of a snapshot that are compared at a time


@dataclass(frozen=True)
class Trace:
    """A run that had the row; `key` is its key as one row of the snapshot's key columns."""

    run: Run
    key: pa.RecordBatch


@dataclass(frozen=True)
class Erased:
    """What was deleted; `left` says what this project cannot delete."""

    runs: int
    files: int  #: at the provider
    rows: int  #: of results and failures
    left: tuple[str, ...]


def traces(job: str, key: Sequence[str], ledger: Ledger, artifacts: Artifacts) -> list[Trace]:
    """Return every run of the job whose snapshot has the row with this key.

    Raises `ConfigurationError` when one of them is open (it still needs the row), or when the key
    has another number of columns than the job's.
    """
    found = []
    for run in _runs_with_artifacts(job, ledger):
        row = _row(run, tuple(key), artifacts)
        if row is not None:
            found.append(Trace(run, row))
    opened = [one.run for one in found if one.run.state == RunState.OPEN]
    if opened:
        raise ConfigurationError(
            f"{opened[0]} is open and has this row. Let it finish, or cancel it and run the "
            "partition again without the row; one that a newer run has replaced is ended by "
            f"`python -m llm_batch close {opened[0].run_id}`. Then erase."
        )
    return found


def _runs_with_artifacts(job: str, ledger: Ledger) -> list[Run]:
    run = tables.run.c
    query = (
        sa.select(tables.run)
        .where(run.job == job, run.snapshot.is_not(None), run.artifacts_deleted_at.is_(None))
        .order_by(run.created_at)
    )
    with ledger_database.reading(ledger.engine) as connection:
        return [Run(**row) for row in connection.execute(query).mappings()]


def _row(run: Run, key: tuple[str, ...], artifacts: Artifacts) -> pa.RecordBatch | None:
    snapshot, names = Snapshot.from_json(str(run.snapshot)), JobSpec.from_json(run.spec).source.key
    if len(key) != len(names):
        raise ConfigurationError(
            f"Job {run.job} has the key {', '.join(names)}: give {len(names)} values."
        )
    if not artifacts.exists(snapshot.path):
        return None
    with artifacts.open(snapshot.path) as stream:
        for keys in pq.ParquetFile(stream).iter_batches(CHUNK_ROWS, columns=list(names)):
            texts = zip(*(column_texts(keys.column(name)) for name in names), strict=True)
            for place, text in enumerate(texts):
                if tuple(text) == key:
                    return keys.slice(place, 1)
    return None


def erase(
    found: Sequence[Trace],
    keeping: Housekeeping,
    target: Callable[[JobSpec], Place],
    *,
    job: str,
    key: Sequence[str],
) -> Erased:
    """Delete what `traces` has found, and the row's lines in every target that the job has had.

    May be run again after it was killed: the lines go first, so that a second go still finds the
    rest.
    """
    rows = files = 0
    left: list[str] = []
    for trace in found:
        spec = JobSpec.from_json(trace.run.spec)
        place = target(spec)
        if isinstance(place, Engine) and spec.queue is None:
            rows += sum(_delete_lines(trace, place))
    for spec in _targets(job, keeping.ledger):
        place = target(spec)
        if spec.queue is not None:
            rows += _delete_request(tuple(key), keeping.ledger)
        elif isinstance(place, Engine):
            rows += sum(_delete_by_text(spec, tuple(key), place))
        else:
            left.append(f"{place!r}: a Parquet dataset is not rewritten; replace its file.")
    for trace in found:
        for batch in keeping.ledger.batches(trace.run.run_id):
            files += keeping.delete_files(batch)
        keeping.delete_artifacts(trace.run)
    return Erased(len(found), files, rows, tuple(dict.fromkeys(left)))


def _delete_lines(trace: Trace, engine: Engine) -> Iterator[int]:
    spec = JobSpec.from_json(trace.run.spec)
    names = spec.source.key
    target = create_tables(engine, spec, key_families(spec, trace.key.schema))
    text = tuple(column_texts(trace.key.column(name))[0] for name in names)
    digest = key_digest(key_json(text)).hex()
    with engine.begin() as connection:
        (values,) = stored_keys(connection, target, trace.key)
        same = [target.results.c[name] == value for name, value in zip(names, values, strict=True)]
        yield connection.execute(sa.delete(target.results).where(*same)).rowcount
        lines = sa.delete(target.failures).where(target.failures.c["_key"] == digest)
        yield connection.execute(lines).rowcount


def _targets(job: str, ledger: Ledger) -> list[JobSpec]:
    """Return one spec for each target and key that the runs of a job have had."""
    query = sa.select(tables.run.c.spec).where(tables.run.c.job == job).distinct()
    with ledger_database.reading(ledger.engine) as connection:
        specs = [JobSpec.from_json(text) for text in connection.scalars(query)]
    return list({(one.target.model_dump_json(), one.source.key): one for one in specs}.values())


def _delete_by_text(spec: JobSpec, key: tuple[str, ...], engine: Engine) -> Iterator[int]:
    names, inspector = spec.source.key, sa.inspect(engine)
    if len(names) != len(key):
        return
    with engine.begin() as connection:
        if inspector.has_table(spec.target.failures_table):
            failures = sa.table(spec.target.failures_table, sa.column("_key"))
            line = failures.c["_key"] == key_digest(key_json(key)).hex()
            yield connection.execute(sa.delete(failures).where(line)).rowcount
        if inspector.has_table(spec.target.table):
            types = {one["name"]: one["type"] for one in inspector.get_columns(spec.target.table)}
            columns = [sa.column(name, types[name]) for name in names]
            same = [
                column.in_(_stored(text, sql_family(column.type)))
                for column, text in zip(columns, key, strict=True)
            ]
            results = sa.table(spec.target.table, *columns)
            yield connection.execute(sa.delete(results).where(*same)).rowcount


def _delete_request(key: tuple[str, ...], ledger: Ledger) -> int:
    """Delete a request of the queue that has ended; one that waits is the application's own."""
    columns = tables.queue.c
    ours = (columns.request_id == key[0], columns.state.in_(ENDED))
    with ledger_database.writing(ledger.engine) as connection:
        return connection.execute(sa.delete(tables.queue).where(*ours)).rowcount


def _stored(text: str, family: Family) -> list[Any]:
    """Return the values as which a column may hold the text of a key; none when it cannot."""
    try:
        if family in READERS:
            return [READERS[family](text)]
        # SQLite has texts for times; those with a time zone have another mark for UTC.
        return [text, datetime.fromisoformat(text).isoformat()] if text.endswith("Z") else [text]
    except (ValueError, KeyError, ArithmeticError):
        return [] if family in READERS else [text]

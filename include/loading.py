"""Loads the terminal outcomes of a run into the results and the failures table.

Every row of the partition ends in exactly one of the two: a key that succeeds now leaves the
failures table, a key that fails now leaves the results table. All of it is one transaction, and
loading again changes nothing: a row is written only when its output, `_custom_id`, `_model` or
interval (for failures also reason, error, rounds, batch) differ; `_run_id`, `_loaded_at` and
`_failed_at` alone are no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import sqlalchemy as sa
import tenacity
from sqlalchemy.engine import Engine

from include.arrow_columns import integer_array
from include.artifacts import Artifacts
from include.classification import State
from include.column_types import column_texts
from include.database_errors import database_errors
from include.errors import TransientError
from include.left_out import LeftOut
from include.outcome_columns import CHUNK_ROWS, text_array, text_scalar
from include.retry_plan import is_terminal
from include.row_identity import key_digest, key_json
from include.shared_rows import Followers
from include.table_writers import writer_of
from include.target_table import Family, create_tables, key_families
from include.vector_arrays import is_packed, rows_at_once, unpacked

if TYPE_CHECKING:
    from include.job_spec import JobSpec

LOAD_ATTEMPTS = 5
BATCH_BYTES = 4 << 20  # of vectors that are held at once
LOOKUP_IDS = 1_000  # custom_ids in one question
STATE_FAILURE_COLUMNS = ["_reason", "_error_code", "_error_message"]


class RowShape(Protocol):
    """Which columns of the files a target takes; `text_keys` are to become texts."""

    @property
    def key(self) -> tuple[str, ...]:
        """The key columns."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """The output columns."""

    @property
    def text_keys(self) -> frozenset[str]:
        """Key columns of another type that the target holds as text."""


@dataclass(frozen=True)
class RoundFiles:
    """The outcome files of one round, and the batch that each of them came from."""

    round: int
    outcome_files: tuple[str, ...]
    batch_ids: tuple[str, ...]
    shared_file: str | None = None  # rows that share outcomes of the run
    left_out_file: str | None = None  # rows that the next round could not send
    over_budget: str | None = None  # why a budget did not let the next round begin


@dataclass(frozen=True)
class LoadedRun:
    """The run that a load is of, as every line in a target names it."""

    run_id: str
    interval_start: datetime
    interval_end: datetime

    def columns(self, spec: JobSpec) -> dict[str, Any]:
        """Return the columns that are the same in all lines of the run."""
        return {
            "_model": spec.request.model,
            "_run_id": self.run_id,
            "_interval_start": self.interval_start.astimezone(UTC),
            "_interval_end": self.interval_end.astimezone(UTC),
        }


@dataclass(frozen=True)
class LoadReport:
    """What a load did: rows that now are results or failures, and how many of them were new.

    `failed` counts source rows: several rows of a duplicate key have one line in the table.
    """

    loaded: int
    failed: int
    failure_lines: int
    changed_results: int
    changed_failures: int

    @property
    def source_rows(self) -> int:
        """The rows of the source that have found their end."""
        return self.loaded + self.failed


def load_run(engine: Engine, run: LoadedRun, files: RunFiles) -> LoadReport:
    """Load a run in one transaction; a row still open after the last round counts as failed.

    Raises `ConfigurationError` for tables that do not fit or may not be written, `TransientError`
    when the database stays away or busy, `PermanentError` when it refuses the values.
    """
    keys = files.key_families()
    if keys is None:
        return LoadReport(0, 0, 0, 0, 0)
    return retried(lambda: _load(engine, keys, files, run.columns(files.spec)))


def check_tables(engine: Engine, spec: JobSpec, found: pa.Schema) -> None:
    """Create the tables for keys of the types in `found`, or check those that are there.

    Raises what `load_run` would raise for them.
    """
    with database_errors(engine, spec.target.table):
        create_tables(engine, spec, key_families(spec, found))


def retried(load: Callable[[], LoadReport]) -> LoadReport:
    """Run the whole load again after a conflict or a lost connection."""
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(TransientError),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=10),
        stop=tenacity.stop_after_attempt(LOAD_ATTEMPTS),
        reraise=True,
    )
    return retrying(load)


def _load(
    engine: Engine, keys: Mapping[str, Family], files: RunFiles, constants: Mapping[str, Any]
) -> LoadReport:
    with database_errors(engine, files.spec.target.table):
        tables = create_tables(engine, files.spec, keys)
        now = datetime.now(UTC)
        with engine.begin() as connection:
            writer = writer_of(connection, tables)
            writer.begin()
            loaded, changed = writer.upsert(
                tables.results, files.results(tables), {**constants, "_loaded_at": now}
            )
            writer.drop_failures_with_result()
            counted = _Counted(files.failures(tables))
            lines, changed_failures = writer.upsert(
                tables.failures, counted, {**constants, "_failed_at": now}
            )
            writer.drop_results_that_failed()
            writer.end()
    return LoadReport(loaded, counted.source_rows, lines, changed, changed_failures)


class _Counted:
    """Passes batches of failures on, and adds up their source rows."""

    def __init__(self, batches: Iterable[pa.RecordBatch]) -> None:
        self._batches = batches
        self.source_rows = 0

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        for batch in self._batches:
            self.source_rows += pc.sum(batch.column("_source_rows")).as_py() or 0
            yield batch


@dataclass(frozen=True)
class RunFiles:
    """The files of a run, as batches of rows for its results and its failures."""

    spec: JobSpec
    rounds: tuple[RoundFiles, ...]
    rejected_file: str | None
    artifacts: Artifacts

    @property
    def last_round(self) -> int:
        """The number of the last round, 0 for a run without any."""
        return max((one.round for one in self.rounds), default=0)

    def key_families(self) -> dict[str, Family] | None:
        """Return the families of the key, or None when the run has no files."""
        schema = self.schema()
        return None if schema is None else key_families(self.spec, schema)

    def schema(self) -> pa.Schema | None:
        """Return the schema of the first file, or None when the run has no files."""
        paths = [path for one in self.rounds for path in one.outcome_files]
        paths += [self.rejected_file] if self.rejected_file else []
        if not paths:
            return None
        with self.artifacts.open(paths[0]) as stream:
            return pq.read_schema(stream)

    def results(self, tables: RowShape) -> Iterator[pa.RecordBatch]:
        """Yield key, output and `_custom_id` of the rows that succeeded."""
        done = text_scalar(State.SUCCEEDED)
        names = [*tables.key, *tables.outputs, "_custom_id"]
        for one in self.rounds:
            for _, batch in self._outcomes(one, [*names, "_state"], tables):
                found = batch.filter(pc.equal(batch.column("_state"), done)).select(names)
                yield _with_vectors(_with_text_keys(found, tables.text_keys))

    def failures(self, tables: RowShape) -> Iterator[pa.RecordBatch]:
        """Yield the rows that failed, were left over after the last round, or were rejected."""
        for one in self.rounds:
            states = [
                text_scalar(state)
                for state in (State.FAILED, State.RETRY)
                if is_terminal(state, round_number=one.round, last_round=self.last_round)
            ]
            yield from self._failed(one, states, tables)
        if self.rejected_file:
            for batch in self.batches(self.rejected_file):
                yield _failure_lines(batch, tables, (0, None))

    def _failed(
        self, one: RoundFiles, states: Sequence[pa.Scalar], tables: RowShape
    ) -> Iterator[pa.RecordBatch]:
        names = [*tables.key, "_custom_id", "_state", *STATE_FAILURE_COLUMNS]
        for batch_id, batch in self._outcomes(one, names, tables):
            for state in states:
                found = batch.filter(pc.equal(batch.column("_state"), state))
                if found.num_rows:
                    yield _failure_lines(found, tables, (one.round, batch_id))

    def _outcomes(
        self, one: RoundFiles, names: list[str], tables: RowShape
    ) -> Iterator[tuple[str, pa.RecordBatch]]:
        """Yield each batch's id with its outcomes, and with those of rows that share them."""
        followers = None
        if one.shared_file is not None:
            shared = self.batches(one.shared_file)
            followers, names = Followers(shared, tables.key), [*names, "_row"]
        judged, names = self._judge(one, names)
        for path, batch_id in zip(one.outcome_files, one.batch_ids, strict=True):
            for batch in self.batches(path, names):
                yield batch_id, judged(batch)
                for copy in followers.of(batch) if followers else ():
                    yield batch_id, judged(copy)

    def _judge(
        self, one: RoundFiles, names: list[str]
    ) -> tuple[Callable[[pa.RecordBatch], pa.RecordBatch], list[str]]:
        """Return how outcomes are changed by what the next round left out, and the columns."""
        is_complete = one.left_out_file is None and one.over_budget is None
        if is_complete or "_reason" not in names:
            return lambda batch: batch, names
        return self.left_out(one).judged, list(dict.fromkeys([*names, "_row"]))

    def left_out(self, one: RoundFiles) -> LeftOut:
        """Return the rows of a round that the next one could not send."""
        rejected = self.batches(one.left_out_file) if one.left_out_file else ()
        return LeftOut(rejected, one.over_budget)

    def batches(self, path: str, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield the rows of one file, with these columns or all."""
        with self.artifacts.open(path) as stream:
            file = pq.ParquetFile(stream)
            kinds = [
                one.type for one in file.schema_arrow if columns is None or one.name in columns
            ]
            rows = rows_at_once(kinds, CHUNK_ROWS, BATCH_BYTES)
            yield from file.iter_batches(rows, columns=columns)


def _with_text_keys(batch: pa.RecordBatch, names: Iterable[str]) -> pa.RecordBatch:
    for name in names:
        texts = text_array(column_texts(batch.column(name)))
        batch = batch.set_column(batch.schema.get_field_index(name), name, texts)
    return batch


def _with_vectors(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return `batch` with its packed vectors as lists of numbers."""
    for at, field in enumerate(batch.schema):
        if is_packed(field.type):
            batch = batch.set_column(at, field.name, unpacked(batch.column(at)))
    return batch


def _failure_lines(
    batch: pa.RecordBatch, tables: RowShape, origin: tuple[int, str | None]
) -> pa.RecordBatch:
    """Return the lines of the failures table, without the columns that are the run's."""
    rows, names = batch.num_rows, set(batch.schema.names)
    texts = zip(*(column_texts(batch.column(name)) for name in tables.key), strict=True)
    digests = [key_digest(key_json(key)).hex() for key in texts]
    batch = _with_text_keys(batch, tables.text_keys)
    sources = np.ones(rows, dtype=np.int64)
    columns = {
        "_key": text_array(digests),
        **{name: batch.column(name) for name in tables.key},
        **{
            name: batch.column(name) if name in names else text_array([None] * rows)
            for name in STATE_FAILURE_COLUMNS
        },
        "_rounds": integer_array(np.full(rows, origin[0], dtype=np.int64)),
        "_source_rows": batch.column("_source_rows")
        if "_source_rows" in names
        else integer_array(sources),
        "_batch_id": text_array([origin[1]] * rows),
        "_custom_id": batch.column("_custom_id"),
    }
    return pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))


def known_custom_ids(
    engine: Engine, spec: JobSpec, custom_ids: Sequence[str], *, include_failures: bool = True
) -> set[str]:
    """Return those of `custom_ids` that are loaded, or have failed for good (if included).

    A table that does not exist yet knows none.
    """
    names = [spec.target.table] + [spec.target.failures_table] * include_failures
    found: set[str] = set()
    with database_errors(engine, spec.target.table), engine.connect() as connection:
        present = sa.inspect(connection).get_table_names()
        for name in names:
            if name in present:
                found.update(_known(connection, name, custom_ids))
    return found


def _known(connection: sa.Connection, table: str, custom_ids: Sequence[str]) -> Iterator[str]:
    column: sa.ColumnClause[str] = sa.column("_custom_id")
    wanted: sa.BindParameter[str] = sa.bindparam("wanted", expanding=True)
    query = sa.select(column).select_from(sa.table(table, column)).where(column.in_(wanted))
    for start in range(0, len(custom_ids), LOOKUP_IDS):
        yield from connection.scalars(
            query, {"wanted": list(custom_ids[start : start + LOOKUP_IDS])}
        )

"""Loads the terminal outcomes of a run into a Parquet dataset.

A partition is one file of results and one of failures, merged and replaced whole: a reader sees
the old file or the new one, never half of it. As in a table, each key is in one of the two, a row
that has not changed keeps its `_run_id` and its time, and loading again changes nothing.

Memory: 16 bytes for each key and row of the partition when there are old files to merge with, and
for each `custom_id` that a build compares with: some hundred megabytes for ten million rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, BinaryIO, Self
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from include.arrow_columns import boolean_array
from include.artifacts import Artifacts
from include.column_types import column_texts
from include.digest_set import (
    DIGEST_BYTES,
    Digests,
    DigestSet,
    Mask,
    digests_of,
    digests_of_hex,
)
from include.errors import ConfigurationError, TransientError
from include.loading import BATCH_BYTES, LoadedRun, LoadReport, RunFiles, retried
from include.outcome_columns import CHUNK_ROWS
from include.parquet_layout import (
    FAILURES,
    RESULTS,
    VERSION,
    Layout,
    conformed,
    layout_of,
    opened,
    part_path,
    version_of,
)
from include.row_identity import key_digest, key_json
from include.table_writers import UNCOMPARED
from include.vector_arrays import as_binary, is_vector, rows_at_once

if TYPE_CHECKING:
    from include.job_spec import JobSpec

GROUP_ROWS = 100_000
GROUP_BYTES = 32 << 20  # of Arrow data, before a row group is written


def load_dataset(dataset: Artifacts, run: LoadedRun, files: RunFiles) -> LoadReport:
    """Load a run; a row still open after the last round counts as failed.

    Results are replaced a moment before failures: a load that dies between the two is made whole
    by the next one. Raises `ConfigurationError` for files that do not fit or may not be written,
    `TransientError` when other loads of the same interval keep coming first.
    """
    found = files.schema()
    if found is None:
        return LoadReport(0, 0, 0, 0, 0)

    def load() -> LoadReport:
        partition = _Partition(dataset, run.interval_start)
        layout = layout_of(files.spec, found, partition.schemas, dataset)
        constants = run.columns(files.spec)
        return _load(partition, _NewRows(files, layout, constants, datetime.now(UTC)))

    with _storage_errors(files.spec):
        return retried(load)


def check_dataset(
    dataset: Artifacts, spec: JobSpec, found: pa.Schema, interval_start: datetime
) -> None:
    """Raise what `load_dataset` would raise for the files of an interval that are there."""
    with _storage_errors(spec):
        layout_of(spec, found, _Partition(dataset, interval_start).schemas, dataset)


def known_requests(
    dataset: Artifacts, interval_start: datetime, *, include_failures: bool = True
) -> Callable[[list[str]], set[str]]:
    """Return the question which `custom_id`s the interval has, also as failures if included."""
    known = DigestSet()
    for kind in [RESULTS] + [FAILURES] * include_failures:
        for batch in _column(dataset, part_path(kind, interval_start), ["_custom_id"]):
            known.add(digests_of_hex(batch.column(0).to_pylist()))

    def ask(custom_ids: list[str]) -> set[str]:
        found = known.has(digests_of_hex(custom_ids)).tolist()
        return {one for one, is_known in zip(custom_ids, found, strict=True) if is_known}

    return ask


def ended_keys(
    dataset: Artifacts, interval_start: datetime, key: Sequence[str]
) -> tuple[DigestSet, DigestSet]:
    """Return the keys of the results and of the failures of an interval."""
    results = _column(dataset, part_path(RESULTS, interval_start), list(key))
    failures = _column(dataset, part_path(FAILURES, interval_start), ["_key"])
    return (
        DigestSet(key_digests(batch, key) for batch in results),
        DigestSet(digests_of_hex(batch.column(0).to_pylist()) for batch in failures),
    )


def key_digests(batch: pa.RecordBatch, key: Sequence[str]) -> Digests:
    """Return a digest of the key of each row, whatever the types of its columns."""
    texts = zip(*(column_texts(batch.column(name)) for name in key), strict=True)
    return digests_of(b"".join(key_digest(key_json(row)) for row in texts))


def _column(dataset: Artifacts, path: str, names: list[str]) -> Iterator[pa.RecordBatch]:
    with opened(dataset, path) as file:
        if file is not None:
            yield from file.iter_batches(CHUNK_ROWS, columns=names)


@contextmanager
def _storage_errors(spec: JobSpec) -> Iterator[None]:
    try:
        yield
    except (PermissionError, FileNotFoundError, NotADirectoryError, FileExistsError) as error:
        raise ConfigurationError(
            f"Job {spec.name} cannot write below {spec.target.path}: {type(error).__name__}. "
            "Check target.path and that the workers may write there, then clear the load task."
        ) from error


class _Partition:
    """The two files of an interval as they were when the load began."""

    def __init__(self, dataset: Artifacts, interval_start: datetime) -> None:
        self.dataset = dataset
        self._paths = {kind: part_path(kind, interval_start) for kind in (RESULTS, FAILURES)}
        self.schemas: dict[str, pa.Schema] = {}
        self._versions = self._current()

    def _current(self) -> dict[str, bytes | None]:
        versions = {}
        for kind, path in self._paths.items():
            with opened(self.dataset, path) as file:
                versions[kind] = version_of(file)
                if file is not None:
                    self.schemas[kind] = file.schema_arrow
        return versions

    def rows(self, kind: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """Yield the old rows, with the columns of `schema`."""
        with opened(self.dataset, self._paths[kind]) as file:
            if file is not None:
                rows = rows_at_once(file.schema_arrow.types, CHUNK_ROWS, BATCH_BYTES)
                for batch in file.iter_batches(rows):
                    yield conformed(batch, schema, {})

    @contextmanager
    def replacement(self, kind: str, schema: pa.Schema) -> Iterator[_NewFile]:
        """Yield a new file; it takes the old one's place at the end, if there is a difference."""
        try:
            with self.dataset.create(self._paths[kind]) as stream:
                with _NewFile(stream, schema) as file:
                    yield file
                self._check_difference(kind, file)
        except _NoDifferenceError:
            return

    def _check_difference(self, kind: str, file: _NewFile) -> None:
        if kind in self.schemas and not file.added and not file.dropped:
            raise _NoDifferenceError

    def check_unchanged(self) -> None:
        """Raise `TransientError` when another load has replaced a file in the meantime."""
        if self._current() != self._versions:
            raise TransientError(
                f"Another load has replaced a file of {self.dataset.uri(self._paths[RESULTS])} or "
                "its failures. It is merged with those again."
            )


class _NoDifferenceError(Exception):
    """The new file says what the old one says."""


class _NewFile:
    """Rows for a file, written in large row groups."""

    def __init__(self, stream: BinaryIO, schema: pa.Schema) -> None:
        self._schema = schema.with_metadata({VERSION: uuid4().hex})
        plain = [field.name for field in schema if not is_vector(field.type)]
        self._writer = pq.ParquetWriter(
            stream,
            self._schema,
            compression="zstd",
            # All numbers of vectors differ: to look for repeats and extremes costs the most.
            use_dictionary=plain,
            write_statistics=plain,
        )
        self._pending: list[pa.RecordBatch] = []
        self.added = 0
        self.dropped = 0

    def keep(self, batch: pa.RecordBatch, kept: Mask) -> None:
        """Write the old rows that are kept."""
        self.dropped += self._write(batch, kept)

    def add(self, batch: pa.RecordBatch, known: Mask) -> None:
        """Write the new rows that are not known."""
        left_out = self._write(batch, ~known)
        self.added += batch.num_rows - left_out

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Write what is left, and the footer."""
        try:
            if error is None:
                self._flush()
        finally:
            self._writer.close()

    def _write(self, batch: pa.RecordBatch, wanted: Mask) -> int:
        """Return how many rows were left out."""
        chosen = batch if wanted.all() else batch.filter(boolean_array(wanted))
        if chosen.num_rows:
            self._pending.append(chosen)
        rows = sum(one.num_rows for one in self._pending)
        if rows >= GROUP_ROWS or sum(one.nbytes for one in self._pending) >= GROUP_BYTES:
            self._flush()
        return int(batch.num_rows - chosen.num_rows)

    def _flush(self) -> None:
        if self._pending:
            table = pa.Table.from_batches(self._pending)
            self._writer.write_table(table.cast(self._schema), row_group_size=GROUP_ROWS)
            self._pending.clear()


@dataclass(frozen=True)
class _NewRows:
    """What a run adds to the two files of its interval."""

    files: RunFiles
    layout: Layout
    constants: Mapping[str, Any]
    now: datetime

    def schema(self, kind: str) -> pa.Schema:
        """Return the columns of one of the files."""
        return self.layout.results if kind == RESULTS else self.layout.failures

    def rows(self, kind: str, count: Callable[[int], None] = lambda _: None) -> Iterator[
        pa.RecordBatch
    ]:  # fmt: skip
        """Yield the rows for one of the files, each key once; `count` gets their source rows."""
        if kind == RESULTS:
            constants = {**self.constants, "_loaded_at": self.now}
            for batch in self.files.results(self.layout):
                count(batch.num_rows)
                yield conformed(batch, self.layout.results, constants)
            return
        seen: set[str] = set()
        constants = {**self.constants, "_failed_at": self.now}
        for batch in self.files.failures(self.layout):
            count(pc.sum(batch.column("_source_rows")).as_py() or 0)
            # A key can be in the rejected file once for each reason.
            keys = batch.column("_key").to_pylist()
            first = [key not in seen and not seen.add(key) for key in keys]  # type: ignore[func-returns-value]
            chosen = batch.filter(boolean_array(np.array(first, dtype=np.bool_)))
            yield conformed(chosen, self.layout.failures, constants)

    def keys(self, kind: str, batch: pa.RecordBatch) -> Digests:
        """Return a digest of each key."""
        if kind == FAILURES:
            return digests_of_hex(batch.column("_key").to_pylist())
        return key_digests(batch, self.layout.key)


@dataclass
class _Contents:
    """Digests of keys and of whole rows."""

    keys: DigestSet = field(default_factory=DigestSet)
    rows: dict[str, DigestSet] = field(
        default_factory=lambda: {RESULTS: DigestSet(), FAILURES: DigestSet()}
    )


def _load(partition: _Partition, new: _NewRows) -> LoadReport:
    """Write both files before the first of them takes the old one's place."""
    contents = _contents(new) if partition.schemas else _Contents()
    with (
        partition.replacement(FAILURES, new.layout.failures) as failures,
        partition.replacement(RESULTS, new.layout.results) as results,
    ):
        loaded = _merge(RESULTS, results, partition, new, contents)
        failed = _merge(FAILURES, failures, partition, new, contents)
        partition.check_unchanged()
    return LoadReport(
        loaded=loaded[0],
        failed=failed[0],
        failure_lines=failed[1],
        changed_results=results.added,
        changed_failures=failures.added,
    )


def _contents(new: _NewRows) -> _Contents:
    found = _Contents()
    for kind in (RESULTS, FAILURES):
        for batch in new.rows(kind):
            found.keys.add(new.keys(kind, batch))
            found.rows[kind].add(_row_digests(batch))
    return found


def _merge(
    kind: str, file: _NewFile, partition: _Partition, new: _NewRows, contents: _Contents
) -> tuple[int, int]:
    """Write old and new rows; return the new ones as source rows and as lines.

    An old row goes when this run has its key, unless it has the very same row: then the new one is
    left out.
    """
    same = DigestSet()
    for batch in partition.rows(kind, new.schema(kind)):
        touched = contents.keys.has(new.keys(kind, batch))
        kept = ~touched
        if touched.any():
            rows = _row_digests(batch.filter(boolean_array(touched)))
            again = contents.rows[kind].has(rows)
            kept[touched] = again
            same.add(rows[again])
        file.keep(batch, kept)
    counts: list[int] = []
    lines = 0
    for batch in new.rows(kind, counts.append):
        lines += batch.num_rows
        known = same.has(_row_digests(batch)) if same else np.zeros(batch.num_rows, dtype=np.bool_)
        file.add(batch, known)
    return sum(counts), lines


def _row_digests(batch: pa.RecordBatch) -> Digests:
    """Return a digest of what matters in each row."""
    names = [name for name in batch.schema.names if name not in UNCOMPARED]
    rows = zip(*(_plain(batch.column(name)).to_pylist() for name in names), strict=True)
    return digests_of(
        b"".join(blake2b(repr(row).encode(), digest_size=DIGEST_BYTES).digest() for row in rows)
    )


def _plain(column: pa.Array) -> pa.Array:
    """Return times as numbers, vectors as bytes: Python objects of them cost more than the rest."""
    if is_vector(column.type):
        return as_binary(column)
    return column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column

"""A Parquet dataset of results: its files, and their columns.

    <path>/results/interval=2026-11-01T0000Z/data.parquet
    <path>/failures/interval=2026-11-01T0000Z/data.parquet

One file for each interval, so that it can be replaced in one step, and any reader of partitioned
Parquet finds the rows. The columns are those of the results and the failures table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from include.arrow_columns import TIMESTAMP_UTC, text_array, typed_array
from include.artifacts import Artifacts
from include.column_types import column_texts
from include.dataset_path import PARTITION_COLUMN
from include.errors import ConfigurationError
from include.outcome_columns import arrow_type
from include.output_columns import request_columns
from include.target_table import FAILURE_COLUMNS, OWN_FAMILIES, RESULT_COLUMNS, Family

if TYPE_CHECKING:
    from include.job_spec import JobSpec

RESULTS = "results"
FAILURES = "failures"
VERSION = b"llm_batch_version"  # in the metadata of a file; another one after each replacement
_TYPES = {Family.INTEGER: pa.int64(), Family.AWARE_TIME: TIMESTAMP_UTC, Family.TEXT: pa.string()}


def part_path(kind: str, interval_start: datetime) -> str:
    """Return the path, below the dataset's, of the file of one interval."""
    start = interval_start.astimezone(UTC)
    return f"{kind}/{PARTITION_COLUMN}={start:%Y-%m-%dT%H%MZ}/data.parquet"


@contextmanager
def opened(dataset: Artifacts, path: str) -> Iterator[pq.ParquetFile | None]:
    """Yield a file of the dataset; None when there is none yet.

    Raises `ConfigurationError` when it is no Parquet file.
    """
    if not dataset.exists(path):
        yield None
        return
    with dataset.open(path) as stream:
        try:
            file = pq.ParquetFile(stream)
        except pa.ArrowInvalid:
            raise ConfigurationError(
                f"{dataset.uri(path)} is no Parquet file, so new rows cannot be merged into it. "
                "Move it away, or name another folder in target.path; nothing was altered."
            ) from None
        with file:
            yield file


def version_of(file: pq.ParquetFile | None) -> bytes | None:
    """Return what tells this file from the one before and after it."""
    metadata = None if file is None else file.schema_arrow.metadata
    return (metadata or {}).get(VERSION)


@dataclass(frozen=True)
class Layout:
    """The columns of both files of a partition; a `RowShape` for the files of a run."""

    key: tuple[str, ...]
    outputs: tuple[str, ...]
    text_keys: frozenset[str]
    results: pa.Schema
    failures: pa.Schema


def layout_of(
    spec: JobSpec, found: pa.Schema, old: Mapping[str, pa.Schema], dataset: Artifacts
) -> Layout:
    """Return the columns for keys of the types in `found`, merged into files of the schemas `old`.

    A key column whose type has changed becomes text; columns that only the old results have stay,
    null in new rows. Raises `ConfigurationError` for an output column of another type.
    """
    text_keys = frozenset(
        name
        for name in spec.source.key
        for schema in old.values()
        if name in schema.names and schema.field(name).type != found.field(name).type
    )
    keys = {name: found.field(name).type for name in spec.source.key}
    keys |= dict.fromkeys(text_keys, pa.string())
    outputs = {column.name: arrow_type(column) for column in request_columns(spec.request)}
    before = _other_columns(old.get(RESULTS), {*keys, *RESULT_COLUMNS})
    _check_types(spec, before, outputs, dataset)
    return Layout(
        key=spec.source.key,
        outputs=tuple(outputs),
        text_keys=text_keys,
        results=pa.schema([*(keys | outputs | before).items(), *_own(RESULT_COLUMNS)]),
        failures=pa.schema([("_key", pa.string()), *keys.items(), *_own(FAILURE_COLUMNS)]),
    )


def _own(names: Sequence[str]) -> list[tuple[str, pa.DataType]]:
    return [(name, _TYPES[OWN_FAMILIES.get(name, Family.TEXT)]) for name in names]


def _other_columns(schema: pa.Schema | None, known: set[str]) -> dict[str, pa.DataType]:
    if schema is None:
        return {}
    return {field.name: field.type for field in schema if field.name not in known}


def _check_types(
    spec: JobSpec,
    before: Mapping[str, pa.DataType],
    outputs: Mapping[str, pa.DataType],
    dataset: Artifacts,
) -> None:
    problems = [
        f"column {name}: found {before[name]}, expected {kind}"
        for name, kind in outputs.items()
        if before.get(name, kind) != kind
    ]
    if problems:
        raise ConfigurationError(
            f"Job {spec.name} cannot load into {dataset.uri(RESULTS)}: {'; '.join(problems)}. "
            "Move the files of this interval away, or name another folder in target.path; nothing "
            "was altered."
        )


def conformed(
    batch: pa.RecordBatch, schema: pa.Schema, constants: Mapping[str, Any]
) -> pa.RecordBatch:
    """Return `batch` with the columns of `schema`: its own, constants, or nulls."""
    rows, names = batch.num_rows, set(batch.schema.names)
    columns = []
    for field in schema:
        if field.name in constants:
            columns.append(typed_array([constants[field.name]] * rows, field.type))
        elif field.name not in names:
            columns.append(pa.nulls(rows, field.type))
        else:
            columns.append(_retyped(batch.column(field.name), field.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _retyped(column: pa.Array, kind: pa.DataType) -> pa.Array:
    return column if column.type == kind else text_array(column_texts(column))

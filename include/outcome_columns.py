"""The columns of an outcomes file, and how values become them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import pyarrow as pa

from include.arrow_columns import integer_array, typed_array
from include.classification import Problem, State
from include.output_columns import Kind, OutputColumn
from include.retry_plan import next_change
from include.vector_arrays import is_packed, packed_array, packed_type, vector_type

CHUNK_ROWS = 10_000
ARROW_TYPES = {
    Kind.TEXT: pa.string(),
    Kind.JSON: pa.string(),
    Kind.INTEGER: pa.int64(),
    Kind.REAL: pa.float64(),
    Kind.BOOLEAN: pa.bool_(),
}
STATE_COLUMNS = ("_state", "_reason", "_error_code", "_error_message", "_change")
TOKEN_COLUMNS = ("_input_tokens", "_cached_tokens", "_output_tokens", "_reasoning_tokens")
TOKEN_GETTERS = [
    attrgetter("input_tokens"),
    attrgetter("input_tokens_details.cached_tokens"),
    attrgetter("output_tokens"),
    attrgetter("output_tokens_details.reasoning_tokens"),
]


def outcomes_schema(index: pa.Schema, columns: Sequence[OutputColumn]) -> pa.Schema:
    """Return the schema of an outcomes file: index, state, output, tokens."""
    state = [pa.field(name, pa.string()) for name in STATE_COLUMNS]
    return pa.schema([*index, *state, *answer_schema(columns)])


def arrow_type(column: OutputColumn) -> pa.DataType:
    """Return the type of an output column in a dataset."""
    return vector_type(column.size) if column.kind is Kind.VECTOR else ARROW_TYPES[column.kind]


def stored_type(column: OutputColumn) -> pa.DataType:
    """Return the type of an output column in an outcomes file."""
    return packed_type(column.size) if column.kind is Kind.VECTOR else ARROW_TYPES[column.kind]


def answer_schema(columns: Sequence[OutputColumn]) -> pa.Schema:
    """Return the part of the schema that answers fill: output, tokens."""
    output = [pa.field(column.name, stored_type(column)) for column in columns]
    return pa.schema([*output, *(pa.field(name, pa.int64()) for name in TOKEN_COLUMNS)])


def column_array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Return an array of `kind`; None becomes null."""
    if is_packed(kind):
        return packed_array(values, kind)
    return text_array(values) if kind == pa.string() else typed_array(values, kind)


def text_array(values: Iterable[str | None]) -> pa.Array:
    """Return a string array; three times as fast as filling its buffers from Python."""
    builder = pa.lib.StringBuilder()
    builder.append_values(values)
    return builder.finish()


def text_scalar(value: str) -> pa.Scalar:
    """Return a scalar to compare a column with (`pyarrow.scalar` would import pandas)."""
    return text_array([value])[0]


def state_arrays(size: int, problems: Mapping[int, Problem]) -> list[pa.Array]:
    """Return the state columns of `size` requests; those without a problem are successes."""
    seen: dict[Problem | None, int] = {None: 0}
    codes = np.zeros(size, dtype=np.int64)
    for position, problem in problems.items():
        codes[position] = seen.setdefault(problem, len(seen))
    columns = zip(*(_state_row(problem) for problem in seen), strict=True)
    return [text_array(values).take(integer_array(codes)) for values in columns]


def _state_row(problem: Problem | None) -> tuple[str | None, ...]:
    if problem is None:
        return (State.SUCCEEDED.value, "", None, None, "")
    reason = problem.reason
    change = next_change(reason).value
    return (reason.state.value, reason.value, problem.code, problem.message, change)

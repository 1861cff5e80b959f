"""Which Arrow type holds a column, when the database does not say or says it by row.

A column whose values are all of one kind has the type of that kind; values of several kinds, and
every kind not listed here (decimals, JSON, bytes, UUIDs, integers beyond 64 bits), are stored as
text by `row_identity.as_text`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime
from typing import Any

import pyarrow as pa

from include.arrow_columns import TIMESTAMP, TIMESTAMP_UTC, text_array, typed_array
from include.row_identity import as_text

_SIMPLE = {
    str: pa.string(),
    bool: pa.bool_(),
    int: pa.int64(),
    float: pa.float64(),
    date: pa.date32(),
}
_INT64 = range(-(2**63), 2**63)
# Type codes of PostgreSQL (pg_type.oid); they type a column whose first rows are all null.
_POSTGRESQL = {
    16: pa.bool_(),
    20: pa.int64(),
    21: pa.int64(),
    23: pa.int64(),
    700: pa.float64(),
    701: pa.float64(),
    1082: pa.date32(),
    1114: TIMESTAMP,
    1184: TIMESTAMP_UTC,
}


def declared_type(dialect: str, type_code: Any) -> pa.DataType:
    """Return the type that the driver declares for a column; null type when it declares none."""
    if dialect != "postgresql":
        return pa.null()
    return _POSTGRESQL.get(type_code, pa.string())


def observed_type(values: Sequence[Any]) -> pa.DataType:
    """Return the type that holds all `values`; null type when all of them are None."""
    kinds = set(map(type, values)) - {type(None)}
    if not kinds:
        return pa.null()
    if len(kinds) > 1:
        return pa.string()
    kind = kinds.pop()
    if kind is int and not all(value is None or value in _INT64 for value in values):
        return pa.string()
    if kind is datetime:
        return _time_type(values)
    return _SIMPLE.get(kind, pa.string())


def common_type(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    """Return the type that holds both: text, unless they are the same or one has no values."""
    if first == second or pa.types.is_null(second):
        return first
    return second if pa.types.is_null(first) else pa.string()


def column_array(values: Sequence[Any], kind: pa.DataType) -> tuple[pa.Array, list[int]]:
    """Return the array of `kind` and the positions of texts that are not valid Unicode.

    Such a text is stored with its lone surrogates written as backslash escapes.
    """
    if kind != pa.string():
        return typed_array(values, kind), []
    texts = [None if value is None else as_text(value) for value in values]
    try:
        return text_array(texts), []
    except UnicodeEncodeError:
        escaped = [None if text is None else _escaped(text) for text in texts]
        bad = [at for at, text in enumerate(texts) if text != escaped[at]]
        return text_array(escaped), bad


def column_texts(column: pa.Array) -> list[str | None]:
    """Return the values of a column as texts, as keys and prompts show them."""
    values: list[Any] = column.to_pylist()
    if column.type == pa.string():
        return values
    return [None if value is None else as_text(value) for value in values]


def _time_type(values: Sequence[datetime | None]) -> pa.DataType:
    aware = {value.tzinfo is not None for value in values if value is not None}
    if len(aware) > 1:
        return pa.string()
    return TIMESTAMP_UTC if aware.pop() else TIMESTAMP


def _escaped(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()

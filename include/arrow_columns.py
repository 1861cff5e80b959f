"""Arrow arrays from Python values.

`pa.array` imports pandas on its first call when pandas is installed, even with a type given; so do
`pa.scalar` and `to_numpy`. That costs more than the work of a whole small task. These functions
use the buffers directly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

TIMESTAMP_UTC = pa.timestamp("us", tz="UTC")
TIMESTAMP = pa.timestamp("us")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NAIVE_EPOCH = _EPOCH.replace(tzinfo=None)
_MICROSECOND = timedelta(microseconds=1)


def text_array(values: Sequence[str | None]) -> pa.Array:
    """Return a string array. Raises `UnicodeEncodeError` for a lone surrogate."""
    encoded = [b"" if value is None else value.encode() for value in values]
    offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
    np.cumsum([len(item) for item in encoded], out=offsets[1:])
    return pa.Array.from_buffers(
        pa.large_string(),
        len(encoded),
        [_validity(values), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))],
    ).cast(pa.string())


def fixed_text_array(joined: bytes, width: int) -> pa.Array:
    """Return a string array of ASCII texts that are all `width` bytes long, given end to end."""
    count = len(joined) // width
    offsets = np.arange(0, len(joined) + 1, width, dtype=np.int32)
    return pa.Array.from_buffers(
        pa.string(), count, [None, pa.py_buffer(offsets), pa.py_buffer(joined)]
    )


def integer_array(values: npt.NDArray[np.int64]) -> pa.Array:
    """Return an int64 array without nulls that shares the memory of `values`."""
    whole = np.ascontiguousarray(values, dtype=np.int64)
    return pa.Array.from_buffers(pa.int64(), len(whole), [None, pa.py_buffer(whole)])


def integers(column: pa.Array) -> npt.NDArray[np.int64]:
    """Return an int64 column without nulls as numbers that share its memory.

    `to_numpy` would import pandas as well.
    """
    if not len(column):
        return np.empty(0, dtype=np.int64)
    values = np.frombuffer(column.buffers()[1], dtype=np.int64)
    return values[column.offset : column.offset + len(column)]


def boolean_array(values: npt.NDArray[np.bool_]) -> pa.Array:
    """Return a boolean array without nulls, such as a mask for `filter`."""
    bits = np.packbits(values, bitorder="little")
    return pa.Array.from_buffers(pa.bool_(), len(values), [None, pa.py_buffer(bits)])


def typed_array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Return an array of `kind`: string, bool, int64, float64, date32 or timestamp in us.

    None becomes null. Raises `OverflowError` for an integer beyond 64 bits.
    """
    if kind == pa.string():
        return text_array(values)
    if kind == pa.bool_():
        bits = np.packbits([bool(value) for value in values], bitorder="little")
        return pa.Array.from_buffers(kind, len(values), [_validity(values), pa.py_buffer(bits)])
    number, dtype = _NUMBERS[kind]
    numbers = np.array([0 if v is None else number(v) for v in values], dtype=dtype)
    return pa.Array.from_buffers(kind, len(values), [_validity(values), pa.py_buffer(numbers)])


def _validity(values: Sequence[Any]) -> pa.Buffer | None:
    if None not in values:
        return None
    bits = np.packbits([value is not None for value in values], bitorder="little")
    return pa.py_buffer(bits)


def _microseconds(value: datetime) -> int:
    return (value - _EPOCH) // _MICROSECOND


def _naive_microseconds(value: datetime) -> int:
    return (value - _NAIVE_EPOCH) // _MICROSECOND


def _days(value: date) -> int:
    return value.toordinal() - _NAIVE_EPOCH.toordinal()


_NUMBERS: dict[pa.DataType, tuple[Callable[[Any], Any], type[np.generic]]] = {
    pa.int64(): (int, np.int64),
    pa.float64(): (float, np.float64),
    pa.date32(): (_days, np.int32),
    TIMESTAMP_UTC: (_microseconds, np.int64),
    TIMESTAMP: (_naive_microseconds, np.int64),
}

"""Vectors as Arrow: from 32-bit floats in bytes, and back as bytes or text, without Python floats.

Bytes are little-endian float32, as the API sends them in base64 (API reference, "Create
embeddings", `encoding_format`) and as sqlite-vec and `numpy.frombuffer(value, "<f4")` read them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from include.arrow_columns import text_array

FLOAT_BYTES = 4


def vector_type(size: int) -> pa.DataType:
    """Return the type of vectors of `size` numbers; the numbers themselves are never null."""
    return pa.list_(pa.field("element", pa.float32(), nullable=False), size)


def is_vector(kind: pa.DataType) -> bool:
    """Tell whether a column of `kind` holds vectors."""
    return bool(pa.types.is_fixed_size_list(kind) and kind.value_type == pa.float32())


def packed_type(size: int) -> pa.DataType:
    """Return the type of the same vectors in an outcomes file: their bytes.

    Parquet writes it in a third of the time of a list, and reads it in a fifth.
    """
    return pa.binary(FLOAT_BYTES * size)


def is_packed(kind: pa.DataType) -> bool:
    """Tell whether a column of `kind` holds vectors as bytes."""
    return bool(pa.types.is_fixed_size_binary(kind))


def packed_numbers(numbers: Sequence[float]) -> bytes:
    """Return the bytes of one vector; a number beyond float32 becomes infinite."""
    with np.errstate(over="ignore"):
        return np.array(numbers, dtype="<f4").tobytes()


def packed_array(values: Sequence[bytes | None], kind: pa.DataType) -> pa.Array:
    """Return an array of vectors from their bytes; None becomes null."""
    nothing = bytes(kind.byte_width)
    data = b"".join(nothing if value is None else value for value in values)
    valid = None
    if None in values:
        bits = np.packbits([value is not None for value in values], bitorder="little")
        valid = pa.py_buffer(bits)
    return pa.Array.from_buffers(kind, len(values), [valid, pa.py_buffer(data)])


def unpacked(column: pa.Array) -> pa.Array:
    """Return packed vectors as lists of numbers that share their memory."""
    size = column.type.byte_width // FLOAT_BYTES
    start, end = column.offset * size, (column.offset + len(column)) * size
    buffers = [None, column.buffers()[1]]
    numbers = pa.Array.from_buffers(pa.float32(), end, buffers).slice(start)
    valid = None
    if column.null_count:
        bits = np.packbits([one.is_valid for one in column], bitorder="little")
        valid = pa.py_buffer(bits)
    return pa.Array.from_buffers(vector_type(size), len(column), [valid], children=[numbers])


def as_binary(column: pa.Array) -> pa.Array:
    """Return the vectors as fixed-size binaries that share their memory."""
    size = column.type.list_size
    numbers = _numbers(column)
    width = FLOAT_BYTES * size
    data = numbers.buffers()[1].slice(numbers.offset * FLOAT_BYTES, width * len(column))
    valid = None
    if column.null_count:
        bits = np.packbits([one.is_valid for one in column], bitorder="little")
        valid = pa.py_buffer(bits)
    return pa.Array.from_buffers(pa.binary(width), len(column), [valid, data])


def as_texts(column: pa.Array, opening: str, closing: str) -> pa.Array:
    """Return each vector as text, its numbers in the fewest digits that give the same float32.

    A null stays null.
    """
    size = column.type.list_size
    offsets = np.arange(0, (len(column) + 1) * size, max(size, 1), dtype=np.int32)
    starts = pa.Array.from_buffers(pa.int32(), len(offsets), [None, pa.py_buffer(offsets)])
    lists = pa.ListArray.from_arrays(starts, _numbers(column).cast(pa.string()))
    marks = text_array([opening, closing, ",", ""])
    joined = pc.binary_join(lists, marks[2])
    whole = pc.binary_join_element_wise(marks[0], joined, marks[1], marks[3])
    return pc.if_else(column.is_valid(), whole, text_array([None])[0])


def rows_at_once(kinds: Sequence[pa.DataType], most: int, most_bytes: int) -> int:
    """Return how many rows with columns of `kinds` to hold: `most`, fewer when vectors are long."""
    width = sum(FLOAT_BYTES * kind.list_size for kind in kinds if is_vector(kind))
    width += sum(kind.byte_width for kind in kinds if is_packed(kind))
    return max(1, min(most, most_bytes // width)) if width else most


def _numbers(column: pa.Array) -> pa.Array:
    """Return the numbers of all vectors of this slice, those of nulls too."""
    size = column.type.list_size
    return column.values.slice(column.offset * size, len(column) * size)

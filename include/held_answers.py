"""The answers of a shard in the order of their arrival, and then in the order of its index.

A shard of long answers (50,000 vectors are 1.7 GB) is more than a worker holds. From some size on
only the place of an answer's line is kept; the line is read again when its row is written.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from include.answer_reader import Reader
from include.answer_schema import Record
from include.arrow_columns import integer_array
from include.outcome_columns import (
    CHUNK_ROWS,
    TOKEN_COLUMNS,
    TOKEN_GETTERS,
    answer_schema,
    column_array,
)
from include.output_columns import Kind
from include.result_file import CompletionUsage, TokenUsage, token_counts

HELD_BYTES = 16 << 20  # of answers; further ones are read again
CHUNK_BYTES = 1 << 20  # of lines whose answers wait to become Arrow, or are read again at once
NO_LINE = -1

Usage = TokenUsage | CompletionUsage | None
Numbers = npt.NDArray[np.int64]
Again = Callable[[int, int, int], Record]


class HeldAnswers:
    """Output values and tokens; what is added gets a slot, counted from 0.

    `again` returns the record of a line, given the number of its file, its offset and its size.
    Memory: `HELD_BYTES`, nothing of vectors, and 60 bytes for each answer.
    """

    def __init__(self, reader: Reader, again: Again) -> None:
        self._names = [column.name for column in reader.columns]
        self._schema = answer_schema(reader.columns)
        self._getters = reader.getters
        self._nothing = reader.nothing
        self._again = again
        self._batches: list[pa.RecordBatch] = []
        self._records: list[Record] = []
        self._usages: list[Usage] = []
        self._tokens: list[Numbers] = []
        # A vector is read again for less than it costs to hold it, and to put it in order.
        is_vector = any(column.kind is Kind.VECTOR for column in reader.columns)
        self._most = 0 if is_vector else HELD_BYTES
        self._held = self._slots = self._bytes = self._pending = 0
        self._lines = array("q")  # file, offset and size of each line that is not held

    @property
    def full(self) -> bool:
        """Whether answers are to be added by their place from now on."""
        return self._bytes >= self._most

    def add(self, record: Record, usage: Usage) -> int:
        """Hold one answer; return its slot."""
        slot = self._slots
        self._slots = slot + 1
        self._records.append(record)
        self._usages.append(usage)
        return slot

    def add_place(self, file: int, offset: int, size: int, usage: Usage) -> int:
        """Remember where an answer is; return its slot. Nothing is held after the first of them."""
        slot = self._slots
        self._slots = slot + 1
        self._lines.extend((file, offset, size))
        self._usages.append(usage)
        return slot

    def add_nothing(self, usage: Usage) -> int:
        """Hold the tokens of a line without an answer; return its slot."""
        if self.full:
            return self.add_place(NO_LINE, 0, 0, usage)
        return self.add(self._nothing, usage)

    def passed(self, size: int) -> None:
        """Tell that lines of `size` bytes have been read; makes Arrow of what they have brought."""
        self._pending += size
        if len(self._usages) >= CHUNK_ROWS or self._pending >= CHUNK_BYTES:
            self._flush()

    def _flush(self) -> None:
        self._pending = 0
        if self._usages:
            self._tokens.append(_token_numbers(self._usages))
            self._usages.clear()
        if self._records:
            self._held += len(self._records)
            batch = self._values(self._records)
            self._bytes += batch.nbytes
            self._batches.append(batch)
            self._records.clear()

    def _values(self, records: Sequence[Record]) -> pa.RecordBatch:
        arrays = [
            column_array(list(map(get, records)), kind)
            for get, kind in zip(self._getters, self._schema.types, strict=False)
        ]
        return pa.RecordBatch.from_arrays(arrays, names=self._names)

    def in_order(self, slots: Numbers) -> Iterator[pa.Table]:
        """Yield one row per slot, some at a time; for slot -1 values are null and tokens 0."""
        self._flush()
        fields = [self._schema.field(name) for name in self._names]
        held = pa.Table.from_batches(self._batches, schema=pa.schema(fields)).combine_chunks()
        self._batches.clear()
        tokens = np.concatenate([*self._tokens, np.zeros((1, len(TOKEN_COLUMNS)), np.int64)])
        lines = np.frombuffer(self._lines, dtype=np.int64).reshape(-1, 3)
        for part in self._parts(slots, lines):
            counts = [integer_array(column) for column in tokens[part].T]
            values = self._ordered(held, part, lines)
            yield pa.Table.from_arrays([*values.columns, *counts], schema=self._schema)

    def _parts(self, slots: Numbers, lines: Numbers) -> Iterator[Numbers]:
        """Cut the slots into parts whose lines can be in memory at once."""
        sizes = np.concatenate([np.zeros(self._held, np.int64), lines[:, 2], [0]])[slots]
        ends, start = np.cumsum(sizes), 0
        while start < len(slots):
            done = ends[start] - sizes[start]
            most = int(np.searchsorted(ends, done + CHUNK_BYTES, side="right"))
            end = min(max(most, start + 1), start + CHUNK_ROWS)
            yield slots[start:end]
            start = end

    def _ordered(self, held: pa.Table, slots: Numbers, lines: Numbers) -> pa.Table:
        is_line = slots >= self._held
        if not is_line.any():
            return held.take(_indices(slots))
        again = [self._read(*lines[slot - self._held].tolist()) for slot in slots[is_line]]
        table = pa.Table.from_batches([self._values(again)])
        if is_line.all():
            return table
        both = pa.concat_tables([held.take(_indices(slots[~is_line])), table]).combine_chunks()
        places = np.concatenate([np.flatnonzero(~is_line), np.flatnonzero(is_line)])
        return both.take(integer_array(np.argsort(places)))

    def _read(self, file: int, offset: int, size: int) -> Record:
        return self._nothing if file == NO_LINE else self._again(file, offset, size)


def _token_numbers(usages: list[Usage]) -> Numbers:
    """Return a row of four counts for each; five times as fast when every usage is complete."""
    try:
        counts = [np.array(list(map(get, usages)), dtype=np.int64) for get in TOKEN_GETTERS]
    except (AttributeError, TypeError):  # a part is None
        return np.array([token_counts(usage) for usage in usages], dtype=np.int64)
    return np.stack(counts, axis=1)


def _indices(slots: Numbers) -> pa.Array:
    """Return the slots for `take`, with null for -1."""
    valid = np.packbits(slots >= 0, bitorder="little")
    buffers = [pa.py_buffer(valid), pa.py_buffer(np.maximum(slots, 0))]
    return pa.Array.from_buffers(pa.int64(), len(slots), buffers)

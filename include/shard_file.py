"""Request files: lines go in, shards within the limits come out, with their index files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from include.arrow_columns import integers
from include.artifacts import Artifacts
from include.endpoints import MAX_INPUTS
from include.row_identity import CUSTOM_ID_CHARACTERS
from include.row_stream import Rows
from include.run_policy import Limits

BYTES_PER_TOKEN = 4
LINES_PER_WRITE = 256
INDEX_ROWS_PER_GROUP = 10_000


def estimated_tokens(size: int) -> int:
    """Return the input tokens that `size` bytes of a body count for, before anything is known."""
    return -(-size // BYTES_PER_TOKEN)


@dataclass(frozen=True)
class Shard:
    """One finished request file. `digest` is a sha256 (hex): other requests, other digest."""

    number: int  # from 1
    request_file: str
    index_file: str
    digest: str
    requests: int
    bytes: int
    input_tokens: int  # estimated


@dataclass(frozen=True)
class LineParts:
    """What every line has in common: `head + custom_id + middle + body + tail`."""

    head: bytes
    middle: bytes
    tail: bytes
    body_constant: int  # bytes of the body that are in `middle` and `tail`
    ids_tell_bodies: bool  # equal custom_ids have equal bodies

    @property
    def constant(self) -> int:
        """Return the bytes of a line without the varying part of its body."""
        return len(self.head) + CUSTOM_ID_CHARACTERS + len(self.middle) + len(self.tail)


class ShardWriter:
    """Cuts lines into shards by requests, bytes, estimated tokens and embedding inputs.

    The first shard holds at most `first` requests, if given.

    `add` takes lines in the order of their `_row`. A shard's two files appear whole when it is
    full. Memory: 256 lines and one row group of the index. Use as a context manager; `finish`
    returns the shards.
    """

    def __init__(
        self, artifacts: Artifacts, directory: str, limits: Limits, *, first: int | None = None
    ) -> None:
        self._artifacts = artifacts
        self._directory = directory
        self._limits = limits
        self._first_limits = _at_most(limits, first)
        self._shards: list[Shard] = []
        self._open: _OpenShard | None = None
        self._last_row = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._open is not None:
            self._open.abandon(kind, error, trace)

    def fits(self, parts: LineParts, varying: int) -> bool:
        """Tell whether a line with `varying` bytes of its own may be in any batch at all."""
        tokens = self._limits.enqueued_tokens
        return parts.constant + varying <= self._limits.bytes_per_batch and (
            tokens is None or estimated_tokens(parts.body_constant + varying) <= tokens
        )

    def add(
        self,
        parts: LineParts,
        ids: Sequence[bytes],
        bodies: Sequence[bytes],
        index: pa.RecordBatch,
        inputs: Rows | None = None,
    ) -> None:
        """Append one line per row of `index`, whose first column is `_row` and last `_custom_id`.

        Each of them must fit by itself. `bodies` are the varying parts of the bodies; `inputs`
        are the texts in each, one unless given.
        """
        rows = integers(index.column(0))
        if len(rows) and (rows[0] <= self._last_row or (np.diff(rows) <= 0).any()):
            raise AssertionError(f"_row does not ascend after {self._last_row}")
        varying = np.fromiter(map(len, bodies), dtype=np.int64, count=len(bodies))
        sizes = varying + parts.constant
        tokens = -(-(varying + parts.body_constant) // BYTES_PER_TOKEN)
        start = 0
        while start < len(ids):
            shard = self._open or self._begin()
            room = shard.room(sizes[start:], tokens[start:])
            end = start + (room if inputs is None else shard.room_for_inputs(inputs[start:], room))
            shard.write(parts, ids[start:end], bodies[start:end], index[start:end])
            shard.count(int(sizes[start:end].sum()), int(tokens[start:end].sum()))
            start = end
            if start < len(ids):
                self._cut()
        if len(rows):
            self._last_row = int(rows[-1])

    def finish(self) -> tuple[Shard, ...]:
        """Close the last shard and return all of them."""
        self._cut()
        return tuple(self._shards)

    def _begin(self) -> _OpenShard:
        name = f"{self._directory}/shard-{len(self._shards) + 1:04d}"
        limits = self._limits if self._shards else self._first_limits
        self._open = _OpenShard(self._artifacts, name, limits)
        return self._open

    def _cut(self) -> None:
        if self._open is not None:
            self._shards.append(self._open.close(len(self._shards) + 1))
            self._open = None


def _at_most(limits: Limits, requests: int | None) -> Limits:
    if requests is None or requests >= limits.requests_per_batch:
        return limits
    return limits.model_copy(update={"requests_per_batch": requests})


class _OpenShard:
    """The request file and the index file that are being written."""

    def __init__(self, artifacts: Artifacts, name: str, limits: Limits) -> None:
        self._name = name
        self._limits = limits
        self._stack = ExitStack()
        self._lines = self._stack.enter_context(artifacts.create(f"{name}.jsonl"))
        self._index_stream = self._stack.enter_context(artifacts.create(f"{name}.index.parquet"))
        self._index: pq.ParquetWriter | None = None
        self._pending: list[pa.RecordBatch] = []
        self._digest = hashlib.sha256()
        self._seen: set[bytes] = set()
        self._requests = self._bytes = self._tokens = self._inputs = 0

    def room(self, sizes: Rows, tokens: Rows) -> int:
        """Return how many of the next lines this shard can still take."""
        limits = self._limits
        room = min(len(sizes), limits.requests_per_batch - self._requests)
        left = limits.bytes_per_batch - self._bytes
        room = min(room, int(np.searchsorted(np.cumsum(sizes), left, side="right")))
        if limits.enqueued_tokens is not None:
            left = limits.enqueued_tokens - self._tokens
            room = min(room, int(np.searchsorted(np.cumsum(tokens), left, side="right")))
        if not room and not self._requests:
            raise AssertionError("a line that fits into no batch was not rejected")
        return room

    def room_for_inputs(self, inputs: Rows, room: int) -> int:
        """Return how many of the next `room` lines this shard can take, and count their texts."""
        totals = self._inputs + np.cumsum(inputs[:room])
        room = int(np.searchsorted(totals, MAX_INPUTS, side="right"))
        self._inputs = int(totals[room - 1]) if room else self._inputs
        return room

    def write(
        self, parts: LineParts, ids: Sequence[bytes], bodies: Sequence[bytes], index: pa.RecordBatch
    ) -> None:
        """Append the lines and their index."""
        if not ids:
            return
        self._seen.update(ids)
        if len(self._seen) != self._requests + len(ids):
            raise AssertionError(f"{self._name} would hold a custom_id twice")
        self._requests += len(ids)
        for start in range(0, len(ids), LINES_PER_WRITE):
            end = start + LINES_PER_WRITE
            data = _joined_lines(parts, ids[start:end], bodies[start:end])
            # A custom_id is a digest of its body already: to read all bytes again is a fifth of
            # the whole build.
            self._digest.update(b"".join(ids[start:end]) if parts.ids_tell_bodies else data)
            self._lines.write(data)
        self._pending.append(index)
        if sum(batch.num_rows for batch in self._pending) >= INDEX_ROWS_PER_GROUP:
            self._flush_index()

    def count(self, size: int, tokens: int) -> None:
        """Note the bytes and tokens of what has been written."""
        self._bytes += size
        self._tokens += tokens

    def close(self, number: int) -> Shard:
        """Make both files appear."""
        self._flush_index()
        if self._index is not None:
            self._index.close()
        self._stack.close()
        return Shard(
            number,
            f"{self._name}.jsonl",
            f"{self._name}.index.parquet",
            self._digest.hexdigest(),
            self._requests,
            self._bytes,
            self._tokens,
        )

    def abandon(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave nothing behind, neither file."""
        error = error or RuntimeError("the request file was not finished")
        self._stack.__exit__(kind or type(error), error, trace)

    def _flush_index(self) -> None:
        if not self._pending:
            return
        table = pa.Table.from_batches(self._pending)
        if self._index is None:
            self._index = _index_writer(self._index_stream, table.schema)
        self._index.write_table(table)
        self._pending.clear()


def _index_writer(stream: BinaryIO, schema: pa.Schema) -> pq.ParquetWriter:
    """Return a writer that tries neither dictionaries nor compression where all values differ."""
    compression = dict.fromkeys(schema.names, "zstd") | {"_custom_id": "none"}
    return pq.ParquetWriter(
        stream, schema, compression=compression, use_dictionary=False, write_statistics=False
    )


def _joined_lines(parts: LineParts, ids: Sequence[bytes], bodies: Sequence[bytes]) -> bytes:
    """Return the lines as one piece: constants and parts interleaved by slices, then one join."""
    count = len(ids)
    pieces = [parts.tail + parts.head] * (4 * count)
    pieces[0] = parts.head
    pieces[1::4] = ids
    pieces[2::4] = [parts.middle] * count
    pieces[3::4] = bodies
    pieces.append(parts.tail)
    return b"".join(pieces)

"""Rows whose requests are identical: one is sent, the others take a copy of its outcome.

The first row of a body leads, the rows that share it follow. Followers are written down at build
and read again at load, both in the order of their leaders, so neither step holds all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from include.arrow_columns import boolean_array, fixed_text_array, integer_array, integers
from include.artifacts import Artifacts
from include.row_identity import CUSTOM_ID_CHARACTERS
from include.row_stream import Rows, row_numbers

MOST_LEADERS = 500_000  # bodies that are remembered, some 80 MB; others are sent for themselves
LEADERS_PER_BUCKET = 1 << 18  # row numbers; a bucket of followers is sorted in memory
ROWS_PER_GROUP = 10_000
LEADER = "_leader"


class SharedRows:
    """Finds identical bodies while a round is built. Use as a context manager.

    Memory: `most` digests of bodies, and at the end the followers of one bucket.
    """

    def __init__(self, artifacts: Artifacts, path: str, most: int = MOST_LEADERS) -> None:
        self._artifacts = artifacts
        self._path = path
        self._most = most
        self._leaders: dict[bytes, int] = {}
        self._writers: dict[int, pa.RecordBatchFileWriter] = {}
        self._stack, self._written = ExitStack(), ExitStack()
        self.count = 0

    def __enter__(self) -> Self:
        self._folder = Path(self._stack.enter_context(TemporaryDirectory(prefix="llm-batch-")))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._written.close()
        self._stack.close()

    def leaders(self, bodies: Sequence[bytes], rows: Rows) -> Rows:
        """Return for each row the row that leads it: itself when its body is new."""
        known, most = self._leaders, self._most
        found = []
        for body, row in zip(bodies, rows.tolist(), strict=True):
            digest = blake2b(body, digest_size=16).digest()
            leader = known.get(digest)
            if leader is None:
                leader = row
                if len(known) < most:
                    known[digest] = row
            found.append(leader)
        return np.array(found, dtype=np.int64)

    def add(self, keys: pa.RecordBatch, ids: Sequence[bytes], leaders: Rows) -> None:
        """Note followers: their keys, their own custom_ids, and the rows that lead them."""
        batch = pa.RecordBatch.from_arrays(
            [
                integer_array(leaders),
                *keys.columns,
                fixed_text_array(b"".join(ids), CUSTOM_ID_CHARACTERS),
            ],
            names=[LEADER, *keys.schema.names, "_custom_id"],
        )
        buckets = leaders // LEADERS_PER_BUCKET
        for bucket in np.unique(buckets).tolist():
            self._bucket(bucket, batch.schema).write_batch(
                batch.filter(boolean_array(buckets == bucket))
            )
        self.count += batch.num_rows

    def _bucket(self, number: int, schema: pa.Schema) -> pa.RecordBatchFileWriter:
        if number not in self._writers:
            sink = self._written.enter_context(self._file(number).open("wb"))
            self._writers[number] = self._written.enter_context(pa.ipc.new_stream(sink, schema))
        return self._writers[number]

    def _file(self, number: int) -> Path:
        return self._folder / f"followers-{number}"

    def finish(self) -> str | None:
        """Write the followers by leader; return the file's path, None when there are none."""
        if not self._writers:
            return None
        self._written.close()
        with self._artifacts.create(self._path) as sink, ExitStack() as open_:
            target: pq.ParquetWriter | None = None
            for number in sorted(self._writers):
                table = self._sorted(number)
                target = target or open_.enter_context(pq.ParquetWriter(sink, table.schema))
                target.write_table(table, row_group_size=ROWS_PER_GROUP)
        return self._path

    def _sorted(self, number: int) -> pa.Table:
        with pa.memory_map(str(self._file(number))) as source:
            table = pa.ipc.open_stream(source).read_all().combine_chunks()
            order = np.argsort(integers(table.column(LEADER).chunk(0)), kind="stable")
            return table.take(integer_array(order))


class Followers:
    """Hands out the followers of outcomes that are read in the order of their rows."""

    def __init__(self, batches: Iterator[pa.RecordBatch], key: Sequence[str]) -> None:
        self._batches = batches
        self._rest: pa.RecordBatch | None = None
        self._own = (*key, "_custom_id")

    def of(self, outcomes: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        """Yield a copy of `outcomes` (with `_row`) for their followers, a bounded piece a time.

        A follower whose leader is not among them, but before their end, is passed over: it has
        another outcome, in another round.
        """
        if not outcomes.num_rows:
            return
        end = int(row_numbers(outcomes)[-1]) + 1
        while (batch := self._rest or next(self._batches, None)) is not None:
            count = int(np.searchsorted(integers(batch.column(LEADER)), end))
            rest = batch.slice(count)
            self._rest = rest if rest.num_rows else None
            for at in range(0, count, outcomes.num_rows):
                piece = batch.slice(at, min(outcomes.num_rows, count - at))
                yield self._copied(outcomes, piece)
            if rest.num_rows:
                return

    def _copied(self, outcomes: pa.RecordBatch, followers: pa.RecordBatch) -> pa.RecordBatch:
        rows, leaders = row_numbers(outcomes), integers(followers.column(LEADER))
        at = np.searchsorted(rows, leaders)
        is_here = rows[at] == leaders
        copy = outcomes.take(integer_array(at[is_here]))
        ours = followers.filter(boolean_array(is_here))
        for name in self._own:
            copy = copy.set_column(copy.schema.get_field_index(name), name, ours.column(name))
        return copy

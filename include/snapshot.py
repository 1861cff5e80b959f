"""The immutable Parquet copy of a partition's rows, and how it is written.

A row is named by its position in the file (`_row`, counted from 0). Row groups hold at most
10,000 rows, so a later round reads only the groups that have open rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from include.column_types import column_array, common_type, observed_type

ROWS_PER_GROUP = 10_000
BYTES_PER_GROUP = 16 << 20  # wide rows make smaller groups
REJECTIONS_SCHEMA = pa.schema(
    [
        ("_row", pa.int64()),
        ("_reason", pa.string()),
        ("_source_rows", pa.int64()),
        ("_message", pa.string()),  # null: the usual one of the reason
    ]
)


@dataclass(frozen=True)
class Snapshot:
    """What `extract` found.

    `rejections_file` (Parquet, ascending `_row`) lists rows that cannot become requests: `_reason`
    is null_key, duplicate_key, bad_text or broken_row; `_source_rows` is the number of rows that
    the entry speaks for, 0 when an earlier row of the same key does. `unsampled` rows were left
    out by the job's sample and are not in the file.
    """

    path: str
    rows: int
    columns: tuple[str, ...]
    rejections_file: str | None = None
    duplicate_keys: int = 0
    unsampled: int = 0

    def to_json(self) -> str:
        """Return the snapshot as JSON text (under 1 KiB for up to some 50 columns)."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        data = json.loads(text)
        return cls(**{**data, "columns": tuple(data["columns"])})


class SnapshotWriter:
    """Writes batches of rows to a local Parquet file whose column types may have to widen.

    When a batch does not fit the types so far, the file is copied once with the wider type; each
    column widens at most twice. Memory: one row group.
    """

    def __init__(self, folder: Path, names: Sequence[str], types: Sequence[pa.DataType]) -> None:
        self._folder = folder
        self._names = list(names)
        self._types = list(types)
        self._parts = 0
        self._pending: list[pa.RecordBatch] = []
        self._writer: pq.ParquetWriter | None = None
        self.path = folder / "snapshot-0.parquet"

    def write(self, columns: Sequence[Sequence[Any]]) -> list[int]:
        """Append rows given by column; return the positions that hold invalid Unicode."""
        self._widen([observed_type(values) for values in columns])
        arrays, bad = [], set[int]()
        for values, kind in zip(columns, self._stored_types(), strict=True):
            array, positions = column_array(values, kind)
            arrays.append(array)
            bad.update(positions)
        self._pending.append(pa.RecordBatch.from_arrays(arrays, names=self._names))
        self._flush(whole=False)
        return sorted(bad)

    def close(self) -> None:
        """Finish the file at `path`."""
        self._flush(whole=True)
        self._open().close()

    def _stored_types(self) -> list[pa.DataType]:
        return [pa.string() if pa.types.is_null(kind) else kind for kind in self._types]

    def _widen(self, observed: list[pa.DataType]) -> None:
        before = self._stored_types()
        self._types = [
            common_type(old, new) for old, new in zip(self._types, observed, strict=True)
        ]
        after = self._stored_types()
        if before == after:
            return
        if self._writer is None and not self._pending:
            return
        # A column of nulls so far is stored as text, and stays text from here on.
        self._types = [
            pa.string() if old != new else kind
            for old, new, kind in zip(before, after, self._types, strict=True)
        ]
        if before != self._stored_types():
            self._rewrite()

    def _rewrite(self) -> None:
        """Copy what was written so far into a new file with the wider types."""
        self._flush(whole=True)
        self._open().close()
        old, self._writer = self.path, None
        self._parts += 1
        self.path = self._folder / f"snapshot-{self._parts}.parquet"
        with pq.ParquetFile(old) as source:
            for group in range(source.num_row_groups):
                self._open().write_batch(self._converted(source.read_row_group(group)))
        old.unlink()

    def _converted(self, table: pa.Table) -> pa.RecordBatch:
        arrays = []
        for column, kind in zip(table.columns, self._stored_types(), strict=True):
            same = column.type == kind
            arrays.append(
                column.combine_chunks() if same else column_array(column.to_pylist(), kind)[0]
            )
        return pa.RecordBatch.from_arrays(arrays, names=self._names)

    def _flush(self, *, whole: bool) -> None:
        rows = sum(batch.num_rows for batch in self._pending)
        size = sum(batch.nbytes for batch in self._pending)
        if rows and (whole or rows >= ROWS_PER_GROUP or size >= BYTES_PER_GROUP):
            table = pa.Table.from_batches(self._pending)
            self._open(table.schema).write_table(table, row_group_size=ROWS_PER_GROUP)
            self._pending.clear()

    def _open(self, schema: pa.Schema | None = None) -> pq.ParquetWriter:
        if self._writer is None:
            named = zip(self._names, self._stored_types(), strict=True)
            self._writer = pq.ParquetWriter(
                self.path, schema or pa.schema(list(named)), compression="zstd"
            )
        return self._writer

"""The lines that decide no outcome, noted by file and position.

Their text is not copied: the raw files stay as artifacts, and offset and length find it there.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from include.artifacts import Artifacts
from include.classification import clipped
from include.outcome_columns import column_array
from include.result_file import Damage
from include.result_lines import Line

CHUNK_ROWS = 10_000
SCHEMA = pa.schema(
    [
        ("_file", pa.string()),  # output or error
        ("_line", pa.int64()),  # from 1
        ("_offset", pa.int64()),  # bytes
        ("_length", pa.int64()),  # bytes without the line end
        ("_reason", pa.string()),
        ("_custom_id", pa.string()),  # null when the line does not say
    ]
)


@dataclass
class Quarantine:
    """Writes the quarantine Parquet of one batch; there is none when every line was used.

    `damaged` counts the lines that cannot be used, foreign ones among them; duplicates count apart.
    """

    artifacts: Artifacts
    path: str
    damaged: int = 0
    duplicates: int = 0
    foreign: int = 0
    file: str | None = None
    _rows: list[tuple[Any, ...]] = field(default_factory=list)
    _stack: ExitStack = field(default_factory=ExitStack)
    _writer: pq.ParquetWriter | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._flush()
        self._stack.__exit__(kind, error, trace)

    def add(self, file: str, line: Line, reason: Damage, custom_id: str | None) -> None:
        """Note one line."""
        self.duplicates += reason is Damage.DUPLICATE
        self.damaged += reason is not Damage.DUPLICATE
        self.foreign += reason is Damage.FOREIGN
        found = clipped(custom_id)
        self._rows.append((file, line.number, line.offset, line.length, reason.value, found))
        if len(self._rows) >= CHUNK_ROWS:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            sink = self._stack.enter_context(self.artifacts.create(self.path))
            self._writer = self._stack.enter_context(pq.ParquetWriter(sink, SCHEMA))
            self.file = self.path
        columns = zip(SCHEMA, zip(*self._rows, strict=True), strict=True)
        arrays = [column_array(values, part.type) for part, values in columns]
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=SCHEMA))
        self._rows.clear()

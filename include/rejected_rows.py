"""Rows that never become a request, with the reason that the failures table will show."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from include.arrow_columns import integer_array, text_array
from include.artifacts import Artifacts
from include.column_types import column_texts
from include.row_identity import key_json, rejected_id
from include.row_stream import Rows

# What extract finds; the other reasons come with a message of their own.
MESSAGES = {
    "null_key": "a key column is null; fill it, or leave such rows out of the source",
    "duplicate_key": "the source has several rows with this key; none of them was sent",
    "broken_row": "a line of the source is no row; the log of extract says which",
    "bad_text": "a text of this row is not valid Unicode (undecodable bytes or a lone surrogate)",
}


@dataclass(frozen=True)
class Rejection:
    """Why one row was rejected.

    `source_rows` is the number of rows that it speaks for: 0 when an earlier row of the same key
    does. `custom_id` is None when the request could not be made.
    """

    reason: str
    message: str
    source_rows: int = 1
    custom_id: str | None = None


def rejections_by_row(batches: list[pa.RecordBatch]) -> dict[int, Rejection]:
    """Return what extract rejected, by `_row`."""
    found = {}
    for batch in batches:
        columns = (batch.column(name).to_pylist() for name in batch.schema.names)
        for row, reason, source_rows, *message in zip(*columns, strict=True):
            # Files of an earlier release have no messages.
            said = next((text for text in message if text), MESSAGES[reason])
            found[row] = Rejection(reason, said, source_rows)
    return found


class RejectionWriter:
    """Writes rejected rows, by ascending `_row`; there is no file when there are none.

    Columns: `_row`, the key columns, `_custom_id` (never null: made of key and reason when there
    was no request), `_reason`, `_error_message`, `_source_rows`. Use as a context manager.
    """

    def __init__(self, artifacts: Artifacts, path: str) -> None:
        self._artifacts = artifacts
        self._path = path
        self._stack = ExitStack()
        self._writer: pq.ParquetWriter | None = None
        self._finished = False
        self.source_rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._finished:
            error = error or RuntimeError("the rejected rows were not finished")
            self._stack.__exit__(kind or type(error), error, trace)

    def add(self, keys: pa.RecordBatch, rows: Rows, rejected: Mapping[int, Rejection]) -> None:
        """Append the rows of `rejected` (by `_row`); `keys` and `rows` describe the same rows."""
        entries = sorted((row, why) for row, why in rejected.items() if why.source_rows)
        if not entries:
            return
        numbers = np.array([row for row, _ in entries], dtype=np.int64)
        taken = keys.take(integer_array(np.searchsorted(rows, numbers)))
        batch = _entries(taken, numbers, [why for _, why in entries])
        if self._writer is None:
            stream = self._stack.enter_context(self._artifacts.create(self._path))
            self._writer = pq.ParquetWriter(stream, batch.schema, compression="zstd")
        self._writer.write_batch(batch)
        self.source_rows += sum(why.source_rows for _, why in entries)

    def finish(self) -> str | None:
        """Make the file appear; return its path, None when no row was rejected."""
        if self._writer is not None:
            self._writer.close()
        self._finished = True
        self._stack.close()
        return None if self._writer is None else self._path


def _entries(keys: pa.RecordBatch, rows: Rows, reasons: list[Rejection]) -> pa.RecordBatch:
    texts = zip(*(column_texts(column) for column in keys.columns), strict=True)
    ids = [
        why.custom_id or rejected_id(key_json(key), why.reason)
        for key, why in zip(texts, reasons, strict=True)
    ]
    columns: dict[str, Any] = {
        "_row": integer_array(rows),
        **dict(zip(keys.schema.names, keys.columns, strict=True)),
        "_custom_id": text_array(ids),
        "_reason": text_array([why.reason for why in reasons]),
        "_error_message": text_array([why.message for why in reasons]),
        "_source_rows": integer_array(np.array([why.source_rows for why in reasons])),
    }
    return pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))

"""Record batches ordered by `_row`, read alongside another file of the same order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from include.arrow_columns import integers

Rows = npt.NDArray[np.int64]


class RowStream:
    """A merge cursor: `until(end)` returns what lies before `end` and has not been returned yet.

    Memory: what is returned, and one batch.
    """

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches = batches
        self._batch: pa.RecordBatch | None = None
        self._last = -1

    def until(self, end: int) -> list[pa.RecordBatch]:
        """Return the rows with `_row < end`, none empty. Raises `ValueError` for a wrong order."""
        parts = []
        while (batch := self._batch or next(self._batches, None)) is not None:
            count = int(np.searchsorted(row_numbers(batch), end))
            part, rest = batch.slice(0, count), batch.slice(count)
            self._batch = rest if rest.num_rows else None
            if count:
                self._check_order(row_numbers(part))
                parts.append(part)
            if rest.num_rows:
                break
        return parts

    def _check_order(self, rows: Rows) -> None:
        if rows[0] <= self._last or (np.diff(rows) <= 0).any():
            raise ValueError(f"_row does not ascend after {self._last}")
        self._last = int(rows[-1])


def row_numbers(batch: pa.RecordBatch) -> Rows:
    """Return the `_row` column as numbers."""
    return integers(batch.column("_row"))

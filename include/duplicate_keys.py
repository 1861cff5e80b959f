"""Finding keys that come more than once, in memory that does not grow with the number of rows."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt

BUCKETS = 64  # 10 million rows are 240 MB on disk, and 4 MB in memory for one bucket
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<i8")])
Rows = npt.NDArray[np.int64]


class DuplicateKeys:
    """Collects (key digest, row) on disk and tells at the end which rows share a key.

    Digests are 16 bytes, so two different keys do not meet. Memory: one bucket, and 16 bytes for
    every row that shares its key. Use as a context manager; `folder` must exist.
    """

    def __init__(self, folder: Path) -> None:
        self._paths = [folder / f"keys-{number:02d}" for number in range(BUCKETS)]
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._files: list[BinaryIO] = [
            self._stack.enter_context(path.open("wb")) for path in self._paths
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def add(self, digests: bytes, first_row: int) -> None:
        """Note the digests (16 bytes each, end to end) of the rows from `first_row` on."""
        pairs = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
        records = np.empty(len(pairs), dtype=_RECORD)
        records["high"], records["low"] = pairs[:, 0], pairs[:, 1]
        records["row"] = np.arange(first_row, first_row + len(pairs))
        buckets = records["low"] % BUCKETS
        for bucket in np.unique(buckets):
            self._files[bucket].write(records[buckets == bucket].tobytes())

    def find(self) -> tuple[Rows, Rows]:
        """Return (rows, counts), by ascending row, of all rows whose key comes more than once.

        The first row of a key has the number of rows with that key as its count, the others 0.
        """
        for file in self._files:
            file.flush()
        found = [_repeated(np.fromfile(path, dtype=_RECORD)) for path in self._paths]
        rows = np.concatenate([rows for rows, _ in found])
        counts = np.concatenate([counts for _, counts in found])
        order = np.argsort(rows)
        return rows[order], counts[order]


def _repeated(records: npt.NDArray[np.void]) -> tuple[Rows, Rows]:
    """Return the rows of one bucket that share a key, and the count at the first of each key."""
    ordered = records[np.lexsort((records["row"], records["low"], records["high"]))]
    if not len(ordered):
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    key = ordered[["high", "low"]]
    starts = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
    sizes = np.diff(np.append(starts, len(ordered)))
    counts = np.zeros(len(ordered), dtype=np.int64)
    counts[starts] = sizes
    shared = np.repeat(sizes, sizes) > 1
    return ordered["row"][shared].astype(np.int64), counts[shared]

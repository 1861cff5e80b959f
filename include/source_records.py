"""Rows that come as mappings: their columns are known when the last one has been seen."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, Self

import pyarrow as pa

from include.extraction import Extraction
from include.source_columns import needed_columns

log = logging.getLogger(__name__)

ROWS_PER_CHUNK = 1_000
MOST_LOGGED = 100  # broken rows with a line of their own in the log


class Records:
    """Rows in a file of its own until all columns are known. Memory: one chunk.

    Use as a context manager; `folder` must exist.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "records"
        self._columns: dict[str, None] = {}
        self._chunk: list[Mapping[str, Any] | str] = []
        self._broken = 0

    def __enter__(self) -> Self:
        self._file: BinaryIO = self._path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, record: Mapping[str, Any]) -> None:
        """Append one row; names that begin with `_` are the product's, and are left out."""
        for name in record:
            if name not in self._columns and not name.startswith("_"):
                self._columns[name] = None
        self._append(record)

    def add_broken(self, place: str) -> None:
        """Append what is no row; `place` says where, and what is wrong."""
        self._broken += 1
        if self._broken <= MOST_LOGGED:
            log.error("%s. It goes to the failures; the others go on.", place)
        self._append(place)

    def copy_to(self, found: Extraction) -> None:
        """Hand all rows over, in their order; a column that a row has not is null in it."""
        self._flush()
        self._file.flush()
        columns = list(self._columns) or needed_columns(found.spec)
        found.begin(columns, [pa.null()] * len(columns))
        for chunk in self._chunks():
            for is_broken, group in groupby(chunk, key=lambda one: isinstance(one, str)):
                if is_broken:
                    for place in group:
                        found.add_broken(str(place))
                else:
                    found.add([[row.get(name) for name in columns] for row in group])  # type: ignore[union-attr]

    def _append(self, record: Mapping[str, Any] | str) -> None:
        self._chunk.append(record)
        if len(self._chunk) >= ROWS_PER_CHUNK:
            self._flush()

    def _flush(self) -> None:
        if self._chunk:
            pickle.dump(self._chunk, self._file, protocol=pickle.HIGHEST_PROTOCOL)
            self._chunk = []

    def _chunks(self) -> Iterator[list[Mapping[str, Any] | str]]:
        with self._path.open("rb") as stream:
            while stream.peek(1):
                yield pickle.load(stream)  # noqa: S301 (our own file of a moment ago)

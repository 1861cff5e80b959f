"""What every extract does with rows, wherever they come from: a snapshot, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from hashlib import file_digest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from include.arrow_columns import integer_array, text_array
from include.artifacts import Artifacts
from include.duplicate_keys import DuplicateKeys, Rows
from include.job_spec import JobSpec
from include.row_identity import as_text, key_digest, key_json
from include.snapshot import REJECTIONS_SCHEMA, Snapshot, SnapshotWriter
from include.source_columns import check_columns

REJECTIONS_PER_GROUP = 100_000
DIGEST_CHARACTERS = 16  # of the content digest in a file name
PLACES_SHOWN = 10  # of broken rows, in the failures table
BROKEN = "broken_row"  #: the reason of a line that is no row
_BROKEN_DIGEST = key_digest(b"broken")  # no key: the JSON of one is a list


@contextmanager
def extraction(spec: JobSpec) -> Iterator[Extraction]:
    """Yield an extraction with a folder of its own, which is gone afterwards."""
    with TemporaryDirectory(prefix="llm-batch-") as folder, DuplicateKeys(Path(folder)) as keys:
        yield Extraction(spec, Path(folder), keys)


@dataclass
class Extraction:
    """What has been seen of the rows so far.

    `begin` with the columns, `add` rows and `add_broken` lines in their order, then `publish`.
    """

    spec: JobSpec
    folder: Path
    keys: DuplicateKeys
    columns: tuple[str, ...] = ()
    rows: int = 0
    unsampled: int = 0
    _writer: SnapshotWriter | None = None
    _null_keys: list[int] = field(default_factory=list)
    _bad_texts: list[int] = field(default_factory=list)
    _broken: list[int] = field(default_factory=list)
    _places: list[str] = field(default_factory=list)

    def begin(
        self, columns: Sequence[str], types: Sequence[pa.DataType], origin: str | None = None
    ) -> None:
        """Say what the rows look like; a null type is found out from the values.

        Raises `ConfigurationError` when the job needs other columns; `origin` is where they are
        from, in its words.
        """
        check_columns(self.spec, columns, origin)
        self.columns = tuple(columns)
        self._writer = SnapshotWriter(self.folder, self.columns, types)
        self._key_positions = [self.columns.index(name) for name in self.spec.source.key]

    def add(self, rows: Sequence[Sequence[Any]]) -> None:
        """Append the sampled ones of `rows`, and note their keys."""
        texts = [
            [None if row[at] is None else as_text(row[at]) for at in self._key_positions]
            for row in rows
        ]
        digests = [key_digest(_key_bytes(key)) for key in texts]
        if self.spec.sample < 1:
            taken = [at for at, one in enumerate(digests) if in_sample(one, self.spec.sample)]
            self.unsampled += len(rows) - len(taken)
            rows, texts = [rows[at] for at in taken], [texts[at] for at in taken]
            digests = [digests[at] for at in taken]
        if not rows:
            return
        first = self.rows
        bad = self._written(rows)
        self.keys.add(b"".join(digests), first)
        self._null_keys.extend(first + at for at, key in enumerate(texts) if None in key)
        self._bad_texts.extend(first + at for at in bad)

    def add_broken(self, place: str) -> None:
        """Append a row of nulls for what is no row; `place` says where, and what is wrong."""
        self._broken.append(self.rows)
        if len(self._places) < PLACES_SHOWN:
            self._places.append(place)
        self.keys.add(_BROKEN_DIGEST, self.rows)
        self._written([(None,) * len(self.columns)])

    def _written(self, rows: Sequence[Sequence[Any]]) -> list[int]:
        self.rows += len(rows)
        return self._open().write(list(zip(*rows, strict=True)))

    def _open(self) -> SnapshotWriter:
        if self._writer is None:
            raise ValueError("an extraction begins with its columns")
        return self._writer

    def publish(self, artifacts: Artifacts, directory: str) -> Snapshot:
        """Move the finished files to the artifacts, under names made of the content."""
        writer = self._open()
        writer.close()
        rows, reasons, sources = self._rejections()
        with writer.path.open("rb") as source:
            digest = file_digest(source, "sha256").hexdigest()[:DIGEST_CHARACTERS]
            source.seek(0)
            path = f"{directory}/snapshot-{digest}.parquet"
            with artifacts.create(path) as target:
                shutil.copyfileobj(source, target, 1 << 20)
        rejections_file = None
        if reasons:
            rejections_file = f"{directory}/snapshot-{digest}.rejections.parquet"
            self._write_rejections(rows, reasons, sources, artifacts, rejections_file)
        # Several rows may speak of one shared key: count the keys.
        shared = sum(
            1
            for why, count in zip(reasons, sources.tolist(), strict=True)
            if why == "duplicate_key" and count > 0
        )
        return Snapshot(path, self.rows, self.columns, rejections_file, shared, self.unsampled)

    def _rejections(self) -> tuple[Rows, list[str], Rows]:
        """Return (rows, reasons, source rows) of everything that cannot become a request."""
        shared, counts = self.keys.find()
        null_keys = np.array(self._null_keys, dtype=np.int64)
        bad_texts = np.array(self._bad_texts, dtype=np.int64)
        broken = np.array(self._broken, dtype=np.int64)
        wrong = np.union1d(np.union1d(null_keys, bad_texts), broken)
        alone = np.setdiff1d(wrong, shared, assume_unique=True)
        rows = np.concatenate([shared, alone])
        order = np.argsort(rows)
        rows, sources = rows[order], np.concatenate([counts, np.ones_like(alone)])[order]
        reasons = np.full(len(rows), "bad_text", dtype=object)
        reasons[np.isin(rows, shared)] = "duplicate_key"
        reasons[np.isin(rows, null_keys)] = "null_key"
        reasons[np.isin(rows, broken)] = BROKEN
        return rows, reasons.tolist(), sources

    def _write_rejections(
        self, rows: Rows, reasons: list[str], sources: Rows, artifacts: Artifacts, path: str
    ) -> None:
        schema = REJECTIONS_SCHEMA
        with artifacts.create(path) as stream, pq.ParquetWriter(stream, schema) as writer:
            for start in range(0, len(rows), REJECTIONS_PER_GROUP):
                part = slice(start, start + REJECTIONS_PER_GROUP)
                messages = [self._broken_message() if one == BROKEN else None
                            for one in reasons[part]]  # fmt: skip
                arrays = [integer_array(rows[part]), text_array(reasons[part])]
                arrays += [integer_array(sources[part]), text_array(messages)]
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))

    def _broken_message(self) -> str:
        more = len(self._broken) - len(self._places)
        others = f"; and {more} more" if more else ""
        return f"no row: {'; '.join(self._places)}{others}"


def in_sample(digest: bytes, sample: Decimal) -> bool:
    """Tell whether a key belongs to the sample: the same keys every time, and more for more."""
    return int.from_bytes(digest[:8], "big") < int(sample * 2**64)


def _key_bytes(key: list[str | None]) -> bytes:
    try:
        return key_json(key)
    except TypeError:  # a lone surrogate; the row is rejected, but its key must still be one
        return repr(key).encode("utf-8", "backslashreplace")

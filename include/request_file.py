"""Build: the open rows of a snapshot become request files that the Batch API takes.

One line is `{"custom_id":…,"method":"POST","url":…,"body":{…}}` in compact UTF-8 (API reference,
"The request input object"). The same snapshot, spec and selection give the same bytes.

`custom_id` is the first half (32 hex) of sha256(base body + NUL + key JSON). It names a row and
what was asked of it, and stays the same in later rounds, even with a larger output limit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from include.arrow_columns import boolean_array, fixed_text_array, integer_array
from include.artifacts import Artifacts
from include.column_types import column_texts
from include.endpoints import EMBEDDINGS, inputs_of
from include.job_spec import JOBS_ROOT, JobSpec
from include.rejected_rows import Rejection, RejectionWriter, rejections_by_row
from include.request_body import Bodies, Refusal, enlarged, request_bodies
from include.row_identity import CUSTOM_ID_CHARACTERS, key_json
from include.row_stream import Rows, RowStream, row_numbers
from include.shard_file import LineParts, Shard, ShardWriter
from include.shared_rows import SharedRows
from include.snapshot import Snapshot

ROWS_PER_CHUNK = 1_024
LARGER_OUTPUT = "larger_output"
Known = Callable[[list[str]], set[str]]
Item = TypeVar("Item")


@dataclass(frozen=True)
class BuildResult:
    """What became of the rows: rows = requests of all shards + rejected + reused + shared.

    `rejected` counts rows of the source; `rejected_file` has one entry for all rows of a key.
    """

    shards: tuple[Shard, ...]
    rejected_file: str | None
    rejected: int
    reused: int
    shared: int = 0  # rows that take the outcome of another row's identical request


def build_requests(
    spec: JobSpec,
    *,
    snapshot: Snapshot,
    artifacts: Artifacts,
    directory: str,
    round_number: int = 1,
    selection: Iterator[pa.RecordBatch] | None = None,
    known: Known | None = None,
    root: Path = JOBS_ROOT,
    url: str | None = None,
) -> BuildResult:
    """Write the request files and index files of one round into `directory`.

    `selection` (`_row` int64 ascending, `_change` string) limits the round to these rows; None is
    all rows. `known` gets up to 1,024 custom_ids and returns those that are done already: their
    rows are left out. `url` is the endpoint as the provider spells it in a line; None is the
    job's own. Memory: one row group of the snapshot, whatever its size.

    Raises `ConfigurationError` when `request.py` is not the pinned one, or sets what job.yaml sets.
    """
    bodies = request_bodies(spec, snapshot.columns, root)
    rejected_path = f"{directory}/rejected.parquet"
    with (
        _rejections(artifacts, snapshot) as rejections,
        artifacts.local(snapshot.path) as path,
        pq.ParquetFile(path) as file,
        ShardWriter(artifacts, directory, spec.limits, first=_first(spec, round_number)) as shards,
        RejectionWriter(artifacts, rejected_path) as rejected,
        SharedRows(artifacts, f"{directory}/shared.parquet") as shared,
    ):
        parts = _line_parts(url or spec.request.endpoint, bodies)
        build = _Build(spec, bodies, shards, rejected, round_number, known, parts, shared)
        columns = list(dict.fromkeys([*spec.source.key, *bodies.columns]))
        chosen = None if selection is None else RowStream(selection)
        for chunk in _chunks(file, columns, chosen, rejections):
            build.add(chunk)
        rejected_file = rejected.finish()
        shared.finish()
        return BuildResult(
            shards.finish(), rejected_file, rejected.source_rows, build.reused, shared.count
        )


def _first(spec: JobSpec, round_number: int) -> int | None:
    """Return how many requests the first file may hold: it is the canary of round 1."""
    return spec.canary.requests if round_number == 1 else None


@dataclass(frozen=True)
class _Chunk:
    """Some open rows: their data, their `_row`, what to change in the request."""

    data: pa.RecordBatch
    rows: Rows
    changes: list[str] | None

    def only(self, keep: Sequence[bool]) -> _Chunk:
        """Return the rows for which `keep` is true."""
        mask = np.array(keep, dtype=np.bool_)
        changes = self.changes
        if changes is not None:
            changes = [change for change, kept in zip(changes, keep, strict=True) if kept]
        return _Chunk(self.data.filter(boolean_array(mask)), self.rows[mask], changes)


@contextmanager
def _rejections(artifacts: Artifacts, snapshot: Snapshot) -> Iterator[RowStream]:
    """Yield the rows that extract has rejected."""
    if snapshot.rejections_file is None:
        yield RowStream(iter(()))
        return
    with artifacts.local(snapshot.rejections_file) as path, pq.ParquetFile(path) as file:
        yield RowStream(file.iter_batches())


def _chunks(
    file: pq.ParquetFile, columns: list[str], chosen: RowStream | None, rejections: RowStream
) -> Iterator[tuple[_Chunk, dict[int, Rejection]]]:
    """Yield the rows of the round in small pieces, each with what extract rejected of them."""
    end = 0
    for group in range(file.num_row_groups):
        start, end = end, end + file.metadata.row_group(group).num_rows
        rejected = rejections_by_row(rejections.until(end))
        parts = None if chosen is None else chosen.until(end)
        if parts == []:
            continue  # nothing open here: the group is not even read
        table = file.read_row_group(group, columns=columns, use_threads=False).combine_chunks()
        data = table.to_batches()[0]
        chunk = _Chunk(data, np.arange(start, end), None)
        if parts is not None:
            chunk = _selected(chunk, parts)
        for at in range(0, len(chunk.rows), ROWS_PER_CHUNK):
            piece = _slice(chunk, at, at + ROWS_PER_CHUNK)
            first, last = int(piece.rows[0]), int(piece.rows[-1])
            yield piece, {row: why for row, why in rejected.items() if first <= row <= last}


def _selected(chunk: _Chunk, parts: list[pa.RecordBatch]) -> _Chunk:
    rows = np.concatenate([row_numbers(part) for part in parts])
    changes = [change for part in parts for change in part.column("_change").to_pylist()]
    return _Chunk(chunk.data.take(integer_array(rows - chunk.rows[0])), rows, changes)


def _slice(chunk: _Chunk, start: int, end: int) -> _Chunk:
    changes = None if chunk.changes is None else chunk.changes[start:end]
    return _Chunk(chunk.data[start:end], chunk.rows[start:end], changes)


class _Build:
    """What goes from chunk to chunk in one build."""

    def __init__(
        self,
        spec: JobSpec,
        bodies: Bodies,
        shards: ShardWriter,
        rejected: RejectionWriter,
        round_number: int,
        known: Known | None,
        parts: tuple[LineParts, LineParts],
        shared: SharedRows,
    ) -> None:
        self._spec = spec
        self._bodies = bodies
        self._shards = shards
        self._rejected = rejected
        self._factor = 2 ** (round_number - 1)
        self._known = known
        self._shared = shared if round_number == 1 and spec.reuse.identical else None
        self._parts, self._whole_body_parts = parts
        self._hash = hashlib.sha256(bodies.prefix)
        self.reused = 0

    def add(self, found: tuple[_Chunk, dict[int, Rejection]]) -> None:
        """Send the rows of one chunk to the shards or to the rejected rows."""
        chunk, refused = found
        refused = {**self._nulls(chunk), **refused}
        self._send(_without(chunk, refused), refused)
        self._rejected.add(self._keys(chunk), chunk.rows, refused)

    def _inputs(self, bodies: list[bytes]) -> Rows | None:
        """Return how many texts each body holds; None when each holds one."""
        request = self._spec.request
        if request.endpoint != EMBEDDINGS or request.prompt is not None:
            return None
        return np.array([inputs_of(orjson.loads(body)) for body in bodies], dtype=np.int64)

    def _keys(self, chunk: _Chunk) -> pa.RecordBatch:
        return chunk.data.select(list(self._spec.source.key))

    def _nulls(self, chunk: _Chunk) -> dict[int, Rejection]:
        """Return the rows in which a column that the prompt needs is null."""
        refused: dict[int, Rejection] = {}
        for name in self._bodies.required:
            column = chunk.data.column(name)
            if column.null_count:
                why = (
                    f"column {name} is null, and {self._spec.request.prompt_file} needs it; give "
                    "it a value (COALESCE), or leave such rows out in the SQL"
                )
                for row, null in zip(chunk.rows.tolist(), column.is_null(), strict=True):
                    if null.as_py():
                        refused.setdefault(row, Rejection("null_column", why))
        return refused

    def _send(self, chunk: _Chunk, refused: dict[int, Rejection]) -> None:
        """Write the lines of the rows that are left; note in `refused` what cannot be written."""
        encoded, refusals = self._bodies.varying(chunk.data.select(list(self._bodies.columns)))
        _refuse(chunk, refusals, refused)
        if refusals:
            chunk = _without(chunk, refused)
        ids = self._custom_ids(self._keys(chunk), encoded)
        chunk, ids, encoded = self._new(chunk, ids, encoded)
        parts, encoded = self._changed(chunk, encoded)
        chunk, ids, encoded = self._fitting(chunk, ids, encoded, parts, refused)
        chunk, ids, encoded = self._leading(chunk, ids, encoded)
        if encoded:
            index = _index(chunk.rows, self._keys(chunk), ids)
            self._shards.add(parts, ids, encoded, index, self._inputs(encoded))

    def _custom_ids(self, keys: pa.RecordBatch, encoded: list[bytes]) -> list[bytes]:
        """Return the `custom_id` of each row; the hash of the shared prefix is copied, not made."""
        texts = zip(*(column_texts(column) for column in keys.columns), strict=True)
        copy, end, dumps = self._hash.copy, self._bodies.suffix + b"\0", key_json
        digests = []
        for body, key in zip(encoded, texts, strict=True):
            digest = copy()
            digest.update(body + end + dumps(key))
            digests.append(digest.digest())
        # One conversion for all is a third of the cost of `hexdigest` for each.
        whole = b"".join(digests).hex().encode()
        return [whole[at : at + CUSTOM_ID_CHARACTERS] for at in range(0, len(whole), 64)]

    def _new(
        self, chunk: _Chunk, ids: list[bytes], encoded: list[bytes]
    ) -> tuple[_Chunk, list[bytes], list[bytes]]:
        """Leave out what is done already."""
        done = self._known([name.decode() for name in ids]) if self._known and ids else set()
        if not done:
            return chunk, ids, encoded
        keep = [name.decode() not in done for name in ids]
        self.reused += keep.count(False)
        return chunk.only(keep), _only(ids, keep), _only(encoded, keep)

    def _changed(self, chunk: _Chunk, encoded: list[bytes]) -> tuple[LineParts, list[bytes]]:
        """Return how to write the lines: as they are, or whole bodies when one asks for more."""
        if chunk.changes is None or LARGER_OUTPUT not in chunk.changes:
            return self._parts, encoded
        prefix, suffix, api = self._bodies.prefix, self._bodies.suffix, self._spec.request.api
        bodies = [prefix + item + suffix for item in encoded]
        return self._whole_body_parts, [
            enlarged(api, body, self._factor) if change == LARGER_OUTPUT else body
            for body, change in zip(bodies, chunk.changes, strict=True)
        ]

    def _fitting(
        self,
        chunk: _Chunk,
        ids: list[bytes],
        encoded: list[bytes],
        parts: LineParts,
        refused: dict[int, Rejection],
    ) -> tuple[_Chunk, list[bytes], list[bytes]]:
        """Leave out, and note, rows that are too large for any batch."""
        if self._shards.fits(parts, max(map(len, encoded), default=0)):
            return chunk, ids, encoded
        keep = [self._shards.fits(parts, len(item)) for item in encoded]
        for at in (at for at, fits in enumerate(keep) if not fits):
            size = parts.body_constant + len(encoded[at])
            message = f"a body of {size:,} bytes fits into no batch of this job's limits"
            refused[int(chunk.rows[at])] = Rejection("too_large", message, 1, ids[at].decode())
        return chunk.only(keep), _only(ids, keep), _only(encoded, keep)

    def _leading(
        self, chunk: _Chunk, ids: list[bytes], encoded: list[bytes]
    ) -> tuple[_Chunk, list[bytes], list[bytes]]:
        """Leave out, and note, rows whose body another row has; later rounds send leaders only."""
        if self._shared is None or not ids:
            return chunk, ids, encoded
        leaders = self._shared.leaders(encoded, chunk.rows)
        follows = leaders != chunk.rows
        if not follows.any():
            return chunk, ids, encoded
        following, keep = follows.tolist(), (~follows).tolist()
        keys = self._keys(chunk.only(following))
        self._shared.add(keys, _only(ids, following), leaders[follows])
        return chunk.only(keep), _only(ids, keep), _only(encoded, keep)


def _without(chunk: _Chunk, refused: dict[int, Rejection]) -> _Chunk:
    if not refused:
        return chunk
    return chunk.only([row not in refused for row in chunk.rows.tolist()])


def _refuse(chunk: _Chunk, refusals: dict[int, Refusal], refused: dict[int, Rejection]) -> None:
    """Note the rows for which no body could be made, given by position."""
    for at, why in refusals.items():
        refused[int(chunk.rows[at])] = Rejection(why.reason, why.message)


def _only(items: list[Item], keep: list[bool]) -> list[Item]:
    return [item for item, kept in zip(items, keep, strict=True) if kept]


def _index(rows: Rows, keys: pa.RecordBatch, ids: list[bytes]) -> pa.RecordBatch:
    names = fixed_text_array(b"".join(ids), CUSTOM_ID_CHARACTERS)
    return pa.RecordBatch.from_arrays(
        [integer_array(rows), *keys.columns, names],
        names=["_row", *keys.schema.names, "_custom_id"],
    )


def _line_parts(url: str, bodies: Bodies) -> tuple[LineParts, LineParts]:
    """Return the constants around the varying part of a body, and around a whole body."""
    head = b'{"custom_id":"'
    middle = f'","method":"POST","url":"{url}","body":'.encode()
    constant = len(bodies.prefix) + len(bodies.suffix)
    return (
        LineParts(
            head, middle + bodies.prefix, bodies.suffix + b"}\n", constant, ids_tell_bodies=True
        ),
        LineParts(head, middle, b"}\n", 0, ids_tell_bodies=False),
    )

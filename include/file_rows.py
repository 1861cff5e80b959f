"""Extract from files: Parquet, CSV and JSONL, in the order of their names, in bounded memory.

A line that is no row is refused alone, with file and line. A file that cannot be read to its end
refuses the partition: nobody knows what it would have held.

CSV is text: no types are guessed, an empty field is empty text, and null in a key column.
Memory: `ROWS_PER_FETCH` rows, and a row group of Parquet.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from include.arrow_columns import TIMESTAMP, TIMESTAMP_UTC
from include.artifacts import Artifacts
from include.errors import ConfigurationError
from include.extraction import Extraction, extraction
from include.figures import counted
from include.job_spec import JobSpec
from include.object_storage import Remote
from include.result_lines import Line, read_lines
from include.snapshot import Snapshot
from include.source_columns import check_columns, needed_columns
from include.source_files import SourceFile, source_files
from include.source_records import MOST_LOGGED, Records

log = logging.getLogger(__name__)

ROWS_PER_FETCH = 1_000
LARGEST_FIELD = 64 << 20  # characters of a CSV field; an unclosed quote is noticed by then
ENDLESS = ("unexpected end of data", "field larger than field limit")  # what `csv` says of it


def extract_files(
    remote: Remote,
    spec: JobSpec,
    interval_start: datetime,
    interval_end: datetime,
    *,
    artifacts: Artifacts,
    directory: str,
) -> Snapshot:
    """Copy the rows of the files of [interval_start, interval_end) into a snapshot.

    `remote` makes path objects of URIs. The snapshot is named by its content. Raises
    `ConfigurationError` that names the file when its columns are not those that the job needs or
    it is damaged, and `TransientError` when there is none or the store does not answer.
    """
    files = source_files(spec, interval_start, interval_end, remote)
    log.info("%s: %s to read.", spec.name, counted(len(files), "file"))
    with extraction(spec) as found:
        if files:
            READERS[spec.source.file_format](found, files)
        else:
            names = needed_columns(spec)
            found.begin(names, [pa.null()] * len(names))
        return found.publish(artifacts, directory)


def _read_parquet(found: Extraction, files: Sequence[SourceFile]) -> None:
    for file in files:
        with file.open() as stream, pq.ParquetFile(stream) as parquet:
            schema = parquet.schema_arrow
            names = _columns(found, file, schema.names, [_declared(one.type) for one in schema])
            for batch in parquet.iter_batches(ROWS_PER_FETCH, columns=names, use_threads=False):
                columns = [_plain(batch.column(name)).to_pylist() for name in found.columns]
                found.add(list(zip(*columns, strict=True)))


def _columns(
    found: Extraction, file: SourceFile, names: Sequence[str], types: Sequence[pa.DataType]
) -> list[str]:
    """Begin with the first file's columns; check that another file has the same ones.

    Names that begin with `_` are the product's, and are left out.
    """
    pairs = [pair for pair in zip(names, types, strict=True) if not pair[0].startswith("_")]
    kept = [name for name, _ in pairs]
    if not found.columns:
        found.begin(kept, [kind for _, kind in pairs], file.name)
        return kept
    check_columns(found.spec, kept, file.name)
    lacks = [name for name in found.columns if name not in kept]
    more = [name for name in kept if name not in found.columns]
    if lacks or more:
        raise ConfigurationError(
            f"{found.spec.name}: {file.name} has other columns than the file before it: lacks "
            f"{', '.join(lacks) or 'none'}, has {', '.join(more) or 'none'} more. The files of an "
            "interval need the same columns; write this one again."
        )
    return kept


def _declared(kind: pa.DataType) -> pa.DataType:
    """Return the type of a column of the snapshot, for one that has only nulls at first."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_timestamp(kind):
        return TIMESTAMP_UTC if kind.tz else TIMESTAMP
    simple: list[tuple[Callable[[pa.DataType], bool], pa.DataType]] = [
        (pa.types.is_integer, pa.int64()),
        (pa.types.is_floating, pa.float64()),
        (pa.types.is_boolean, pa.bool_()),
        (pa.types.is_date32, pa.date32()),
    ]
    return next((found for is_kind, found in simple if is_kind(kind)), pa.string())


def _plain(column: pa.Array) -> pa.Array:
    """Return a column whose values are those of Python: no dictionary, no nanoseconds."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_timestamp(column.type) and column.type.unit == "ns":
        return column.cast(pa.timestamp("us", column.type.tz), safe=False)
    return column


def _read_csv(found: Extraction, files: Sequence[SourceFile]) -> None:
    csv.field_size_limit(LARGEST_FIELD)
    for file in files:
        with file.open() as stream:
            text = io.TextIOWrapper(
                stream, encoding="utf-8-sig", errors="surrogateescape", newline=""
            )
            _CsvFile(found, file, text).read()


class _CsvFile:
    """One CSV file with a header."""

    def __init__(self, found: Extraction, file: SourceFile, text: io.TextIOWrapper) -> None:
        self._found = found
        self._file = file
        self._lines = csv.reader(text, strict=True)
        self._rows: list[list[str | None]] = []
        self._broken = 0

    def read(self) -> None:
        """Add all rows."""
        header = self._record()
        if not header or isinstance(header, str):
            raise ConfigurationError(
                f"{self._file.name} has no header: expected the names of the columns in line 1."
            )
        _columns(self._found, self._file, header, [pa.string()] * len(header))
        order = [header.index(name) for name in self._found.columns]
        key = {self._found.columns.index(name) for name in self._found.spec.source.key}
        for lines, row in self._numbered():
            if isinstance(row, str):
                self._refuse(lines, row)
            elif len(row) != len(header):
                self._refuse(lines, f"{len(row)} fields instead of {len(header)}")
            else:
                self._take([row[at] for at in order], key)
        self._flush()

    def _numbered(self) -> Iterator[tuple[str, list[str] | str]]:
        """Yield (line, fields), or what is wrong with the line; blank lines are left out."""
        first = self._lines.line_num + 1
        while (row := self._record()) is not None:
            last = self._lines.line_num
            if row:
                yield f"line {first}" if first == last else f"lines {first} to {last}", row
            first = last + 1

    def _record(self) -> list[str] | str | None:
        """Return the next line's fields, or what is wrong with it; None at the end.

        Raises `ConfigurationError` when it never ends: it has swallowed all rows after it.
        """
        line = self._lines.line_num + 1
        try:
            return next(self._lines, None)
        except csv.Error as error:
            if not str(error).startswith(ENDLESS):
                return str(error)
            raise ConfigurationError(
                f"{self._file.name}, line {line}: a quote that begins there is never closed "
                f"({error}). Nothing of the file was taken; write it again, and clear this task."
            ) from None

    def _take(self, row: list[Any], key: set[int]) -> None:
        for at in key:
            row[at] = row[at] or None
        self._rows.append(row)
        if len(self._rows) >= ROWS_PER_FETCH:
            self._flush()

    def _refuse(self, lines: str, why: str) -> None:
        self._flush()
        self._broken += 1
        place = f"{self._file.name}, {lines}: {why}"
        if self._broken <= MOST_LOGGED:
            log.error("%s. It goes to the failures; the others go on.", place)
        self._found.add_broken(place)

    def _flush(self) -> None:
        if self._rows:
            self._found.add(self._rows)
            self._rows = []


def _read_jsonl(found: Extraction, files: Sequence[SourceFile]) -> None:
    with Records(found.folder) as records:
        for file in files:
            with file.open() as stream:
                for line in read_lines(stream):
                    _add_line(records, file, line)
        records.copy_to(found)


def _add_line(records: Records, file: SourceFile, line: Line) -> None:
    place = f"{file.name}, line {line.number}"
    if len(line.data) < line.size:
        records.add_broken(f"{place}: {line.size:,} bytes are too long for a row")
        return
    try:
        text = line.data[: line.length].decode("utf-8", "surrogateescape")
        value = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        column = f" at character {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        records.add_broken(f"{place}: is not valid JSON{column}")
        return
    if isinstance(value, dict):
        records.add(value)
    else:
        records.add_broken(f"{place}: is a JSON {type(value).__name__}, expected an object")


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


READERS: dict[str, Callable[[Extraction, Sequence[SourceFile]], None]] = {
    "parquet": _read_parquet,
    "csv": _read_csv,
    "jsonl": _read_jsonl,
}

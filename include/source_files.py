"""The files of a source: which there are for an interval, and how they are opened."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Any, BinaryIO, cast

import pyarrow as pa

from include.errors import ConfigurationError, LLMBatchError, TransientError
from include.job_spec import JobSpec
from include.object_storage import Remote
from include.source_path import filled, split_pattern

BLOCK_BYTES = 1 << 20
CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")


@dataclass(frozen=True)
class SourceFile:
    """One file; `name` is for people: a URI, or a path of this machine."""

    name: str
    path: str
    fs: Any

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Yield the bytes, decompressed when the name ends in `.gz`; errors name the file."""
        with storage_errors(self.name), self.fs.open(self.path, "rb") as raw:
            # Not every file system's own stream reads a part of a line.
            stream = io.BufferedReader(raw, BLOCK_BYTES)
            if self.path.endswith(".gz"):
                with gzip.open(stream, "rb") as plain:
                    yield cast("BinaryIO", plain)
            else:
                yield stream


def source_files(spec: JobSpec, start: datetime, end: datetime, remote: Remote) -> list[SourceFile]:
    """Return the files of [start, end), by name.

    Names that begin with `_` or `.` are left out where a wildcard would take them: they are marks
    of whoever writes the files. Without any file: none where the job takes that
    (`missing: empty`), else `TransientError`, for it may only be late.
    """
    pattern = filled(spec.source.uri, start, end)
    with storage_errors(pattern):
        files = _found(pattern, remote)
    if not files and spec.source.missing == "error":
        raise TransientError(
            f"{spec.name}: there is no file {pattern}. It is looked for again; an interval that "
            "may have none needs `missing: empty` in the job's source."
        )
    return files


def _found(pattern: str, remote: Remote) -> list[SourceFile]:
    folder, rest = split_pattern(pattern)
    base = remote(folder or "/")
    base.fs.invalidate_cache()  # a listing of a moment ago may lack the newest file
    paths = _matching(base.fs, str(base.path).rstrip("/"), rest.split("/"))
    return [_file(base.fs, path) for path in sorted(paths)]


def _matching(fs: Any, folder: str, parts: list[str]) -> Iterator[str]:
    """Yield the files below a folder whose path has these parts, of which some are wildcards.

    Not by the `glob` of fsspec: it takes a folder that may not be listed, or a store that does not
    answer, for one without files.
    """
    part, *rest = parts
    is_wild = any(mark in part for mark in "*?[")
    try:
        if rest and not is_wild:
            yield from _matching(fs, f"{folder}/{part}", rest)
            return
        entries = fs.ls(folder, detail=True) if is_wild else [fs.info(f"{folder}/{part}")]
    except FileNotFoundError:
        return
    for entry in entries:
        path = str(entry["name"]).rstrip("/")
        name = path.rpartition("/")[2]
        if is_wild and (name[:1] in {"_", "."} or not fnmatchcase(name, part)):
            continue
        if rest and entry["type"] == "directory":
            yield from _matching(fs, path, rest)
        elif not rest and entry["type"] == "file":
            yield path


def _file(fs: Any, path: str) -> SourceFile:
    is_local = "file" in fs.protocol
    return SourceFile(path if is_local else fs.unstrip_protocol(path), path, fs)


@contextmanager
def storage_errors(place: str) -> Iterator[None]:
    """Turn the errors of files and stores into ours; what could hold row text is left out."""
    try:
        yield
    except LLMBatchError:
        raise
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ConfigurationError(
            f"{place} is no whole gzip file ({type(error).__name__}). Nothing of it was taken; "
            "write it again, and clear this task."
        ) from None
    except pa.ArrowException as error:
        raise ConfigurationError(
            f"{place} is no Parquet file that can be read ({type(error).__name__}). Nothing of it "
            "was taken; write it again, and clear this task."
        ) from None
    except PermissionError:
        raise ConfigurationError(
            f"{place} may not be read. Check the credentials and what they allow."
        ) from None
    except OSError as error:
        raise TransientError(f"{place} could not be read ({type(error).__name__}).") from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in {"botocore", "aiohttp", "google"}:
            raise
        kind = type(error).__name__
        if kind in CREDENTIALS:
            raise ConfigurationError(f"There are no credentials for {place} ({kind}).") from None
        raise TransientError(f"{place} could not be read ({kind}).") from None

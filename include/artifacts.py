"""The files of a run: snapshot, request files, raw output and error files, outcomes.

Paths are relative to one root and made of job names and digests, never of foreign ids.
A file appears whole or not at all, so that a killed task leaves nothing that a later one could
mistake for finished work.
"""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast
from uuid import uuid4

from include.errors import ConfigurationError

COMPRESSED = ".gz"  # what retention appends to the name of an old file
COPY_BYTES = 1 << 20  # bytes moved at a time between a remote root and a local file


class Root(Protocol):
    """What a root must offer: the part of `pathlib.Path` that `UPath` offers as well."""

    def __truediv__(self, key: str) -> Any:
        """Return the path of `key` below this one."""


class Artifacts:
    """Files below one root: a local folder, or any `UPath` (Airflow's `ObjectStoragePath`)."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._is_local = isinstance(root, Path)

    def __repr__(self) -> str:
        return f"Artifacts({str(self._root)!r})"

    def uri(self, path: str) -> str:
        """Return where `path` is, for people and links."""
        return str(self._at(path))

    def exists(self, path: str) -> bool:
        """Tell whether `path` has been written whole; compressed, it is there as well."""
        return bool(self._at(path).exists() or self._at(path + COMPRESSED).exists())

    def size(self, path: str) -> int:
        """Return the bytes of `path`."""
        return int(self._at(path).stat().st_size)

    def delete(self, path: str) -> None:
        """Remove `path`; nothing happens when it is not there."""
        self._at(path).unlink(missing_ok=True)

    def files(self, folder: str) -> Iterator[str]:
        """Yield the path of every file below `folder`, whoever has written it."""
        top = self._at(folder)
        if self._is_local:
            for one in sorted(top.rglob("*")):
                if one.is_file():
                    yield f"{folder}/{one.relative_to(top).as_posix()}"
            return
        start = str(top.path).rstrip("/")
        for name in top.fs.find(start):
            yield folder + str(name)[str(name).index(start) + len(start) :]

    def delete_folder(self, folder: str) -> None:
        """Remove `folder` with all that is in it; nothing happens when it is not there."""
        top = self._at(folder)
        if self._is_local:
            _remove(top)
        elif top.fs.exists(top.path):
            top.fs.rm(top.path, recursive=True)

    def open(self, path: str) -> BinaryIO:
        """Open `path` for reading bytes; one that was compressed reads as it was.

        Raises `ConfigurationError` when it is gone: artifacts are only deleted on purpose.
        """
        try:
            return cast("BinaryIO", self._at(path).open("rb"))
        except FileNotFoundError:
            pass
        try:
            return cast("BinaryIO", gzip.open(self._at(path + COMPRESSED).open("rb")))
        except FileNotFoundError:
            raise ConfigurationError(
                f"Artifact {self.uri(path)} is missing. It was written by an earlier task of this "
                "run; restore it, or clear the run from `extract` to begin again."
            ) from None

    @contextmanager
    def create(self, path: str) -> Iterator[BinaryIO]:
        """Yield a stream; `path` holds its bytes once the block has ended without an error."""
        if not self._is_local:
            with self.scratch() as local:
                with local.open("wb") as stream:
                    yield stream
                self._put(local, path)
            return
        final = cast("Path", self._at(path))
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{final.name}.{uuid4().hex[:8]}.part")
        try:
            with temporary.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def compress(self, path: str) -> None:
        """Replace an artifact by its gzip, which `open` reads as if it were the file.

        The compressed file appears whole before the plain one goes; killed in between, both are
        there.
        """
        with (
            self.create(path + COMPRESSED) as stream,
            # Without a time in it, compressing the same file twice gives the same bytes.
            gzip.GzipFile(filename="", mode="wb", fileobj=stream, mtime=0) as packed,
            self.open(path) as plain,
        ):
            shutil.copyfileobj(plain, packed)
        self.delete(path)

    @contextmanager
    def local(self, path: str) -> Iterator[Path]:
        """Yield a local file with the bytes of `path`; a remote one is fetched first."""
        if self._is_local:
            yield cast("Path", self._at(path))
            return
        with self.scratch() as local:
            with self.open(path) as source, local.open("wb") as target:
                shutil.copyfileobj(source, target, COPY_BYTES)
            yield local

    @contextmanager
    def scratch(self, suffix: str = "") -> Iterator[Path]:
        """Yield a new local file name that is deleted afterwards."""
        with tempfile.TemporaryDirectory(prefix="llm-batch-") as folder:
            yield Path(folder) / f"scratch{suffix}"

    def _at(self, path: str) -> Any:
        if path.startswith("/") or ".." in path.split("/"):
            raise ValueError(f"Artifact path {path!r} must be relative and stay below the root.")
        return self._root / path

    def _put(self, local: Path, path: str) -> None:
        """Put a finished local file at a remote root, where it appears when all of it is there.

        Not through `open("wb")`: an interrupted copy would be closed, and so appear, half done.
        """
        target = self._at(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.fs.put_file(str(local), target.path)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)

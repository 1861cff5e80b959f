"""Where a Parquet dataset lies: the text of `target.path`, and the files there.

DAG files import this module: it needs the standard library only.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

if TYPE_CHECKING:
    from collections.abc import Callable

    from include.artifacts import Artifacts

PARTITION_COLUMN = "interval"  # readers make this column of the names of the folders
# A folder below the root of this machine, by path or URI; or a URI of another place.
_PLACE = re.compile(r"(file://)?/+[^/\n][^\n]*|(?!file:)[a-z][a-z0-9+.\-]*://[^/\s]\S*")
_PASSWORD = re.compile(r"[^/]*://[^/@]*:[^/]*@")


def checked_place(path: str) -> None:
    """Raise `ValueError` for a path that is no place, or holds a password."""
    if _PASSWORD.match(path):
        raise ValueError("must not hold a password; name an Airflow connection: s3://conn_id@…")
    if not _PLACE.fullmatch(path):
        raise ValueError("must be a URI such as s3://bucket/labels, or an absolute path")


def checked_path(path: str) -> str:
    """Return `path` without a slash at its end; raises `ValueError` for one that is no folder."""
    checked_place(path)
    if any(mark in path for mark in "*?[") or ".." in path.split("/"):
        raise ValueError("must name one folder: no *, ?, [ and no ..")
    return path.rstrip("/")


def dataset_at(path: str, remote: Callable[[str], Any] | None = None) -> Artifacts:
    """Return the files at `path`; `remote` makes a path object of a URI, usually a `UPath`."""
    from include.artifacts import Artifacts

    if path.startswith("file://"):
        return Artifacts(Path(unquote(path.removeprefix("file://"))))
    if "://" not in path:
        return Artifacts(Path(path))
    if remote is None:
        from include.object_storage import remote_path

        remote = remote_path
    return Artifacts(remote(path))

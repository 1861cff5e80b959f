"""The text of `source.path`: files at a URI or below the root of this machine, for an interval.

`{{ds}}` and its like are names of a fixed set, replaced by text. Nothing is evaluated.

DAG files import this module: it needs the standard library only.
"""

from __future__ import annotations

import re
from datetime import datetime

from include.dataset_path import checked_place
from include.interval import interval_words

PLACEHOLDERS = ("ds", "ds_nodash", "ts_nodash", "interval_start", "interval_end")
FORMATS = ("parquet", "csv", "jsonl")
_SUFFIXES = {"parquet": "parquet", "pq": "parquet", "csv": "csv", "jsonl": "jsonl",
             "ndjson": "jsonl"}  # fmt: skip
_HOLE = re.compile(r"\{\{ *(\w+) *\}\}")
_WILD = re.compile(r"[*?\[]")


def checked_source_path(path: str) -> str:
    """Return `path`; raises `ValueError` for one that names no files."""
    for name in _HOLE.findall(path):
        if name not in PLACEHOLDERS:
            allowed = ", ".join(f"{{{{{one}}}}}" for one in PLACEHOLDERS)
            raise ValueError(f"{{{{{name}}}}} is no placeholder; allowed: {allowed}")
    plain = _HOLE.sub("x", path)
    if "{{" in plain or "}}" in plain or "{%" in plain:
        raise ValueError("has braces that are no placeholder such as {{ds}}; there are no filters")
    checked_place(plain)
    if ".." in plain.split("/") or "**" in plain or plain.endswith("/"):
        raise ValueError("must name files, such as s3://bucket/{{ds}}/*.parquet, without .. and **")
    return path


def format_of(path: str) -> str | None:
    """Return the format that the name of the files tells; a `.gz` at its end does not count."""
    name = path.rpartition("/")[2].lower().removesuffix(".gz")
    return _SUFFIXES.get(name.rpartition(".")[2]) if "." in name else None


def filled(path: str, start: datetime, end: datetime) -> str:
    """Return `path` with its placeholders replaced by the words of an interval."""
    words = interval_words(start, end)
    return _HOLE.sub(lambda hole: words[hole[1]], path)


def split_pattern(path: str) -> tuple[str, str]:
    """Return (folder, rest): the folder has no wildcard, the rest begins with the first that has.

    A path without a wildcard is the folder and the name of its file.
    """
    wild = _WILD.search(path)
    end = path.rindex("/", 0, wild.start() if wild else None)
    return path[:end], path[end + 1 :]

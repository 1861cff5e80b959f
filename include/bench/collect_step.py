"""Collect: output and error files of chat batches become typed outcomes."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from include.bench import shards
from include.bench.jobs import chat_job
from include.bench.measurement import Place, Task
from include.bench.texts import answer_lines

FOLDER = "chat"


def prepare(place: Place) -> None:
    """Write the files of all batches."""
    for start in shards.shard_starts(place.rows):
        rows = range(start, min(start + shards.SHARD, place.rows))
        output, errors = answer_lines(start, len(rows), place.seed)
        shards.write_shard(place.folder / FOLDER, rows, output, errors)


def product(place: Place) -> Task:
    """Return the collecting of the product."""
    folder = place.folder / FOLDER

    def run() -> None:
        shards.collect(chat_job(), folder, "collected")

    return Task(run, shards.file_bytes(folder))


def limit(place: Place) -> Task:
    """Return `orjson.loads` of every line, its result thrown away."""
    folder = place.folder / FOLDER

    def run() -> None:
        for path in shards.result_files(folder):
            with path.open("rb") as stream:
                for line in stream:
                    try:
                        orjson.loads(line)
                    except ValueError:
                        continue

    return Task(run, shards.file_bytes(folder))


def plain(place: Place) -> Task:
    """Return what a first version would do: whole files as text, `json`, a list of rows."""
    folder = place.folder / FOLDER

    def run() -> None:
        rows: list[dict[str, Any]] = []
        for path in shards.result_files(folder):
            for line in path.read_text(encoding="utf-8").split("\n"):
                rows += _row(line)
        pq.write_table(pa.Table.from_pylist(rows), place.scratch() / "plain.parquet")

    return Task(run, shards.file_bytes(folder))


def _row(line: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(line)
        choice = found["response"]["body"]["choices"][0]
        answer = json.loads(choice["message"]["content"])
    except (ValueError, KeyError):
        return []
    return [{"custom_id": found["custom_id"], **answer}]


CONTENDERS = {"limit": limit, "product": product, "plain": plain}

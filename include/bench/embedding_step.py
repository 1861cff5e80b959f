"""Collect of embeddings: 1,536 numbers a line, as base64 or as a list of numbers."""

from __future__ import annotations

import json
import shutil
from base64 import b64decode
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from include.bench import shards
from include.bench.jobs import embedding_job
from include.bench.measurement import Place, Task
from include.bench.steps import STEPS
from include.bench.texts import vector_lines

BASE64, NUMBERS = "embeddings", "embeddings_numbers"  # folders
FEWER = STEPS[BASE64].share  # a line is 6 to 25 times as long as one of chat

Contender = Callable[[Place], Task]


def prepare(place: Place) -> None:
    """Write the files of the batches, in both forms."""
    count = max(place.rows // FEWER, 1)
    for start in shards.shard_starts(count):
        rows = range(start, min(start + shards.SHARD, count))
        for folder in (BASE64, NUMBERS):
            is_list = folder == NUMBERS
            lines = vector_lines(len(rows), place.seed + start, start, as_numbers=is_list)
            shards.write_shard(place.folder / folder, rows, lines)


def product(name: str) -> Contender:
    """Return the collecting of the product."""

    def contender(place: Place) -> Task:
        folder = place.folder / name

        def run() -> None:
            shards.collect(embedding_job(), folder, "collected", errors=False)

        return Task(run, shards.file_bytes(folder))

    return contender


def limit(name: str) -> Contender:
    """Return a copy of the files."""

    def contender(place: Place) -> Task:
        folder = place.folder / name

        def run() -> None:
            for path in shards.result_files(folder):
                with path.open("rb") as source, (place.scratch() / path.name).open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)

        return Task(run, shards.file_bytes(folder))

    return contender


def plain(name: str) -> Contender:
    """Return what a first version would do: `json.loads`, all vectors in a list."""

    def contender(place: Place) -> Task:
        folder = place.folder / name

        def run() -> None:
            vectors = {}
            for path in shards.result_files(folder):
                for line in path.read_text(encoding="utf-8").split("\n"):
                    if line:
                        found = json.loads(line)
                        data = found["response"]["body"]["data"][0]
                        vectors[found["custom_id"]] = _numbers(data["embedding"])
            columns = {
                "custom_id": pa.array(list(vectors), pa.string()),
                "vector": pa.array(list(vectors.values()), pa.list_(pa.float32())),
            }
            pq.write_table(pa.table(columns), place.scratch() / "plain.parquet")

        return Task(run, shards.file_bytes(folder))

    return contender


def _numbers(embedding: Any) -> Any:
    if isinstance(embedding, str):
        return np.frombuffer(b64decode(embedding), dtype=np.float32).tolist()
    return embedding


def _contenders(name: str) -> dict[str, Contender]:
    return {"limit": limit(name), "product": product(name), "plain": plain(name)}


CONTENDERS = _contenders(BASE64)
AS_NUMBERS = _contenders(NUMBERS)

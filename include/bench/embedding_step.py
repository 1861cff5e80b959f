"""Collect of embeddings: 1,536 numbers a line."""

from __future__ import annotations

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq

from include.bench import shards
from include.bench.jobs import embedding_job
from include.bench.measurement import Place, Task
from include.bench.steps import STEPS
from include.bench.texts import vector_lines

FOLDER = "embeddings"
FEWER = STEPS["embeddings"].share  # a line is 25 times as long as one of chat


def prepare(place: Place) -> None:
    """Write the files of the batches."""
    count = max(place.rows // FEWER, 1)
    for start in shards.shard_starts(count):
        rows = range(start, min(start + shards.SHARD, count))
        lines = vector_lines(len(rows), place.seed + start, start)
        shards.write_shard(place.folder / FOLDER, rows, lines)


def product(place: Place) -> Task:
    """Return the collecting of the product."""
    folder = place.folder / FOLDER

    def run() -> None:
        shards.collect(embedding_job(), folder, "collected", errors=False)

    return Task(run, shards.file_bytes(folder))


def limit(place: Place) -> Task:
    """Return a copy of the files."""
    folder = place.folder / FOLDER

    def run() -> None:
        for path in shards.result_files(folder):
            with path.open("rb") as source, (place.scratch() / path.name).open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)

    return Task(run, shards.file_bytes(folder))


def plain(place: Place) -> Task:
    """Return what a first version would do: `json.loads`, all vectors in a list."""
    folder = place.folder / FOLDER

    def run() -> None:
        vectors = {}
        for path in shards.result_files(folder):
            for line in path.read_text(encoding="utf-8").split("\n"):
                if line:
                    found = json.loads(line)
                    vectors[found["custom_id"]] = found["response"]["body"]["data"][0]["embedding"]
        columns = {
            "custom_id": pa.array(list(vectors), pa.string()),
            "vector": pa.array(list(vectors.values()), pa.list_(pa.float32())),
        }
        pq.write_table(pa.table(columns), place.scratch() / "plain.parquet")

    return Task(run, shards.file_bytes(folder))


CONTENDERS = {"limit": limit, "product": product, "plain": plain}

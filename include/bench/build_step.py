"""Build: a snapshot becomes request files."""

from __future__ import annotations

import json
import shutil
from itertools import islice

import pyarrow.parquet as pq

from include.artifacts import Artifacts
from include.bench.jobs import ENDPOINT_CHAT, SCHEMA, SYSTEM, chat_job
from include.bench.measurement import Place, Task
from include.bench.texts import custom_id, tickets
from include.request_file import build_requests
from include.snapshot import Snapshot, SnapshotWriter

SNAPSHOT = "snapshot.parquet"
SHARD = 50_000


def prepare(place: Place) -> None:
    """Write the snapshot, and the request files that the limit copies."""
    import pyarrow as pa

    writer = SnapshotWriter(place.folder, ("ticket_id", "body"), [pa.string(), pa.string()])
    texts, number = tickets(place.rows, place.seed), 0
    while part := list(islice(texts, 1_000)):
        keys = [f"T{at:08d}" for at in range(number, number + len(part))]
        writer.write([keys, part])
        number += len(part)
    writer.close()
    writer.path.replace(place.folder / SNAPSHOT)
    _build(place, "requests")


def product(place: Place) -> Task:
    """Return the build of the product."""
    return Task(lambda: _build(place, "scratch/build"), _size(place))


def limit(place: Place) -> Task:
    """Return a plain copy of the finished request files."""
    target = place.scratch() / "copy"

    def run() -> None:
        target.mkdir(exist_ok=True)
        for path in (place.folder / "requests").glob("*.jsonl"):
            with path.open("rb") as source, (target / path.name).open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)

    return Task(run, _size(place))


def plain(place: Place) -> Task:
    """Return what a first version would do: `json` per row, all lines in a list."""

    def run() -> None:
        rows = pq.read_table(place.folder / SNAPSHOT).to_pylist()
        lines = [json.dumps(_request(number, row["body"])) for number, row in enumerate(rows)]
        for start in range(0, len(lines), SHARD):
            path = place.scratch() / f"plain-{start}.jsonl"
            path.write_text("\n".join(lines[start : start + SHARD]) + "\n", encoding="utf-8")

    return Task(run, _size(place))


def _build(place: Place, directory: str) -> None:
    snapshot = Snapshot(SNAPSHOT, place.rows, ("ticket_id", "body"))
    artifacts = Artifacts(place.folder)
    build_requests(chat_job(), snapshot=snapshot, artifacts=artifacts, directory=directory)


def _size(place: Place) -> int:
    return sum(path.stat().st_size for path in (place.folder / "requests").glob("*.jsonl"))


def _request(number: int, body: str) -> object:
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"Ticket: {body}"},
    ]
    schema = {"name": "output", "schema": SCHEMA, "strict": True}
    return {
        "custom_id": custom_id(number),
        "method": "POST",
        "url": ENDPOINT_CHAT,
        "body": {
            "model": "gpt-4o-mini",
            "temperature": 0,
            "max_completion_tokens": 300,
            "response_format": {"type": "json_schema", "json_schema": schema},
            "messages": messages,
        },
    }


CONTENDERS = {"limit": limit, "product": product, "plain": plain}

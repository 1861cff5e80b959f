"""What the simulator keeps over its own death: files, batches and a bill that is never doubled."""

from __future__ import annotations

import io
import json
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import openai

from include.local_stack.rest import wait_until
from include.simulator.batch_runner import BatchRunner
from include.simulator.fault_book import FaultBook
from include.simulator.journal import Journal
from include.simulator.process import ROOT, Simulator, wait_for_status
from include.simulator.settings import Settings, Timing
from include.simulator.store import Store

ENDPOINT = "/v1/embeddings"
PATIENCE = 120.0  # seconds


def client_of(simulator: Simulator) -> openai.OpenAI:
    """An OpenAI client without retries."""
    return openai.OpenAI(base_url=simulator.base_url, api_key="sk-test", max_retries=0)


def embedding_requests(rows: int) -> bytes:
    """A request file."""
    body = {"model": "text-embedding-3-small", "input": "word " * 8}
    return b"".join(
        json.dumps(
            {"custom_id": f"row-{n}", "method": "POST", "url": ENDPOINT, "body": body}
        ).encode()
        + b"\n"
        for n in range(rows)
    )


def create(client: openai.OpenAI, rows: int) -> Any:
    """A batch of so many embedding requests, whose output is large."""
    content = io.BytesIO(embedding_requests(rows))
    file = client.files.create(file=("x.jsonl", content), purpose="batch")
    return client.batches.create(
        input_file_id=file.id,
        endpoint=ENDPOINT,  # type: ignore[arg-type]
        completion_window="24h",
        metadata={"submission_id": "s1"},
    )


def unfinished(state: Path) -> int:
    """How many bytes the unfinished result files have."""
    return sum(one.stat().st_size for one in (state / "scratch").iterdir())


def half_answered(state: Path) -> None:
    """Wait until an unfinished result file has grown to some size."""
    wait_until(
        "a batch that is being answered",
        PATIENCE,
        lambda: unfinished(state) >= 5_000_000,
        interval=0.005,
    )


def test_a_killed_simulator_goes_on_and_bills_each_line_once(tmp_path: Path) -> None:
    """Killed in the middle of answering, it answers the batch again and bills it once."""
    with Simulator.start(tmp_path, speed=100) as simulator:
        batch = create(client_of(simulator), 20_000)
        half_answered(tmp_path)

        simulator.kill()
        left = unfinished(tmp_path)
        simulator.restart()
        ended = wait_for_status(client_of(simulator), batch.id, "completed")
        billed = Counter({one["custom_id"]: one["billed"] for one in simulator.bill_lines()})

    assert left >= 5_000_000, "it had finished before it was killed"
    assert ended.request_counts.completed == 20_000
    assert len(billed) == 20_000
    assert set(billed.values()) == {1}


def test_a_batch_that_a_stale_look_answers_again_is_billed_once(tmp_path: Path) -> None:
    """The clock reads which batches are due; one may be done before it gets to it."""
    instant = Timing(validating=0.0, in_progress=0.0, finalizing=0.0)
    store = Store(tmp_path)
    runner = BatchRunner(Settings(tmp_path, timing=instant), store, FaultBook(store))
    source = store.scratch()
    source.write_bytes(embedding_requests(3))
    file = store.add_file(source, filename="x.jsonl", purpose="batch", lifetime=None)
    batch = store.add_batch(
        id="batch_1",
        created_at=time.time(),
        input_file_id=file.id,
        endpoint=ENDPOINT,
        completion_window="24h",
        **runner.first_status([]),
    )
    runner._validate(batch)
    seen = store.batch_no(batch.no)
    for step in (runner._answer, runner._finish):
        step(store.batch_no(batch.no))
    done = store.batch_no(batch.no)

    runner._answer(seen)

    assert (seen.status, done.status) == ("in_progress", "completed")
    assert store.batch_no(batch.no) == done
    assert len(store.rows("SELECT * FROM bill_line")) == 3
    assert not list((tmp_path / "scratch").iterdir())


def test_everything_is_still_there_after_a_kill(tmp_path: Path) -> None:
    """Address, files, batches, bill and call counts survive."""
    with Simulator.start(tmp_path, speed=50) as simulator:
        client = client_of(simulator)
        batch = wait_for_status(client, create(client, 50).id, "completed")
        content = client.files.content(batch.output_file_id).content
        url, bill = simulator.url, simulator.bill()
        wait_until("the counts on the disk", PATIENCE, lambda: kept_creates(tmp_path))

        simulator.kill()
        simulator.restart()

        client = client_of(simulator)
        assert simulator.url == url
        assert client.batches.retrieve(batch.id).to_dict() == batch.to_dict()
        assert client.files.content(batch.output_file_id).content == content
        assert simulator.bill() == bill
        assert simulator.batches()["creates"] == 1


def kept_creates(state: Path) -> int:
    """How many creations the state has counted; they are written now and then."""
    (file,) = state.glob("*.db")
    with closing(sqlite3.connect(file, timeout=PATIENCE)) as connection:
        query = "SELECT n FROM counter WHERE name = 'POST /v1/batches'"
        return sum(n for (n,) in connection.execute(query))


def test_the_server_answers_while_it_works(tmp_path: Path) -> None:
    """A call is served between upload and completion of a large batch, before it has ended."""
    with Simulator.start(tmp_path, speed=100) as simulator:
        client = client_of(simulator)
        batch = create(client, 20_000)
        half_answered(tmp_path)

        listed = client.batches.list(limit=1).data[0]

        assert (listed.id, listed.status) == (batch.id, "in_progress")


class Watched(Store):
    """A store that asks what the journal says while its counts are written."""

    journal: Journal
    seen: dict[str, int]

    def add_counts(self, counts: dict[str, int]) -> None:
        super().add_counts(counts)
        self.seen = self.journal.counts()


class Connection:
    """Takes the answer of one call."""

    transport = None

    async def send(self, _message: Any) -> None:
        """Answers are of no interest."""


async def test_counts_are_whole_while_they_are_written(tmp_path: Path) -> None:
    """Whoever asks at that moment misses no call; none is written twice."""
    store = Watched(tmp_path)

    async def nothing(*_call: Any) -> Any:
        """Neither an effect nor an answer."""

    store.journal = Journal(nothing, store)
    call = {"type": "http", "method": "POST", "path": "/v1/files", "query_string": b""}

    await store.journal(call, nothing, Connection().send)
    for _ in range(2):
        store.journal.flush()

    assert store.seen == store.counts() == {"POST /v1/files": 1}
    store.close()


def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """A test run that is killed leaves no server behind."""
    program = (
        "import os, signal; from include.simulator.process import Simulator\n"
        f"print(Simulator.start({str(tmp_path)!r}).url, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    url = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    ).stdout.strip()

    assert wait_until("its end", PATIENCE, lambda: is_gone(f"{url}/_sim/health"), interval=0.05)


def is_gone(url: str) -> bool:
    """Whether nobody listens there any more; one that is slow to answer is not gone."""
    try:
        httpx2.get(url, timeout=PATIENCE)
    except httpx2.ConnectError:
        return True
    except httpx2.TransportError:
        return False
    return False

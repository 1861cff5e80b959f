"""Wait: many deferred tasks in one event loop, each for a batch of its own."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import openai

from include.batch_api import AsyncBatchApi
from include.batch_watch import BatchWatch
from include.bench.measurement import ROOT, Notes, Place, Task

POLLS = 5
INTERVAL = 2.0  # seconds between two polls
LOOK = 0.002  # seconds between two looks at the clock
Wait = Callable[[openai.AsyncOpenAI, list[str]], Awaitable[None]]


def prepare(place: Place) -> None:
    """Nothing is needed beforehand."""


def product(place: Place) -> Task:
    """Return the shared lister of the product."""
    return _task(place, _watched)


def limit(place: Place) -> Task:
    """Return the list calls alone, their answers decoded and thrown away."""
    return _task(place, _listed)


def plain(place: Place) -> Task:
    """Return what a task of its own would do for each batch: ask for it at every poll."""
    return _task(place, _read_alone)


async def _watched(client: openai.AsyncOpenAI, names: list[str]) -> None:
    async def connect() -> AsyncBatchApi:
        return AsyncBatchApi(client)

    watch = BatchWatch(connect)

    async def follow(name: str) -> None:
        updates = watch.follow(name, interval=INTERVAL)
        for _ in range(POLLS):
            await anext(updates)
        await updates.aclose()  # type: ignore[attr-defined]

    await asyncio.gather(*(follow(name) for name in names))


async def _listed(client: openai.AsyncOpenAI, names: list[str]) -> None:
    for poll in range(POLLS):
        after: Any = openai.omit
        for _ in range(0, len(names), 100):
            raw = await client.batches.with_raw_response.list(limit=100, after=after)
            after = msgspec.json.decode(raw.content)["data"][-1]["id"]
        if poll < POLLS - 1:
            await asyncio.sleep(INTERVAL)


async def _read_alone(client: openai.AsyncOpenAI, names: list[str]) -> None:
    async def follow(name: str) -> None:
        for poll in range(POLLS):
            await client.batches.retrieve(name)
            if poll < POLLS - 1:
                await asyncio.sleep(INTERVAL)

    await asyncio.gather(*(follow(name) for name in names))


def _task(place: Place, wait: Wait) -> Task:
    return Task(lambda: _run(place.rows, wait), 0)


def _run(count: int, wait: Wait) -> Notes:
    with _server(count) as url:
        names = [f"batch_{number:06d}" for number in range(count)]
        lags = asyncio.run(_with_lag(url, wait, names))
        with urllib.request.urlopen(f"{url}/calls") as answer:  # noqa: S310 - our own URL
            calls = sum(msgspec.json.decode(answer.read()).values())
    return {"calls a poll": calls / POLLS, "loop lag, ms": 1_000 * max(lags, default=0.0)}


async def _with_lag(url: str, wait: Wait, names: list[str]) -> list[float]:
    """Run `wait` and return how long, each time, the loop could not look at the clock."""
    lags: list[float] = []
    client = openai.AsyncOpenAI(api_key="bench", base_url=f"{url}/v1", max_retries=0)
    await client.batches.retrieve(names[0])  # what a process does once is not measured

    async def look() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(LOOK)
            lags.append(time.perf_counter() - before - LOOK)

    looking = asyncio.create_task(look())
    await wait(client, names)
    looking.cancel()
    await client.close()
    return lags


@contextmanager
def _server(count: int) -> Iterator[str]:
    with subprocess.Popen(
        [sys.executable, "-m", "include.bench.wait_server", str(count)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            port = process.stdout.readline().strip() if process.stdout else ""
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


CONTENDERS = {"limit": limit, "product": product, "plain": plain}

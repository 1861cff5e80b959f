"""Many applications put requests while drains run and die: each request ends once, billed once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from include.ledger import Ledger
from include.simulator.process import ROOT, Simulator
from tests.faults.queue_world import QueueWorld

pytestmark = pytest.mark.faults

PATIENCE = 900.0  # seconds
LOUD = ("WARNING", "ERROR")  # what explains a test that fails


@pytest.fixture
def world(simulator: Simulator, tmp_path: Path, empty_postgres_url: str) -> Iterator[QueueWorld]:
    """An empty queue on PostgreSQL."""
    world = QueueWorld(tmp_path, simulator, url=empty_postgres_url)
    yield world
    world.close()


@pytest.fixture
def lite(simulator: Simulator, tmp_path: Path) -> Iterator[QueueWorld]:
    """An empty queue on SQLite."""
    world = QueueWorld(tmp_path, simulator, url=f"sqlite:///{tmp_path}/ledger.db")
    Ledger(sa.create_engine(world.url))
    yield world
    world.close()


def write(world: QueueWorld, writers: int, each: int) -> list[subprocess.Popen[str]]:
    """Start writers that put `each` requests."""
    Ledger(world._engine("ledger"))
    command = [sys.executable, "-m", "tests.faults.one_writer", world.url]
    return [
        _start([*command, str(number * each), str((number + 1) * each)])
        for number in range(writers)
    ]


def drain(world: QueueWorld) -> subprocess.Popen[str]:
    """Start a drain in a process of its own."""
    command = [sys.executable, "-m", "tests.faults.one_drain"]
    return _start([*command, str(world.folder), world.simulator.url, world.url])


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(process: subprocess.Popen[str]) -> str:
    """Wait for a process that must succeed; return what it printed last."""
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out[-3000:]
    return out.splitlines()[-1]


def run_all(world: QueueWorld, writers: list[subprocess.Popen[str]], *, killed: int) -> int:
    """Drain again and again until all has ended; kill `killed` drains. Returns the drains."""
    until, drains, dead = time.monotonic() + PATIENCE, 0, 0
    while time.monotonic() < until:
        are_done = all(one.poll() is not None for one in writers)
        if dead < killed:
            calls = ("/batches$", "/files$", "/content$")
            world.simulator.add_faults(
                {"fault": "kill_after", "path": calls[dead % 3], "nth": 1 + dead}
            )
        process = drain(world)
        out, _ = process.communicate(timeout=PATIENCE)
        print(*(line for line in out.splitlines() if line.startswith(LOUD)), sep="\n")
        drains += 1
        if process.returncode == -signal.SIGKILL:
            dead += 1
            world.simulator.clear_faults()
            continue
        assert process.returncode == 0, out[-3000:]
        found = world.application().statistics()
        if are_done and dead == killed and not found.queued + found.processing:
            return drains
    raise TimeoutError(f"{world.application().statistics()}")


@pytest.mark.postgres
def test_every_request_of_many_writers_ends_once(world: QueueWorld) -> None:
    """Four writers and drains that are killed: nothing is lost, doubled, swapped or paid twice."""
    writers = write(world, 4, 60)

    run_all(world, writers, killed=2)

    assert [int(ended(one)) for one in writers] == [60] * 4
    assert world.problems() == []
    assert world.application().statistics().completed == 240


def test_sqlite_takes_many_writers_as_well(lite: QueueWorld) -> None:
    """The database of a small installation: writers wait for each other, and lose nothing."""
    writers = write(lite, 2, 60)

    run_all(lite, writers, killed=1)

    assert [int(ended(one)) for one in writers] == [60] * 2
    assert lite.problems() == []
    assert lite.application().statistics().completed == 120


@pytest.mark.long
@pytest.mark.postgres
def test_ten_thousand_requests_of_eight_writers_end_once(world: QueueWorld) -> None:
    """The same with 10,000 requests, eight writers and five drains that are killed."""
    before = time.monotonic()
    writers = write(world, 8, 1_250)

    drains = run_all(world, writers, killed=5)

    assert [int(ended(one)) for one in writers] == [1_250] * 8
    assert world.problems() == []
    assert world.application().statistics().completed == 10_000
    runs = world.ledger().runs("request_queue")
    print(f"{drains} drains, {len(runs)} runs, {time.monotonic() - before:.0f} s")

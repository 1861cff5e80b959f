"""Real processes are killed with SIGKILL at a chosen call, and started again."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from include.simulator.process import ROOT, Simulator
from tests.faults.audit import Result, bill_of, full_audit, queue_audit, result_of
from tests.faults.conftest import Tally
from tests.faults.effects import Said
from tests.faults.queue_world import NAME, QueueWorld, request
from tests.faults.world import QUICK, World, thrifty_job

pytestmark = pytest.mark.faults

ROWS = 8
SHARING, BODIES = 10, 6  # rows, and their different requests
AGAIN = {"fault": "line_error", "status": 500, "fraction": 0.4, "first_times": 1}
# method, path, and which of these calls
CALLS = [
    ("POST", "/files$", 1),
    ("POST", "/batches$", 1),
    ("POST", "/batches$", 2),
    ("POST", "/batches$", 3),  # round 2
    ("GET", "/batches/", 1),
    ("GET", "/content$", 1),
    ("GET", "/batches$", 1),  # the look for duplicates
]
CASES = [(fault, *call) for fault in ("kill_after", "kill_before") for call in CALLS]
FAST = [("kill_after", "POST", "/batches$", 1), ("kill_before", "GET", "/content$", 1)]


@pytest.fixture(scope="module")
def like(service: Simulator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Result]:
    """What the same rows come to when nobody is killed."""
    world = World(tmp_path_factory.mktemp("whole"), service, len(CASES))
    world.fill(ROWS)
    service.add_faults(AGAIN)
    world.run()
    yield result_of(world)
    world.close()


def _start(world: World, name: str = "plain") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.faults.one_run", str(world.folder)]
    return _ended([*command, world.simulator.url, str(world.day), name])


def _ended(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
def test_a_killed_process(
    *,
    case: tuple[str, str, str, int],
    service: Simulator,
    like: Result,
    folder: Path,
    said: Said,
    tally: Tally,
    all_faults: bool,
) -> None:
    """Whatever the process was doing: the next one finishes the run, as if nothing had been."""
    if not all_faults and case not in FAST:
        pytest.skip("a part of --all-faults")
    fault, method, path, nth = case
    world = World(folder, service, CASES.index(case))
    world.fill(ROWS)
    world.close()
    service.clear_faults()
    _, rule = service.add_faults(
        AGAIN, {"fault": fault, "method": method, "path": path, "nth": nth}
    )

    killed = _start(world)
    second = _start(world)

    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert service.fired(rule["id"]) == 1
    assert second.returncode == 0, second.stderr
    world.run_ids = second.stdout.split()
    findings = full_audit(world, killed.stderr + second.stderr, like=like)
    world.close()
    tally.add(f"SIGKILL, {fault}", fired=1, rows=ROWS, findings=findings)
    assert not findings


def test_a_killed_process_between_canary_and_rest(
    service: Simulator, folder: Path, said: Said, tally: Tally
) -> None:
    """The canary is judged, the rest is at the API: the next process sends neither again."""
    whole = _thrifty(folder / "whole", service, len(CASES) + 1)
    world = _thrifty(folder / "killed", service, len(CASES) + 2)
    service.clear_faults()
    service.add_faults(AGAIN)
    whole.run()
    service.clear_faults()
    _, rule = service.add_faults(
        AGAIN, {"fault": "kill_after", "method": "POST", "path": "/batches$", "nth": 2}
    )

    killed = _start(world, "thrifty")
    second = _start(world, "thrifty")

    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert service.fired(rule["id"]) == 1
    assert second.returncode == 0, second.stderr
    world.run_ids = second.stdout.split()
    findings = full_audit(world, killed.stderr + second.stderr, like=result_of(whole))
    assert bill_of(world, world.run_ids[0])[0] == BODIES
    tally.add("SIGKILL, canary and shared", fired=1, rows=SHARING, findings=findings)
    assert not findings
    whole.close()
    world.close()


def _thrifty(folder: Path, service: Simulator, day: int) -> World:
    folder.mkdir()
    world = World(folder, service, day, thrifty_job())
    world.fill(SHARING, bodies=BODIES)
    world.close()
    return world


def test_a_killed_drain(
    *, service: Simulator, folder: Path, tally: Tally, all_faults: bool
) -> None:
    """The batch of the second run has just been made: the next drain finishes both runs."""
    if not all_faults:
        pytest.skip("a part of --all-faults; test_request_queue.py kills drains as well")
    world = QueueWorld(folder, service, url=f"sqlite:///{folder}/ledger.db", policy=QUICK)
    world.ledger()
    world.application().put_many([request(number) for number in (0, 3, 6, 2, 5, 8)])
    world.before = frozenset(one["id"] for one in service.batches()["batches"])
    service.clear_faults()
    (rule,) = service.add_faults(
        {"fault": "kill_after", "method": "POST", "path": "/batches$", "nth": 2}
    )
    command = [sys.executable, "-m", "tests.faults.one_drain"]

    killed = _ended([*command, str(folder), service.url, world.url])
    second = _ended([*command, str(folder), service.url, world.url])

    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert service.fired(rule["id"]) == 1
    assert second.returncode == 0, second.stderr
    world.run_ids = [one.run_id for one in world.ledger().runs(NAME)]
    assert len(world.run_ids) == 2
    findings = queue_audit(world, killed.stderr + second.stderr)
    tally.add("SIGKILL, queue", fired=1, rows=6, findings=findings)
    assert not findings
    world.close()

"""Real processes are killed with SIGKILL at a chosen call, and started again."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from include.simulator.process import ROOT, Simulator
from tests.faults.audit import Result, full_audit, result_of
from tests.faults.conftest import Tally
from tests.faults.effects import Said
from tests.faults.world import World

pytestmark = pytest.mark.faults

ROWS = 8
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


def _start(world: World) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.faults.one_run", str(world.folder)]
    return subprocess.run(
        [*command, world.simulator.url, str(world.day)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
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

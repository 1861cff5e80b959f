"""Each thing that a run does goes wrong once, in each way; the run ends as if nothing had been."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import pytest

from include.simulator.process import Simulator
from tests.faults.audit import Result, full_audit, result_of
from tests.faults.conftest import Tally
from tests.faults.effects import AFTER, BEFORE, EXIT_AFTER, KINDS, Effects, Said, until_done
from tests.faults.world import World, job

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("quick_retries")]

ROWS = 8
# These rows need a second round in every world: 2 + 1 request files.
AGAIN = {"fault": "line_error", "status": 500, "fraction": 0.4, "first_times": 1}
FAST = {AFTER: 4, EXIT_AFTER: 9, "late by 2": 1}  # kinds of the fast part, and every which n
CASES = [(kind, False) for kind in KINDS] + [(BEFORE, True), (AFTER, True)]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Simulator]:
    """A simulator of its own for each kind: its books stay short."""
    with Simulator.start(tmp_path / "simulator", instant=True) as simulator:
        yield simulator


def _world(folder: Path, service: Simulator, day: int, effects: Effects, inner: Any) -> World:
    home = folder / f"day-{day}"
    home.mkdir()
    world = World(home, service, day, job(), transport=effects.transport(inner))
    world.fill(ROWS)
    world.close()
    world.prepare = effects.prepare
    service.clear_faults()
    service.add_faults(AGAIN)
    return world


def _finished(world: World, effects: Effects, inner: Any, said: Said) -> Result:
    with effects.renames(world.folder):
        until_done(world, said, effects=effects)
    effects.end(inner)
    world.prepare = lambda _engine: None
    world.close()
    return result_of(world)


@pytest.mark.parametrize(
    ("kind", "lasting"), CASES, ids=[f"{k}{' lasting' * last}" for k, last in CASES]
)
def test_every_effect(
    *,
    kind: str,
    lasting: bool,
    tmp_path: Path,
    service: Simulator,
    network: httpx2.HTTPTransport,
    said: Said,
    tally: Tally,
    all_faults: bool,
) -> None:
    """For n = 1, 2, 3, … the n-th effect fails; the loop ends with the run in which none did."""
    if not all_faults and (lasting or kind not in FAST):
        pytest.skip("a part of --all-faults")
    whole = Effects(0, kind)
    like = _finished(_world(tmp_path, service, 0, whole, network), whole, network, said)
    assert len(like.files) == 3
    assert len(like.results) == ROWS
    for n in count(1, 1 if all_faults else FAST[kind]):
        effects = Effects(n, kind, lasting)
        said.lines.clear()
        world = _world(tmp_path, service, n, effects, network)
        _finished(world, effects, network, said)
        findings = full_audit(world, str(said), like=like)
        world.close()
        name = f"{kind}{' and on' * lasting}, {effects.what.partition(':')[0]}"
        if effects.fired:
            tally.add(name, fired=effects.fired, rows=ROWS, findings=findings)
        assert not findings, f"n={n}, {name}: {effects.what}\n{findings}\n{said}"
        if not effects.fired:
            break
    assert effects.count < n
    assert n > 5

"""Each thing that a run does goes wrong once, in each way; the run ends as if nothing had been."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import pytest

from include.audit import Finding
from include.simulator.process import Simulator
from include.spend_limits import SpendLimit
from tests.faults.audit import bill_of, ended_of, full_audit, queue_audit, result_of
from tests.faults.conftest import Tally
from tests.faults.effects import (
    AFTER,
    BEFORE,
    EXIT_AFTER,
    EXIT_BEFORE,
    KINDS,
    LATE,
    Effects,
    Said,
    Some,
    finished,
)
from tests.faults.queue_world import QueueWorld, request
from tests.faults.world import QUICK, World, thrifty_job

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("quick_retries")]

ROWS = 8
SHARING, BODIES = 10, 6  # rows, and their different requests
ASKED = (0, 3, 6, 2, 5, 8)  # two groups of requests to the queue
# These rows need a second round in every world: 2 + 1 request files.
AGAIN = {"fault": "line_error", "status": 500, "fraction": 0.4, "first_times": 1}
# The kinds of the fast part, and every which n, by test.
FAST = {
    "test_every_effect": {AFTER: 4, EXIT_AFTER: 9, "late by 2": 1},
    "test_every_effect_of_a_canary_and_shared_requests": {EXIT_AFTER: 14},
    "test_every_effect_of_a_drain": {AFTER: 16},
}
CASES = [(kind, False) for kind in KINDS] + [(BEFORE, True), (AFTER, True)]
# The first test has each effect go wrong in every way. In the others each goes wrong in one of
# four, the next in the next, and each POST arrives late: the rest is a matter of single calls.
WAYS = (BEFORE, AFTER, EXIT_BEFORE, EXIT_AFTER)
FEWER = [(kind, False) for kind in (*WAYS, LATE[1])]
Make = Callable[[int, Effects], World]
Audit = Callable[[Any, str], list[Finding]]


@pytest.fixture
def places(request: pytest.FixtureRequest, *, all_faults: bool) -> Iterator[int]:
    """Which effects go wrong; skips the test before a simulator is started for nothing."""
    kind, lasting = request.node.callspec.params["fault"]
    fast = FAST[request.node.originalname]
    if not all_faults:
        if lasting or kind not in fast:
            pytest.skip("a part of --all-faults")
        return count(1, fast[kind])
    if request.node.originalname == "test_every_effect" or kind not in WAYS:
        return count(1)
    return count(1 + WAYS.index(kind), len(WAYS))


@pytest.fixture
def service(places: Iterator[int], tmp_path: Path) -> Iterator[Simulator]:
    """A simulator of its own for each kind: its books stay short."""
    assert places
    with Simulator.start(tmp_path / "simulator", instant=True) as simulator:
        yield simulator


@pytest.fixture
def strike(
    network: httpx2.HTTPTransport, service: Simulator, said: Said, tally: Tally
) -> Callable[..., None]:
    """Make worlds, let one effect of each go wrong, and audit them."""

    def each(
        make: Make, audit: Audit, fault: tuple[str, bool], places: Iterator[int],
        *, rows: int, name: str = "",
    ) -> None:  # fmt: skip
        kind, lasting = fault
        for n in places:
            effects = Effects(n, kind, lasting)
            said.lines.clear()
            world = finished(make(n, effects), effects, network, said)
            findings = audit(world, str(said))
            world.close()
            line = f"{name}{kind}{' and on' * lasting}, {effects.what.partition(':')[0]}"
            if effects.fired:
                tally.add(line, fired=effects.fired, rows=rows, findings=findings)
            assert not findings, f"n={n}, {line}: {effects.what}\n{findings}\n{said}"
            if not effects.fired:
                break
        assert effects.count < n
        assert effects.count > 4

    return each


def _home(folder: Path, day: int) -> Path:
    home = folder / f"day-{day}"
    home.mkdir()
    return home


def _world(
    folder: Path, service: Simulator, day: int, effects: Effects, inner: Any, **parts: Any
) -> World:
    transport = effects.transport(inner)
    return World(_home(folder, day), service, day, transport=transport, **parts)


def _ready(world: Some, service: Simulator, effects: Effects) -> Some:
    """From here on each effect is counted."""
    world.close()
    world.prepare = effects.prepare
    service.clear_faults()
    service.add_faults(AGAIN)
    return world


def _ids(cases: list[tuple[str, bool]]) -> list[str]:
    return [f"{kind}{' lasting' * lasting}" for kind, lasting in cases]


@pytest.mark.parametrize("fault", CASES, ids=_ids(CASES))
def test_every_effect(
    *,
    fault: tuple[str, bool],
    tmp_path: Path,
    service: Simulator,
    network: httpx2.HTTPTransport,
    said: Said,
    strike: Callable[..., None],
    places: Iterator[int],
) -> None:
    """For n = 1, 2, 3, … the n-th effect fails; the loop ends with the run in which none did."""

    def make(day: int, effects: Effects) -> World:
        world = _world(tmp_path, service, day, effects, network)
        world.fill(ROWS)
        return _ready(world, service, effects)

    whole = Effects(0, fault[0])
    like = result_of(finished(make(0, whole), whole, network, said))
    assert len(like.files) == 3
    assert len(like.results) == ROWS
    strike(
        make, lambda world, text: full_audit(world, text, like=like), fault, places, rows=ROWS
    )  # fmt: skip


@pytest.mark.parametrize("fault", FEWER, ids=_ids(FEWER))
def test_every_effect_of_a_canary_and_shared_requests(
    *,
    fault: tuple[str, bool],
    tmp_path: Path,
    empty_ledger: Path,
    service: Simulator,
    network: httpx2.HTTPTransport,
    said: Said,
    strike: Callable[..., None],
    places: Iterator[int],
) -> None:
    """Rows that share requests, a canary before the rest, budgets: the same from every effect."""

    def make(day: int, effects: Effects) -> World:
        world = _world(tmp_path, service, day, effects, network, spec=thrifty_job())
        world.limit = SpendLimit("backfill", Decimal(10))
        shutil.copy(empty_ledger, world.folder / "ledger.db")
        world.fill(SHARING, bodies=BODIES)
        return _ready(world, service, effects)

    whole = Effects(0, fault[0])
    world = finished(make(0, whole), whole, network, said)
    like = result_of(world)
    assert list(like.files) == ["round-1/shard-1", "round-1/shard-2", "round-2/shard-1"]
    assert len(like.results) == SHARING
    assert bill_of(world, world.run_ids[0])[0] == BODIES
    strike(
        make, lambda world, text: full_audit(world, text, like=like), fault, places,
        rows=SHARING, name="canary and shared: ",
    )  # fmt: skip


@pytest.mark.parametrize("fault", FEWER, ids=_ids(FEWER))
def test_every_effect_of_a_drain(
    *,
    fault: tuple[str, bool],
    tmp_path: Path,
    empty_ledger: Path,
    service: Simulator,
    network: httpx2.HTTPTransport,
    said: Said,
    strike: Callable[..., None],
    places: Iterator[int],
) -> None:
    """From `put` to the answer: each request ends once, with its own answer, and is billed once."""

    def make(day: int, effects: Effects) -> QueueWorld:
        home = _home(tmp_path, day)
        url = f"sqlite:///{shutil.copy(empty_ledger, home / 'ledger.db')}"
        transport = effects.transport(network)
        world = QueueWorld(home, service, url=url, transport=transport, policy=QUICK)
        world.asked = [request(number) for number in ASKED]
        world.before = frozenset(one["id"] for one in service.batches()["batches"])
        return _ready(world, service, effects)

    whole = Effects(0, fault[0])
    like = finished(make(0, whole), whole, network, said)
    ended = ended_of(like)
    assert {one["state"] for one in ended.values()} == {"completed"}
    assert {one["rounds"] for one in ended.values()} == {1, 2}
    assert len(like.run_ids) == 2
    strike(
        make, lambda world, text: queue_audit(world, text, like=ended), fault, places,
        rows=len(ASKED), name="queue: ",
    )  # fmt: skip

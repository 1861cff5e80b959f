"""Closing a replaced run is killed at each of its effects, and said again: the end is the same."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import pytest

from include import closing, pipeline, run_mode
from include.actions import Actor
from include.closing import Places
from include.ledger_records import Run, RunState
from include.simulator.process import Simulator
from include.submission import Submission
from tests.faults.effects import AFTER, BEFORE, EXIT_AFTER, EXIT_BEFORE, Effects, ProcessExit
from tests.faults.world import World, job

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("quick_retries")]

ROWS = 8  # two files, of five and three
DAYS = count()  # of worlds on one simulator


def left(parent: Path, simulator: Simulator) -> tuple[World, Run]:
    """A replaced run: one file is at the API, of the other nobody knows whether it is."""
    day = next(DAYS)
    folder = parent / f"day-{day}"
    folder.mkdir()
    world = World(folder, simulator, day)
    world.fill(ROWS)
    ledger = world.ledger()
    run = world._opened(ledger, run_mode.NORMAL)
    run = pipeline.extract(run, ledger, world.artifacts(), world.source)
    first, second = pipeline.build(run, 1, ledger, world.artifacts(), world.target, most_shards=9)
    world.submit(first, ledger)
    dead = Submission(ledger, world.api(), world.artifacts(), world.policy)
    claim = ledger.claim(
        second.submission_id, owner="dead", lease=timedelta(0), enqueued_tokens=None
    )
    assert claim is not None
    dead._post(dead._uploaded(claim.batch))  # and it ended before the answer was committed
    changed = world.spec.request.model_copy(update={"prompt": "Name it.\n---\n{{ body }}"})
    world.spec = job().model_copy(update={"request": changed})
    world._is_open = False
    world._opened(ledger, run_mode.NORMAL)
    world.close()
    return world, run


def close(world: World, run: Run, effects: Effects) -> None:
    """Say `close`, with the effects watched."""
    inner = httpx2.HTTPTransport(verify=False)
    world._api, world.transport = None, effects.transport(inner)
    world.prepare = effects.prepare
    ledger = world.ledger()
    places = Places(
        ledger,
        world.artifacts(),
        lambda _conn: Submission(ledger, world.api(), world.artifacts(), world.policy),
    )
    with effects.renames(world.folder):
        if ledger.run(run.run_id).state == RunState.OPEN:
            plan = closing.plan_close(ledger, run.run_id, is_alive=lambda *_: False)
            closing.close(plan, places, Actor("kim", "cli"))
    world.close()


def end(world: World, run: Run) -> dict[str, Any]:
    """What is left of the run, by the ledger and by the bill."""
    world.prepare = lambda _engine: None
    ledger = world.ledger()
    batches = ledger.batches(run.run_id)
    made = Counter(
        one["metadata"]["submission_id"]
        for one in world.simulator.batches()["batches"]
        if (one.get("metadata") or {}).get("run_id") == run.run_id
    )
    bills = [
        Decimal(one["cost_usd"])
        for one in world.simulator.bill()["by_batch"]
        if (one.get("metadata") or {}).get("run_id") == run.run_id
    ]
    closed = ledger.run(run.run_id)
    world.close()
    return {
        "run": closed.state,
        "states": sorted(one.state for one in batches),
        "answers": sum(one.succeeded for one in batches),
        "made": sorted(made.values()),
        "is the bill": closed.cost_usd == sum(bills),
    }


@pytest.mark.parametrize("kind", [EXIT_AFTER, EXIT_BEFORE, BEFORE, AFTER])
def test_killed_anywhere_and_said_again(
    kind: str, tmp_path: Path, service: Simulator, *, all_faults: bool
) -> None:
    """For n = 1, 2, 3, … the n-th call, commit or rename ends it; a second go does the rest."""
    if not all_faults and kind != EXIT_AFTER:
        pytest.skip("a part of --all-faults")
    for n in count(1):
        effects = Effects(n, kind)
        world, run = left(tmp_path, service)
        try:
            close(world, run, effects)
        except (ProcessExit, Exception):  # noqa: BLE001  # whatever it was, it is over
            assert effects.fired
        close(world, run, Effects(0, kind))
        assert end(world, run) == {
            "run": RunState.CLOSED,
            "states": ["COLLECTED", "COLLECTED"],
            "answers": ROWS,
            "made": [1, 1],
            "is the bill": True,
        }, f"n={n}: {effects.what}"
        if not effects.fired:
            break
    assert n > 10

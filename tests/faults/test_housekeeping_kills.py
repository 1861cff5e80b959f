"""Housekeeping is killed at each of its effects, and run again: the end is the same."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa

from include import ledger_tables as tables
from include.housekeeping import Housekeeping, Keep
from include.ledger_records import now
from include.simulator.process import Simulator
from tests.faults.effects import AFTER, BEFORE, EXIT_AFTER, EXIT_BEFORE, Effects, ProcessExit
from tests.faults.world import World

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("quick_retries")]

ROWS = 7
MOMENTS = ("files_deleted_at", "artifacts_compressed_at", "artifacts_deleted_at")
# After 20 days files are due, and compressing; after 100 days deleting; after 800 the history.
AGES = (20, 100, 800)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Simulator]:
    """A simulator of its own: its files are counted."""
    with Simulator.start(tmp_path / "simulator", instant=True) as simulator:
        yield simulator


def kept(world: World, effects: Effects, age: int) -> None:
    """Do every chore, `age` days after the run."""
    with effects.renames(world.folder):
        chores = Housekeeping(
            world.ledger(),
            world.artifacts(),
            lambda _conn_id: world.api(),
            Keep(files_days=0.0),
            apply=True,
            clock=lambda: now() + timedelta(days=age),
        )
        for chore in (chores.orphans, chores.files, chores.old_artifacts, chores.old_history):
            chore()


def end(world: World) -> dict[str, Any]:
    """What is left: artifacts, and of the ledger all but when it was."""
    run_id = world.run_ids[0]
    root = world.folder / "artifacts"
    with world.ledger().engine.connect() as connection:
        batches = connection.execute(
            sa.select(tables.batch.c.state, tables.batch.c.files_deleted_at.is_not(None))
        ).all()
        run = connection.execute(
            sa.select(*(tables.run.c[name].is_not(None) for name in MOMENTS[1:]))
        ).one()
    return {
        "artifacts": sorted(one.name for one in root.rglob("*") if one.is_file()),
        "batches": sorted(map(tuple, batches)),
        "run": tuple(run),
        "history": len(world.ledger().history(run_id)),
    }


@pytest.mark.parametrize("age", AGES)
@pytest.mark.parametrize("kind", [EXIT_BEFORE, EXIT_AFTER, BEFORE, AFTER])
def test_killed_anywhere_and_run_again(
    *,
    kind: str,
    age: int,
    tmp_path: Path,
    service: Simulator,
    network: httpx2.HTTPTransport,
    all_faults: bool,
) -> None:
    """For n = 1, 2, 3, … the n-th call, commit or rename ends it; a second go does the rest."""
    if not all_faults and (kind != EXIT_AFTER or age == AGES[1]):
        pytest.skip("a part of --all-faults")
    like: dict[str, Any] | None = None
    for n in count(0):
        effects = Effects(n, kind)
        world = _done(tmp_path, service, n, effects, network)
        try:
            kept(world, effects, age)
        except (ProcessExit, Exception):  # noqa: BLE001  # whatever it was, it is over
            assert effects.fired
        world.close()
        _undisturbed(world, network)
        kept(world, Effects(0, kind), age)
        found = end(world)
        like = like or found
        assert found == like, f"n={n}: {effects.what}"
        assert [one for one in service_files(world) if one in _ours(world)] == []
        world.close()
        if n and not effects.fired:
            break
    assert n > 5


def _done(
    folder: Path, service: Simulator, day: int, effects: Effects, inner: httpx2.BaseTransport
) -> World:
    home = folder / f"day-{day}"
    home.mkdir()
    world = World(home, service, day)
    world.fill(ROWS)
    world.run()
    world.close()
    world._api = None
    world.transport = effects.transport(inner)
    world.prepare = effects.prepare
    return world


def _undisturbed(world: World, inner: httpx2.BaseTransport) -> None:
    world._api, world.transport, world.prepare = None, inner, lambda _engine: None


def service_files(world: World) -> set[str]:
    """Every file at the provider."""
    return {one.file_id for one in world.api().files()}


def _ours(world: World) -> set[str | None]:
    batches = world.ledger().batches(world.run_ids[0])
    return {id_ for one in batches for id_ in (one.file_id, one.output_file_id)}

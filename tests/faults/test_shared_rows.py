"""Runs whose rows share requests, against the bill: each body is paid for once."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from include.audit import audit
from include.dataset_path import dataset_at
from include.simulator.process import Simulator
from tests.faults.world import World, job

BODIES = ("one", "two", "three")


def make_world(folder: Path, service: Simulator, day: int, **changes: Any) -> World:
    world = World(folder, service, day, spec=job(reuse={"identical": True}, **changes))
    at = (world.partition.start + timedelta(hours=1)).isoformat()
    notes = [{"id": f"n{n:02d}", "at": at, "body": BODIES[n % 3]} for n in range(20)]
    with world.source().begin() as connection:
        connection.exec_driver_sql("CREATE TABLE notes (note_id TEXT, written_at TEXT, body TEXT)")
        connection.execute(sa.text("INSERT INTO notes VALUES (:id, :at, :body)"), notes)
    return world


@pytest.fixture
def worlds(folder: Path) -> Iterator[list[World]]:
    made: list[World] = []
    yield made
    for world in made:
        world.close()


def paid(service: Simulator, world: World) -> int:
    return sum(
        line["billed"]
        for line in service.bill_lines()
        if line["metadata"].get("run_id") in world.run_ids
    )


def findings(world: World) -> list[Any]:
    return audit(
        world.run_ids[-1], world.ledger(), world.artifacts(), world.target(), world.api(),
        skew=timedelta(seconds=2),
    )  # fmt: skip


def test_identical_bodies_are_sent_once(
    service: Simulator, folder: Path, worlds: list[World]
) -> None:
    """20 rows with 3 bodies are 3 requests and 20 results; a second run sends none."""
    world = make_world(folder, service, 0)
    worlds.append(world)

    report = world.run()

    assert (report.loaded, report.shared, report.requests) == (20, 17, 3)
    assert paid(service, world) == 3
    assert findings(world) == []

    again = world.run()
    assert (again.reused, again.requests) == (20, 0)
    assert paid(service, world) == 3


def test_followers_end_as_their_leader_does(
    service: Simulator, folder: Path, worlds: list[World]
) -> None:
    """Tried again with it, failed with it; a redrive sends one request for all of them."""
    world = make_world(folder, service, 1)
    worlds.append(world)
    service.add_faults(
        {"fault": "line_error", "status": 500, "fraction": 0.5, "first_times": 1, "seed": 3},
        {"fault": "refusal", "fraction": 0.5, "seed": 3},
    )
    try:
        report = world.run()
    finally:
        service.clear_faults()

    assert report.loaded + report.failed == 20
    assert 0 < report.failed < 20
    assert findings(world) == []

    mended = world.run(mode="redrive")
    assert (mended.loaded, mended.reused) == (report.failed, report.loaded)
    assert mended.requests < 3
    assert findings(world) == []


def test_a_dataset_has_every_row_that_shares(
    service: Simulator, folder: Path, worlds: list[World]
) -> None:
    """A Parquet dataset as target: the same rows as a table, each under its own key."""
    spec = {"target": {"path": f"{folder}/labels"}}
    world = make_world(folder, service, 2, **spec)
    worlds.append(world)
    dataset = dataset_at(world.spec.target.path)
    world.target = lambda: dataset  # type: ignore[method-assign,assignment,return-value]

    report = world.run()

    assert (report.loaded, report.shared, report.requests) == (20, 17, 3)
    assert findings(world) == []


def more(world: World, *notes: tuple[str, str]) -> None:
    """Add rows to the source."""
    at = (world.partition.start + timedelta(hours=2)).isoformat()
    with world.source().begin() as connection:
        for name, body in notes:
            connection.exec_driver_sql("INSERT INTO notes VALUES (?, ?, ?)", (name, at, body))


def test_new_rows_never_follow_one_that_is_left_out(
    service: Simulator, folder: Path, worlds: list[World]
) -> None:
    """A row that is loaded already leads nobody: the first new row of its body is sent for all."""
    world = make_world(folder, service, 3)
    worlds.append(world)
    world.run()
    more(world, ("n90", "one"), ("n91", "one"), ("n92", "four"))

    report = world.run()

    assert (report.reused, report.requests, report.shared, report.loaded) == (20, 2, 1, 3)
    assert paid(service, world) == 5
    assert findings(world) == []


def test_a_rejected_row_leads_nobody(service: Simulator, folder: Path, worlds: list[World]) -> None:
    """The first rows of a body have one key and fail unsent; the others get their answer."""
    world = make_world(folder, service, 4)
    worlds.append(world)
    more(world, ("a00", "one"), ("a00", "one"))

    report = world.run()

    assert (report.loaded, report.failed, report.requests, report.shared) == (20, 2, 3, 17)
    assert paid(service, world) == 3
    assert findings(world) == []


def test_force_sends_each_body_again_once(
    service: Simulator, folder: Path, worlds: list[World]
) -> None:
    """Rows that follow take the new answer as their leader does."""
    world = make_world(folder, service, 5)
    worlds.append(world)
    world.run()

    forced = world.run(mode="force")

    assert (forced.loaded, forced.reused, forced.shared, forced.requests) == (20, 0, 17, 3)
    assert paid(service, world) == 6
    assert findings(world) == []

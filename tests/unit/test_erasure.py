"""One row's data is deleted on request, from everywhere, and nothing of other runs is."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from include import erasure, pipeline
from include.errors import ConfigurationError
from include.housekeeping import Housekeeping
from include.simulator.process import Simulator
from include.target_table import Family
from tests.faults.world import World

ROWS = 7
SECRET = "secret-of-day-0"
TIME = "2026-11-01T10:00:00Z"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A day that has been loaded."""
    with Simulator.start(tmp_path / "simulator", instant=True) as simulator:
        made = World(tmp_path, simulator)
        made.fill(ROWS, text=SECRET)
        yield made
        made.close()


def keeping(world: World) -> Housekeeping:
    """What deletes files and artifacts."""
    return Housekeeping(world.ledger(), world.artifacts(), lambda _conn_id: world.api(), apply=True)


def erased(world: World, key: str) -> erasure.Erased:
    """Erase one row."""
    found = erasure.traces("note_labels", [key], world.ledger(), world.artifacts())
    return erasure.erase(
        found, keeping(world), lambda _spec: world.target(), job="note_labels", key=[key]
    )


def loaded(world: World) -> set[str]:
    """The keys in the results table."""
    with world.target().connect() as connection:
        return set(connection.exec_driver_sql("SELECT note_id FROM note_labels").scalars())


def test_every_trace_of_the_row_goes(world: World) -> None:
    """Its line in the results, the artifacts of its run, the files at the provider."""
    world.run()

    done = erased(world, "n0003")

    assert (done.runs, done.rows, done.left) == (1, 1, ())
    assert loaded(world) == {f"n{n:04d}" for n in range(ROWS) if n != 3}
    assert list(world.api().files()) == []
    left = [path for path in (world.folder / "artifacts").rglob("*") if path.is_file()]
    assert left == []
    assert erased(world, "n0003").runs == 0


def test_other_runs_keep_everything(world: World) -> None:
    """A run that never had the row is not touched."""
    world.run()
    before = sorted((world.folder / "artifacts").rglob("*"))

    done = erased(world, "n9999")

    assert done == erasure.Erased(0, 0, 0, ())
    assert sorted((world.folder / "artifacts").rglob("*")) == before
    assert len(loaded(world)) == ROWS


def test_an_open_run_is_told_first(world: World) -> None:
    """It still needs its snapshot: nothing is deleted."""
    ledger = world.ledger()
    run = world._opened(ledger, "normal")

    pipeline.extract(run, ledger, world.artifacts(), world.source)

    with pytest.raises(ConfigurationError, match="is open and has this row"):
        erased(world, "n0003")


def test_a_key_of_another_shape_is_told(world: World) -> None:
    """The message names the key columns."""
    world.run()

    with pytest.raises(ConfigurationError, match="has the key note_id: give 1 values"):
        erasure.traces("note_labels", ["a", "b"], world.ledger(), world.artifacts())


def test_a_row_goes_though_its_artifacts_are_gone(world: World) -> None:
    """They went for another row, or by age: the line in the results is found by its key."""
    world.run()
    erased(world, "n0003")

    done = erased(world, "n0004")

    assert (done.runs, done.rows) == (0, 1)
    assert loaded(world) == {f"n{n:04d}" for n in range(ROWS) if n not in (3, 4)}


def test_a_failed_row_goes_though_its_artifacts_are_gone(world: World) -> None:
    """Its line in the failures is found by the digest of its key."""
    world.simulator.add_faults({"fault": "line_error", "status": 400})
    world.run()
    erased(world, "n0003")

    assert erased(world, "n0004").rows == 1
    assert erased(world, "n0004").rows == 0


def test_a_key_that_looks_like_a_time_is_no_other_key(world: World) -> None:
    """Texts that mean the same moment are two keys: the other row stays."""
    world.run()
    with world.target().begin() as connection:
        for old, new in (("n0003", "20261101"), ("n0004", "2026-11-01T00:00:00")):
            connection.exec_driver_sql(
                "UPDATE note_labels SET note_id = ? WHERE note_id = ?", (new, old)
            )

    assert erased(world, "20261101").rows == 1
    assert "2026-11-01T00:00:00" in loaded(world)


@pytest.mark.parametrize(
    ("family", "text", "values"),
    [
        (Family.TEXT, "T-1", ["T-1"]),
        (Family.TEXT, TIME, [TIME, "2026-11-01T10:00:00+00:00"]),
        (Family.TEXT, "20261101", ["20261101"]),
        (Family.TEXT, "2026-11-01", ["2026-11-01"]),
        (Family.INTEGER, "4711", [4711]),
        (Family.INTEGER, "T-1", []),
        (Family.NUMERIC, "nothing", []),
        (Family.BOOLEAN, "true", [True]),
        (Family.AWARE_TIME, TIME, [datetime(2026, 11, 1, 10, tzinfo=UTC)]),
    ],
)
def test_a_key_is_looked_for_as_the_table_holds_it(
    family: Family, text: str, values: list[object]
) -> None:
    """By the type of its column; what cannot be in it is not there."""
    assert erasure._stored(text, family) == values

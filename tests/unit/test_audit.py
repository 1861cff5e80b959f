"""The audit finds what is broken, and says where; a sound run has no finding."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from include.audit import Finding, audit
from include.simulator.process import Simulator
from tests.faults.world import TEXT, World

ROWS = 8
AGAIN = {"fault": "line_error", "status": 500, "fraction": 0.4, "first_times": 1}
OVER_BUDGET = """UPDATE llm_batch_run SET estimate_usd = '9',
 spec = replace(spec, '"max_usd":null', '"max_usd":"1"')"""
REFUSED = {"fault": "refusal", "fraction": 0.3, "seed": 3}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A run of two rounds that has ended well, with results and failures."""
    rules = [AGAIN, REFUSED]
    state = tmp_path_factory.mktemp("simulator")
    with Simulator.start(state, instant=True, faults=rules) as service:
        world = World(tmp_path_factory.mktemp("sound"), service)
        world.fill(ROWS)
        report = world.run()
        assert report.rounds == 2
        assert report.loaded
        assert report.failed
        world.close()
        yield world


@pytest.fixture
def world(sound: World, tmp_path: Path) -> Iterator[World]:
    """A copy of that run, to be damaged."""
    shutil.copytree(sound.folder, tmp_path / "copy")
    copy = World(tmp_path / "copy", sound.simulator, run_ids=list(sound.run_ids))
    yield copy
    copy.close()


def _change(engine: sa.Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            assert connection.exec_driver_sql(statement).rowcount >= 1


def _findings(world: World) -> list[Finding]:
    return audit(
        world.run_ids[0],
        world.ledger(),
        world.artifacts(),
        world.target(),
        world.api(),
        skew=timedelta(seconds=5),
    )


def _broken(world: World) -> set[str]:
    return {one.invariant for one in _findings(world)}


def test_a_sound_run_has_no_finding(world: World) -> None:
    """Nothing is reported of a run that kept its promises."""
    assert _findings(world) == []


@pytest.mark.parametrize("table", ["note_labels", "note_labels_failures"])
def test_a_row_that_disappears_is_found(world: World, table: str) -> None:
    """A row in neither table is named by its position, without its text."""
    name: sa.ColumnClause[Any] = sa.column("note_id")
    rows = sa.table(table, name)
    with world.target().begin() as connection:
        first = connection.scalar(sa.select(sa.func.min(name)).select_from(rows))
        connection.execute(sa.delete(rows).where(name == first))

    (finding,) = _findings(world)

    assert finding.invariant == "I1"
    assert "1 row is in neither" in finding.message
    assert TEXT not in finding.message


def test_a_row_in_both_tables_is_found(world: World) -> None:
    """A row cannot have succeeded and failed."""
    _change(
        world.target(),
        "INSERT INTO note_labels (note_id, _custom_id, _model, _run_id, _interval_start,"
        " _interval_end, _loaded_at) SELECT note_id, _custom_id, _model, _run_id, _interval_start,"
        " _interval_end, _failed_at FROM note_labels_failures LIMIT 1",
    )

    (finding,) = _findings(world)

    assert "1 row is in both" in finding.message


def test_a_run_that_is_not_done_is_found(world: World) -> None:
    """Rows of an open run have not ended."""
    _change(world.ledger().engine, "UPDATE llm_batch_run SET state = 'OPEN'")

    assert _broken(world) == {"I1"}


def test_counts_that_do_not_add_up_are_found(world: World) -> None:
    """Loaded, failed and reused are the rows of the snapshot."""
    _change(world.ledger().engine, "UPDATE llm_batch_run SET loaded = loaded - 1")

    assert _broken(world) == {"I1"}


def test_an_unknown_batch_is_found(world: World) -> None:
    """The API has a batch of this run that the ledger does not have, and the reverse."""
    _change(
        world.ledger().engine,
        "UPDATE llm_batch_batch SET batch_id = 'batch_other' WHERE round = 2",
    )

    messages = [one.message for one in _findings(world) if one.invariant == "I3"]

    assert len(messages) == 2
    assert "the ledger does not know batch_" in messages[0]
    assert "the API does not know it" in messages[1]


def test_a_line_without_an_outcome_is_found(world: World) -> None:
    """The raw files have as many lines as there are outcomes, damaged and double ones."""
    path = next((world.folder / "artifacts").rglob("*.output.jsonl"))
    path.write_bytes(path.read_bytes() + b'{"custom_id":"one more"}\n')

    assert _broken(world) == {"I5"}


def test_a_request_without_an_outcome_is_found(world: World) -> None:
    """Each request has one."""
    _change(world.ledger().engine, "UPDATE llm_batch_batch SET succeeded = succeeded - 1")

    assert "I5" in _broken(world)


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM llm_batch_event WHERE became = 'SUBMITTED'",
        "UPDATE llm_batch_event SET was = 'COLLECTED' WHERE became = 'SUBMITTED'",
        "UPDATE llm_batch_batch SET state = 'ENDED'",
        "DELETE FROM llm_batch_event WHERE was IS NULL AND submission_id IS NOT NULL",
    ],
)
def test_a_move_off_the_edges_is_found(world: World, statement: str) -> None:
    """A batch comes to its state along the drawn edges, without a gap."""
    _change(world.ledger().engine, statement)

    assert "I7" in _broken(world)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE llm_batch_round SET round = 4 WHERE round = 2",
        "UPDATE llm_batch_round SET retry = retry + 1 WHERE round = 1",
        "UPDATE llm_batch_batch SET requests = requests + 1 WHERE round = 2",
        OVER_BUDGET,
    ],
)
def test_a_bound_that_is_broken_is_found(world: World, statement: str) -> None:
    """Rounds are bounded, each sends what the one before left open, and the budget is kept."""
    _change(world.ledger().engine, statement)

    assert "I8" in _broken(world)

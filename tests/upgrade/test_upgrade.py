"""What an earlier release has left half done, this one finishes: nothing lost, nothing paid twice.

Each folder beside this file is what a release has recorded (see `record.py`): its ledger, artifacts
and target, and the batches that the API had.
"""

from __future__ import annotations

import json
import sqlite3
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from include import ledger_database
from include import ledger_tables as tables
from include.audit import audit
from include.errors import ConfigurationError
from include.job_spec import JobSpec
from include.ledger import Ledger
from include.ledger_records import Run, RunState
from include.simulator.process import Simulator
from tests.faults.world import DAY, START, World
from tests.upgrade.record import ROWS

HERE = Path(__file__).parent
RELEASES = sorted(folder for folder in HERE.iterdir() if (folder / "notes.json").exists())
PATIENCE = 120.0  # seconds that an instant simulator may take for some batches


@dataclass(frozen=True)
class Restored:
    """A machine as the earlier release has left it."""

    home: Path
    engine: sa.Engine  # of the ledger
    simulator: Simulator
    notes: dict[str, Any]

    def world(self, run: Run) -> World:
        """The world that goes on with a run."""
        day = (run.interval_start - START) // DAY
        world = World(self.home, self.simulator, day, JobSpec.from_json(run.spec))
        world._engines["ledger"] = self.engine
        world.run_ids = [run.run_id]
        world._is_open = run.state == RunState.OPEN
        return world


@pytest.fixture(params=RELEASES, ids=lambda folder: f"from {folder.name}")
def release(request: pytest.FixtureRequest) -> Path:
    """What one release has recorded."""
    folder: Path = request.param
    return folder


@pytest.fixture(params=["sqlite", "postgres"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    """An empty database for the ledger."""
    if request.param == "sqlite":
        made = sa.create_engine(f"sqlite:///{tmp_path}/ledger.db")
    else:
        made = sa.create_engine(request.getfixturevalue("empty_postgres_url"))
    yield made
    made.dispose()


@pytest.fixture
def restored(release: Path, engine: sa.Engine, tmp_path: Path) -> Iterator[Restored]:
    """The dump in its database, the artifacts in place, the batches at the API."""
    notes = json.loads((release / "notes.json").read_text())
    for name in ("source", "target", "dump"):
        _load(tmp_path / f"{name}.db", release / f"{name.replace('dump', 'ledger')}.sql")
    with tarfile.open(release / "artifacts.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    _copy_ledger(tmp_path / "dump.db", engine, release.name)
    with Simulator.start(tmp_path / "simulator", instant=True) as simulator:
        found = Restored(tmp_path, engine, simulator, notes)
        _make_batches(found)
        yield found


def _load(database: Path, script: Path) -> None:
    connection = sqlite3.connect(database)
    connection.executescript(script.read_text())
    connection.close()


def _copy_ledger(dump: Path, engine: sa.Engine, version: str) -> None:
    """Make the tables as that release did, and put its rows in, values as they were stored."""
    source = sqlite3.connect(dump)
    with ledger_database.writing(ledger_database.prepare(engine)) as connection:
        ledger_database.upgrade(connection, version)
        mark = "?" if engine.dialect.name == "sqlite" else "%s"
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql("SET LOCAL TIME ZONE 'UTC'")
        for table in ("run", "round", "batch", "duplicate", "event"):
            rows = source.execute(f"SELECT * FROM llm_batch_{table}")  # noqa: S608
            names = ", ".join(f'"{column[0]}"' for column in rows.description)
            marks = ", ".join(mark for _ in rows.description)
            statement = f"INSERT INTO llm_batch_{table} ({names}) VALUES ({marks})"  # noqa: S608
            for row in rows:
                connection.exec_driver_sql(statement, row)
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql(
                "SELECT setval('llm_batch_event_event_id_seq', max(event_id)) FROM llm_batch_event"
            )
    source.close()


def _make_batches(restored: Restored) -> None:
    """Make every batch that the API had, and put its new ids where the ledger has the old ones."""
    world = World(restored.home, restored.simulator)
    with restored.engine.begin() as connection:
        for known in restored.notes["batches"]:
            mine = {"submission": known["metadata"]["submission_id"]}
            path = connection.execute(
                sa.text("SELECT request_file FROM llm_batch_batch WHERE submission_id=:submission"),
                mine,
            ).scalar_one()
            with world.artifacts().local(path) as file:
                file_id = world.api().upload(file, "restored.jsonl", keep_seconds=None)
            view = world.api().create(
                file_id=file_id,
                endpoint=known["endpoint"],
                metadata=known["metadata"],
                keep_seconds=None,
            )
            change = (
                "UPDATE llm_batch_batch SET file_id=:file WHERE submission_id=:submission",
                "UPDATE llm_batch_batch SET batch_id=:new WHERE batch_id=:old",
            )
            ids = {**mine, "file": file_id, "new": view.batch_id, "old": known["id"]}
            for statement in change:
                connection.execute(sa.text(statement), ids)
            _wait(world, view.batch_id)


def _wait(world: World, batch_id: str) -> None:
    until = time.monotonic() + PATIENCE
    while not world.api().retrieve(batch_id).is_final:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_half_done_runs_are_finished(restored: Restored) -> None:
    """From every state: all rows end once, nothing is billed twice, the audit finds nothing."""
    ledger = Ledger(restored.engine)
    before = {run.run_id: run.state for run in ledger.runs()}
    assert set(restored.notes["runs"]) <= set(before)

    for run in reversed(ledger.runs()):
        if run.state == RunState.OPEN:
            restored.world(run).run()

    after = ledger.runs()
    assert {run.run_id for run in after} == set(before)
    assert {run.state for run in after} == {RunState.DONE}
    assert {run.rows for run in after} == {run.loaded + run.failed for run in after} == {ROWS}
    assert billed_twice(restored) == []
    assert [one for run in newest(after) for one in findings(restored, run)] == []


def test_a_day_that_is_done_is_reused(restored: Restored) -> None:
    """Another run of it knows its requests again: nothing is sent."""
    ledger = Ledger(restored.engine)
    (run_id,) = [one for one, state in restored.notes["runs"].items() if state == "done"]
    run = ledger.run(run_id)
    made = len(restored.simulator.batches()["batches"])

    report = restored.world(run).run()

    assert (report.reused, report.batches) == (ROWS, 0)
    assert len(restored.simulator.batches()["batches"]) == made
    assert ledger.run(run_id) == run


def test_a_pinned_spec_means_the_same(restored: Restored) -> None:
    """Its digest is the one that was recorded: a cleared `extract` joins the same run."""
    for run in Ledger(restored.engine).runs():
        assert JobSpec.from_json(run.spec).digest == run.spec_digest


def test_an_upgraded_ledger_is_like_a_new_one(restored: Restored, tmp_path: Path) -> None:
    """The same tables, columns and indexes, whichever way they came to be."""
    Ledger(restored.engine)
    new = sa.create_engine(f"sqlite:///{tmp_path}/new.db")
    Ledger(new)

    assert shape(restored.engine) == shape(new)
    assert set(tables.metadata.tables) | {"llm_batch_version"} == set(shape(new))


def test_an_older_release_leaves_a_newer_ledger_alone(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its workers stop with a message that says which release they need; nothing is changed."""
    Ledger(engine)
    newest_migration = ledger_database.HEAD
    monkeypatch.setattr(ledger_database, "HEAD", "0001")

    with pytest.raises(ConfigurationError, match=f"{newest_migration}, this release knows 0001"):
        Ledger(engine)
    with ledger_database.reading(engine) as connection:
        assert ledger_database.version(connection) == newest_migration


def newest(runs: list[Run]) -> list[Run]:
    """The newest run of each partition: only that can be held against the target."""
    return list({run.interval_start: run for run in reversed(runs)}.values())


def findings(restored: Restored, run: Run) -> list[Any]:
    """What the audit of a run finds."""
    world = restored.world(run)
    found = audit(
        run.run_id, Ledger(restored.engine), world.artifacts(), world.target(), world.api()
    )
    world.target().dispose()
    return found


def billed_twice(restored: Restored) -> list[Any]:
    """Every row of a round of a run that the simulator has billed more than once."""
    tags = {one["id"]: one["metadata"] for one in restored.simulator.batches()["batches"]}
    bill: Counter[tuple[str, str, str]] = Counter()
    for line in restored.simulator.bill_lines():
        tag = tags[line["batch_id"]]
        bill[tag["run_id"], tag["round"], line["custom_id"]] += line["billed"]
    assert bill
    return [key for key, times in bill.items() if times > 1]


def shape(engine: sa.Engine) -> dict[str, Any]:
    """Every table with its columns and indexes, in words that all databases share."""
    look = sa.inspect(engine)
    return {
        table: (
            {column["name"]: column["nullable"] for column in look.get_columns(table)},
            {index["name"] for index in look.get_indexes(table) if not index["unique"]},
        )
        for table in look.get_table_names()
    }


def test_every_state_was_recorded() -> None:
    """The recording holds each state that a run can be left in."""
    for folder in RELEASES:
        states = set(json.loads((folder / "notes.json").read_text())["runs"].values())

        assert {"opened", "submitting", "submitted", "round 2 submitted", "done"} <= states
    assert RELEASES

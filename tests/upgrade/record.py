"""Records what a release leaves half done: `python -m tests.upgrade.record FOLDER`.

Run it once with the code of a release, and keep the folder under the number of its newest
migration. `test_upgrade.py` then holds every later release to finishing these runs.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import tarfile
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import sqlalchemy as sa

from include import collecting, pipeline, run_mode
from include.batch_view import BatchView
from include.ledger import Ledger
from include.ledger_records import Batch, Run
from include.simulator.process import Simulator
from include.submission import Submission, SubmissionPolicy
from include.waiting import Verdict, look
from tests.faults.world import World

ROWS = 7  # two request files: five rows and two
# These rows need a second round.
AGAIN = {"fault": "line_error", "status": 500, "fraction": 0.4, "first_times": 1}
DATABASES = ("ledger", "source", "target")


class Stop(Exception):  # noqa: N818
    """The run has come as far as it shall."""


def main(folder: Path) -> None:
    """Write ledger, source and target as SQL, the artifacts, and what the API was asked for."""
    folder.mkdir(parents=True)
    with (
        tempfile.TemporaryDirectory() as scratch,
        Simulator.start(Path(scratch) / "simulator", instant=True) as simulator,
    ):
        home = Path(scratch)
        simulator.add_faults(AGAIN)
        states = dict(_half_done(home, simulator, day, step) for day, step in enumerate(STEPS))
        for name in DATABASES:
            _dump(home / f"{name}.db", folder / f"{name}.sql")
        with tarfile.open(folder / "artifacts.tar.gz", "w:gz") as archive:
            archive.add(home / "artifacts", "artifacts")
        made = [_made(one) for one in simulator.batches()["batches"]]
        ledger = Ledger(sa.create_engine(f"sqlite:///{home}/ledger.db"))
        notes = {"runs": states, "batches": made, "trigger": _trigger(ledger)}
        (folder / "notes.json").write_text(json.dumps(notes, indent=2) + "\n")


def _half_done(home: Path, simulator: Simulator, day: int, step: str) -> tuple[str, str]:
    world = World(home, simulator, day)
    _fill(world, day)
    ledger = world.ledger()
    run = world._opened(ledger, run_mode.NORMAL)
    STEPS[step](world, run, ledger)
    world.close()
    return run.run_id, step


def _fill(world: World, day: int) -> None:
    """Keys of this day alone: the runs do not share rows."""
    at = (world.partition.start + timedelta(hours=12)).isoformat()
    notes = [{"id": f"d{day}n{n}", "at": at, "body": f"note {n} of {day}"} for n in range(ROWS)]
    with world.source().begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE IF NOT EXISTS notes (note_id TEXT, written_at TEXT, body TEXT)"
        )
        connection.execute(sa.text("INSERT INTO notes VALUES (:id, :at, :body)"), notes)


# How far each run comes; every step goes on from the one before.


def _opened(world: World, run: Run, ledger: Ledger) -> Run:
    return run


def _extracted(world: World, run: Run, ledger: Ledger) -> Run:
    return pipeline.extract(run, ledger, world.artifacts(), world.source)


def _built(world: World, run: Run, ledger: Ledger, number: int = 1) -> list[Batch]:
    run = _extracted(world, run, ledger)
    return pipeline.build(run, number, ledger, world.artifacts(), world.target, most_shards=9)


def _submitting(world: World, run: Run, ledger: Ledger) -> None:
    """The batches are made, and their answers are lost: the worst moment to die in."""
    for batch in _built(world, run, ledger):
        submission = Submission(ledger, world.api(), world.artifacts(), SubmissionPolicy())
        submission._record = _die  # type: ignore[method-assign]
        try:
            submission.submit(batch.submission_id)
        except Stop:
            continue


def _die(_batch: Batch, _made: BatchView) -> Batch:
    raise Stop


def _submitted(world: World, run: Run, ledger: Ledger, number: int = 1) -> list[Batch]:
    batches = _built(world, run, ledger, number)
    for batch in batches:
        world.submit(batch, ledger)
    return batches


def _ended(world: World, run: Run, ledger: Ledger, number: int = 1) -> list[Batch]:
    batches = _submitted(world, run, ledger, number)
    for one in batches:
        while look(ledger.batch(one.submission_id), ledger, world.api(), world.wait) is not OVER:
            pass
    return batches


def _collected(world: World, run: Run, ledger: Ledger, number: int = 1) -> None:
    for one in _ended(world, run, ledger, number):
        batch = ledger.batch(one.submission_id)
        collecting.collect(batch, ledger, world.artifacts(), world.api())


def _settled(world: World, run: Run, ledger: Ledger, number: int = 1) -> None:
    _collected(world, run, ledger, number)
    pipeline.settle(ledger.run(run.run_id), number, ledger, world.api(), world.policy)


def _second_submitted(world: World, run: Run, ledger: Ledger) -> None:
    _settled(world, run, ledger)
    assert _submitted(world, ledger.run(run.run_id), ledger, 2), "no row needs a second round"


def _second_settled(world: World, run: Run, ledger: Ledger) -> None:
    _settled(world, run, ledger)
    _settled(world, ledger.run(run.run_id), ledger, 2)


def _done(world: World, run: Run, ledger: Ledger) -> None:
    _second_settled(world, run, ledger)
    pipeline.load(ledger.run(run.run_id), ledger, world.artifacts(), world.target)


def _redriven(world: World, run: Run, ledger: Ledger) -> None:
    """A done run, with a forced one of the same partition that is half way."""
    _done(world, run, ledger)
    world._is_open = False
    _submitted(world, world._opened(ledger, run_mode.FORCE), ledger)


OVER = Verdict.OVER
STEPS: dict[str, Callable[[World, Run, Ledger], object]] = {
    "opened": _opened,
    "extracted": _extracted,
    "built": _built,
    "submitting": _submitting,
    "submitted": _submitted,
    "ended": _ended,
    "collected": _collected,
    "settled": _settled,
    "round 2 submitted": _second_submitted,
    "round 2 settled": _second_settled,
    "done": _done,
    "forced again": _redriven,
}


def _made(batch: dict[str, object]) -> dict[str, object]:
    return {name: batch[name] for name in ("id", "metadata", "endpoint")}


def _trigger(ledger: Ledger) -> list[object]:
    """A waiting task's trigger, as Airflow keeps it in its database."""
    from llm_batch.triggers import BatchTrigger

    batch = next(
        one for run in ledger.runs() for one in ledger.batches(run.run_id) if one.submitted_at
    )
    trigger = BatchTrigger(
        conn_id=batch.conn_id,
        batch_id=str(batch.batch_id),
        deadline=(batch.submitted_at + timedelta(hours=26)).isoformat(),
        submitted_at=batch.submitted_at.isoformat(),
        requests=batch.requests,
    )
    return list(trigger.serialize())


def _dump(database: Path, file: Path) -> None:
    connection = sqlite3.connect(database)
    file.write_text("\n".join(connection.iterdump()) + "\n")
    connection.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

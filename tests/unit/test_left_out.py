"""Rows that a later round cannot send fail with the reason; files that a load needs are there."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from include import pipeline, run_mode
from include.audit import audit
from include.dataset_path import dataset_at
from include.errors import ConfigurationError
from include.ledger_records import Run, RunState
from include.parquet_layout import FAILURES, part_path
from include.report import RunReport
from include.simulator.process import Simulator
from tests.faults.queue_world import QueueWorld, queue_spec
from tests.faults.world import World, job

LONG = "long " * 400  # more than fits when the limit is lowered
LIMIT = {"requests_per_batch": 5, "bytes_per_batch": 1_900}
AGAIN = {"fault": "line_error", "status": 500, "fraction": 1, "first_times": 1}
DAYS = count()


def made(folder: Path, service: Simulator, **changes: Any) -> World:
    """Six rows with four different texts, two of them long; all have to be tried twice."""
    world = World(folder, service, next(DAYS), spec=job(**changes))
    world.fill(4)
    at = (world.partition.start + timedelta(hours=1)).isoformat()
    with world.source().begin() as connection:
        for name in ("x1", "x2"):
            connection.exec_driver_sql("INSERT INTO notes VALUES (?, ?, ?)", (name, at, LONG))
    service.add_faults(AGAIN)
    return world


@pytest.fixture(params=[False, True], ids=["each", "shared"])
def world(request: pytest.FixtureRequest, service: Simulator, tmp_path: Path) -> Iterator[World]:
    """With and without rows that share a request."""
    found = made(tmp_path, service, reuse={"identical": request.param})
    yield found
    service.clear_faults()
    found.close()


def first_round(world: World) -> Run:
    """Every row has to be tried again."""
    ledger = world.ledger()
    run = world._opened(ledger, run_mode.NORMAL)
    run = pipeline.extract(run, ledger, world.artifacts(), world.source)
    assert world.round(run, 1, ledger)
    return run


def finish(world: World) -> RunReport:
    """Go on with limits that the long rows do not fit any more."""
    world.spec = world.spec.model_copy(update={"limits": job(limits=LIMIT).limits})
    world._is_open = False
    return world.run()


def findings(world: World) -> list[str]:
    found = audit(
        world.run_ids[-1],
        world.ledger(),
        world.artifacts(),
        world.target(),
        world.api(),
        skew=timedelta(seconds=2),
    )
    return [one.message for one in found]


def test_a_row_that_cannot_be_sent_again_has_failed(world: World) -> None:
    """Every row has ended, the run is done, and the failures say why; so do those that share."""
    run = first_round(world)

    report = finish(world)

    with world.target().connect() as connection:
        query = sa.text("SELECT note_id, _reason, _error_message FROM note_labels_failures")
        failed = connection.execute(query.execution_options()).all()
    assert (report.loaded, report.failed) == (4, 2)
    assert world.ledger().run(run.run_id).state == RunState.DONE
    assert {(row[0], row[1]) for row in failed} == {("x1", "too_large"), ("x2", "too_large")}
    assert all("fits into no batch" in row[2] for row in failed)
    assert findings(world) == []


TINY = {"requests_per_batch": 5, "bytes_per_batch": 200}
POOR = {"max_usd": "0.000001"}


def continued(world: World, **changes: Any) -> None:
    """Let the open run go on with other limits or another budget."""
    changed = job(**changes)
    parts = {"limits": changed.limits, "budget": changed.budget}
    world.spec = world.spec.model_copy(update=parts)
    world._is_open = False


def reasons(world: World) -> dict[str, str]:
    with world.target().connect() as connection:
        query = "SELECT note_id, _reason FROM note_labels_failures"
        return dict(connection.exec_driver_sql(query).all())


def test_so_it_has_when_no_row_can_be_sent_again(world: World) -> None:
    """A round of which nothing is left has no batch, and its rows have its reason all the same."""
    run = first_round(world)
    continued(world, limits=TINY)

    report = world.run()

    assert (report.loaded, report.failed) == (0, 6)
    assert set(reasons(world).values()) == {"too_large"}
    assert [one.round for one in world.ledger().rounds(run.run_id)] == [1]
    assert findings(world) == []


def test_so_it_has_when_a_budget_leaves_the_round_out(world: World) -> None:
    """The message has the money and the last try; rows that were rejected keep their own reason."""
    first_round(world)
    continued(world, limits=LIMIT, budget=POOR)

    report = world.run()

    with world.target().connect() as connection:
        query = "SELECT _error_message FROM note_labels_failures WHERE note_id = 'n0001'"
        told = str(connection.exec_driver_sql(query).scalar_one())
    over = {f"n000{number}": "over_budget" for number in range(4)}
    assert (report.loaded, report.failed) == (0, 6)
    assert reasons(world) == over | {"x1": "too_large", "x2": "too_large"}
    assert told.startswith("round 2 went over a budget, by its estimate of $0.")
    assert told.endswith("its last try: server_error")


def test_the_last_build_of_a_round_says_why(world: World) -> None:
    """What an earlier one refused is forgotten when it has been mended since."""
    run = first_round(world)
    continued(world, limits=TINY)
    ledger = world.ledger()
    assert not world.round(world._opened(ledger, run_mode.NORMAL), 2, ledger)
    continued(world, budget=POOR)

    world.run()

    assert set(reasons(world).values()) == {"over_budget"}
    assert ledger.run(run.run_id).state == RunState.DONE


def test_so_it_has_in_a_dataset(service: Simulator, tmp_path: Path) -> None:
    """A Parquet dataset has the same failures."""
    world = made(tmp_path, service, target={"path": f"{tmp_path}/labels"})
    dataset = dataset_at(world.spec.target.path)
    world.target = lambda: dataset  # type: ignore[method-assign,assignment,return-value]
    first_round(world)

    report = finish(world)

    service.clear_faults()
    assert (report.loaded, report.failed) == (4, 2)
    assert dataset.exists(part_path(FAILURES, world.partition.start))
    world.close()


def test_so_it_has_in_the_queue(service: Simulator, tmp_path: Path) -> None:
    """The application is told the reason, and what the first try cost."""
    world = QueueWorld(tmp_path, service, url=f"sqlite:///{tmp_path}/ledger.db")
    for name, text in (("short", "short"), ("long", LONG)):
        body = {"model": "gpt-5-mini", "input": text}
        world.application().create()
        world.application().put(name, endpoint="/v1/responses", body=body)
    service.add_faults(AGAIN)
    (run,) = world.drain()
    ledger = world.ledger()
    run = pipeline.extract(run, ledger, world.artifacts(), lambda: ledger.engine)
    assert world.round(run, 1, ledger)
    small = queue_spec(limits=LIMIT)
    from include.queue_drain import join

    run = join(ledger, small, run.run_id, dag_id="q", dag_run_id="again")

    done = world.process(run)

    service.clear_faults()
    assert (done.state, done.loaded, done.failed) == (RunState.DONE, 1, 1)
    found = world.application().result("long")
    assert (found.state, found.reason, found.rounds) == ("failed", "too_large", 1)
    world.close()


def test_a_queue_is_told_of_its_budget(service: Simulator, tmp_path: Path) -> None:
    """The application reads the reason, as for any other row."""
    world = QueueWorld(tmp_path, service, url=f"sqlite:///{tmp_path}/ledger.db")
    world.application().create()
    body = {"model": "gpt-5-mini", "input": "short"}
    world.application().put("short", endpoint="/v1/responses", body=body)
    service.add_faults(AGAIN)
    (run,) = world.drain()
    ledger = world.ledger()
    run = pipeline.extract(run, ledger, world.artifacts(), lambda: ledger.engine)
    assert world.round(run, 1, ledger)
    from include.queue_drain import join

    run = join(ledger, queue_spec(budget=POOR), run.run_id, dag_id="q", dag_run_id="again")

    world.process(run)

    service.clear_faults()
    found = world.application().result("short")
    assert (found.state, found.reason, found.rounds) == ("failed", "over_budget", 1)
    world.close()


def results(world: World) -> int:
    with world.target().connect() as connection:
        return int(connection.exec_driver_sql("SELECT count(*) FROM note_labels").scalar_one())


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("shared.parquet", "which 1 row took the answer"),
        ("rejected.parquet", "why 1 row could not be sent again"),
    ],
)
def test_a_lost_file_is_noticed_before_anything_is_loaded(
    service: Simulator, tmp_path: Path, name: str, told: str
) -> None:
    """The message names the file and the way out; the run goes on when it is back."""
    world = made(tmp_path, service, reuse={"identical": True})
    first_round(world)
    world.spec = world.spec.model_copy(update={"limits": job(limits=LIMIT).limits})
    world._is_open = False
    ledger = world.ledger()
    run = world._opened(ledger, run_mode.NORMAL)
    assert world.round(run, 2, ledger)
    (lost,) = (tmp_path / "artifacts").rglob(name)
    kept = lost.rename(tmp_path / "kept")

    with pytest.raises(ConfigurationError, match=f"{name} is missing, which says {told}"):
        world.run()

    assert results(world) == 0
    kept.rename(lost)
    assert world.run().failed == 2
    service.clear_faults()
    world.close()

"""The steps of a run refuse to begin before their time, and do nothing a second time."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from include import collecting, pipeline, run_mode
from include.duplicate_batches import find_duplicates
from include.errors import ConfigurationError, TransientError
from include.ledger_records import Batch, BatchState, Run
from include.waiting import Verdict, look
from tests.faults.world import World, job
from tests.unit.conftest import ROWS


def _extracted(world: World) -> Run:
    ledger = world.ledger()
    return pipeline.extract(
        world._opened(ledger, run_mode.NORMAL), ledger, world.artifacts(), world.source
    )


def _built(world: World, most_shards: int = 9) -> list[Batch]:
    return pipeline.build(
        _extracted(world),
        1,
        world.ledger(),
        world.artifacts(),
        world.target,
        most_shards=most_shards,
    )


def test_an_unknown_mode_is_refused(world: World) -> None:
    """The message names what is allowed."""
    with pytest.raises(ConfigurationError, match="normal, redrive, force"):
        world.run(mode="again")


def test_the_source_is_read_once(world: World) -> None:
    """A second extract keeps the snapshot, whatever the source holds by then."""
    first = _extracted(world)
    with world.source().begin() as connection:
        connection.exec_driver_sql("DELETE FROM notes")

    second = _extracted(world)

    assert (second.snapshot, second.rows) == (first.snapshot, ROWS)


def _without_snapshot(world: World) -> None:
    """A run whose first round has left all rows open, and whose snapshot is lost."""
    world.simulator.add_faults({"fault": "line_error", "status": 500})
    run = _extracted(world)
    world.round(run, 1, world.ledger())
    world.simulator.clear_faults()
    world.artifacts().delete(pipeline.snapshot_of(run).path)


def test_a_lost_snapshot_is_written_again(world: World) -> None:
    """As long as the source has the same rows, the run goes on with them."""
    _without_snapshot(world)

    report = world.run()

    assert (report.loaded, report.failed, report.rounds) == (ROWS, 0, 2)


def test_a_lost_snapshot_is_not_replaced_by_other_rows(world: World) -> None:
    """As many rows, but not the same: a later round would send one of them for another."""
    _without_snapshot(world)
    with world.source().begin() as connection:
        connection.exec_driver_sql("UPDATE notes SET note_id = 'n9999' WHERE note_id = 'n0000'")

    with pytest.raises(ConfigurationError, match=r"snapshot .* is missing.*Restore the file"):
        world.run()


def test_a_round_is_built_once(world: World) -> None:
    """A second build returns the same request files and writes none."""
    first = _built(world)
    files = sorted(world.folder.rglob("*.jsonl"))

    second = _built(world)

    assert second == first
    assert sorted(world.folder.rglob("*.jsonl")) == files


def test_a_build_that_was_overtaken_changes_nothing(world: World) -> None:
    """Another task of the partition does all of the run meanwhile: its counts are the run's."""
    run, ledger = _extracted(world), world.ledger()
    world._is_open = False

    def overtaken() -> sa.Engine:
        if not world._is_open:
            world.run()
            world._is_open = True
        return world.target()

    batches = pipeline.build(run, 1, ledger, world.artifacts(), overtaken, most_shards=9)
    done = pipeline.load(ledger.run(run.run_id), ledger, world.artifacts(), world.target)

    assert [one.submission_id for one in batches] == [
        one.submission_id for one in ledger.batches(run.run_id, 1)
    ]
    assert (done.reused, done.loaded) == (0, ROWS)


def test_more_shards_than_can_be_mapped_are_refused(world: World) -> None:
    """A clear error before anything is recorded or submitted."""
    with pytest.raises(ConfigurationError, match="2 shards, but Airflow maps at most 1"):
        _built(world, most_shards=1)

    assert world.ledger().batches(world.run_ids[0]) == []


def test_a_batch_is_not_collected_before_it_has_ended(world: World) -> None:
    """The message says which task to clear."""
    batch = _built(world)[0]

    with pytest.raises(ConfigurationError, match=r"has not ended .*Clear its wait task"):
        collecting.collect(batch, world.ledger(), world.artifacts(), world.api())


def test_a_run_is_not_loaded_before_its_rounds_are_settled(world: World) -> None:
    """Loading half of the rows would lose the others."""
    _built(world)
    ledger = world.ledger()

    with pytest.raises(ConfigurationError, match="round 1 is not settled"):
        pipeline.load(ledger.run(world.run_ids[0]), ledger, world.artifacts(), world.target)


def test_collecting_again_changes_nothing(world: World) -> None:
    """A collected batch is returned as it is, without a call of the API."""
    world.run()
    batch = world.ledger().batches(world.run_ids[0])[0]
    retrieves = world.simulator.batches()["retrieves"]

    again = collecting.collect(batch, world.ledger(), world.artifacts(), world.api())

    assert again == batch
    assert again.state == BatchState.COLLECTED
    assert world.simulator.batches()["retrieves"] == retrieves


@pytest.mark.parametrize("path", ["/content", "/batches/"])
def test_what_is_unknown_for_a_moment_at_collecting_is_paid_once(
    world: World, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """One 404 of an ended batch or of its file: it is asked for again, its rows are not sent."""
    monkeypatch.setattr(collecting, "PAUSE", 0.01)
    ended = _ended(world)
    rule = {"fault": "fail_before", "status": 404, "method": "GET", "path": path, "times": 2}
    world.simulator.add_faults(rule)

    rows = [
        collecting.collect(one, world.ledger(), world.artifacts(), world.api()) for one in ended
    ]

    assert [one.missing for one in rows] == [0, 0]
    assert sum(one.succeeded for one in rows) == ROWS


def test_a_result_file_that_stays_unknown_is_missing(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After a while nobody waits for it any more: its rows go to the next round."""
    monkeypatch.setattr(collecting, "PAUSE", 0.01)
    first, _ = _ended(world)
    world.simulator.add_faults(
        {"fault": "fail_before", "status": 404, "method": "GET", "path": "/content"}
    )
    places = world.ledger(), world.artifacts(), world.api()

    row = collecting.collect(first, *places, patience=timedelta(seconds=0.1))
    world.simulator.clear_faults()

    assert (row.state, row.missing) == (BatchState.COLLECTED, first.requests)
    assert "count as missing" in caplog.text


def _ended(world: World) -> list[Batch]:
    """Return the batches of the run, all of them ended and none collected."""
    ledger = world.ledger()
    for batch in _built(world):
        world.submit(batch, ledger)
        while _verdict(world, batch) is Verdict.WAIT:
            time.sleep(0.01)
    return ledger.batches(world.run_ids[0], 1)


def _verdict(world: World, batch: Batch) -> Verdict:
    ledger = world.ledger()
    return look(ledger.batch(batch.submission_id), ledger, world.api(), world.wait)


def test_loading_again_changes_nothing(world: World) -> None:
    """Loading twice is loading once, down to the time stamps."""
    world.run()
    ledger = world.ledger()

    def rows() -> list[Any]:
        with world.target().connect() as connection:
            return list(connection.execute(sa.text("SELECT * FROM note_labels ORDER BY note_id")))

    before = rows()
    pipeline.load(ledger.run(world.run_ids[0]), ledger, world.artifacts(), world.target)

    assert rows() == before
    assert len(before) == ROWS


def test_a_run_keeps_the_spec_that_it_began_with(world: World) -> None:
    """A changed job is another run; the open one goes on as it was."""
    ledger = world.ledger()
    run = world._opened(ledger, run_mode.NORMAL)
    changed = {**world.spec.request.model_dump(), "model": "gpt-4o"}
    world.spec = job(request=changed)
    world._is_open = False

    other = world._opened(ledger, run_mode.NORMAL)

    assert other.run_id != run.run_id
    assert pipeline.pinned(run).request.model == "gpt-4o-mini"
    assert pipeline.pinned(other).request.model == "gpt-4o"


def test_a_duplicate_that_could_not_be_cancelled_is_cancelled_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was recorded and then the API was away: the next look does not take it for done."""
    monkeypatch.setattr("include.batch_api.FIRST_PAUSE", 0.0)
    world.run()
    ledger, api = world.ledger(), world.api()
    (batch, *_) = ledger.batches(world.run_ids[0])
    world.simulator.add_faults(
        {"fault": "stuck", "status": "validating"},
        {"fault": "fail_before", "path": "/cancel$"},
    )
    extra = api.create(
        file_id=str(batch.file_id),
        endpoint=batch.endpoint,
        metadata={"submission_id": batch.submission_id},
        keep_seconds=None,
    )
    with pytest.raises(TransientError):
        find_duplicates([batch], ledger, api, world.policy)
    world.simulator.clear_faults()

    find_duplicates([batch], ledger, api, world.policy)

    assert api.retrieve(extra.batch_id).status in {"cancelling", "cancelled"}


def test_a_duplicate_is_told_loudly(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """A second batch with our id is cancelled, recorded and logged as an error, once."""
    world.run()
    ledger, api = world.ledger(), world.api()
    (batch, *_) = ledger.batches(world.run_ids[0])
    extra = api.create(
        file_id=str(batch.file_id),
        endpoint=batch.endpoint,
        metadata={"submission_id": batch.submission_id},
        keep_seconds=None,
    )

    found = [find_duplicates([batch], ledger, api, world.policy) for _ in range(2)]

    assert found == [1, 0]
    (recorded,) = ledger.duplicates([batch.submission_id])
    assert (recorded["batch_id"], recorded["kept_batch_id"]) == (extra.batch_id, batch.batch_id)
    errors = [one for one in caplog.records if one.levelno == logging.ERROR]
    assert len(errors) == 1
    assert extra.batch_id in errors[0].getMessage()

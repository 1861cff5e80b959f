"""Batches are cancelled when nobody waits for them any more, and not before."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path

import pytest
import sqlalchemy as sa

from include import participants
from include.ledger import Ledger
from include.ledger_records import Batch, NewBatch, Partition, Run

DAY = Partition("job", datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 11, 2, tzinfo=UTC))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/ledger.db")
    yield Ledger(engine)
    engine.dispose()


def open_run(ledger: Ledger, dag_run_id: str) -> Run:
    return ledger.open_run(
        DAY, spec_digest="d" * 64, spec="{}", mode="normal", dag_id="job", dag_run_id=dag_run_id
    )


def submitted(ledger: Ledger, run: Run) -> Batch:
    """A batch of this run at the API."""
    new = NewBatch(
        run_id=run.run_id,
        job="job",
        round=1,
        shard=0,
        conn_id="openai_default",
        endpoint="/v1/responses",
        model="gpt",
        request_file="0.jsonl",
        index_file=None,
        content_digest="0" * 64,
        requests=3,
        bytes=30,
        input_tokens=10,
    )
    (batch,) = ledger.build_round(run.run_id, 1, [new])
    claim = ledger.claim(
        batch.submission_id, owner="me", lease=timedelta(minutes=2), enqueued_tokens=None
    )
    assert claim is not None
    assert ledger.submitted(claim.batch, "batch_1", "validating")
    return ledger.batch(batch.submission_id)


def test_the_only_run_takes_its_batches_along(ledger: Ledger) -> None:
    """Nobody waits for the batches of a run that has failed alone."""
    batch = submitted(ledger, open_run(ledger, "one"))

    assert participants.leave(ledger, "job", "one") == [batch]


@pytest.mark.parametrize("order", [("one", "two"), ("two", "one")])
def test_a_shared_run_keeps_its_batches_until_the_last_has_gone(
    ledger: Ledger, order: tuple[str, str]
) -> None:
    """Whoever opened it and whoever joined: the first failure cancels nothing, the last one all."""
    run = open_run(ledger, "one")
    batch = submitted(ledger, run)
    assert open_run(ledger, "two").run_id == run.run_id
    first, last = order

    assert participants.leave(ledger, "job", first) == []
    assert participants.names(ledger, run.run_id) == [("job", last)]
    assert participants.leave(ledger, "job", last) == [batch]


def test_a_cleared_run_takes_part_again(ledger: Ledger) -> None:
    """After a failure and a clear, the run waits for its batches again."""
    run = open_run(ledger, "one")
    batch = submitted(ledger, run)
    open_run(ledger, "two")
    participants.leave(ledger, "job", "one")

    open_run(ledger, "one")

    assert participants.leave(ledger, "job", "two") == []
    assert participants.leave(ledger, "job", "one") == [batch]


def test_a_batch_that_has_ended_is_not_cancelled(ledger: Ledger) -> None:
    """What the API has finished is paid for and collected."""
    batch = submitted(ledger, open_run(ledger, "one"))
    ledger.ended(batch, api_status="completed", done=3, failed=0)

    assert participants.leave(ledger, "job", "one") == []


def test_another_run_keeps_its_batches(ledger: Ledger) -> None:
    """A run that failed has no say over the batches of others."""
    submitted(ledger, open_run(ledger, "one"))

    assert participants.leave(ledger, "job", "two") == []
    assert participants.leave(ledger, "other", "one") == []


def test_runs_of_the_former_release_have_their_opener(tmp_path: Path) -> None:
    """A run that was open before the upgrade still stops its spend when it fails."""
    engine = sa.create_engine(f"sqlite:///{tmp_path}/ledger.db")
    batch = submitted(Ledger(engine), open_run(Ledger(engine), "one"))
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM llm_batch_participant")
        migration = import_module("include.migrations.versions.0006_participants")
        connection.exec_driver_sql(migration.OPENERS)

    assert participants.leave(Ledger(engine), "job", "one") == [batch]
    engine.dispose()


def test_the_newest_run_of_an_airflow_run_is_found(ledger: Ledger) -> None:
    """Of all that an Airflow run has worked on, the last one; none for a run of others."""
    open_run(ledger, "one")
    second = ledger.open_run(
        DAY, spec_digest="e" * 64, spec="{}", mode="normal", dag_id="job", dag_run_id="one"
    )

    found = participants.newest_run(ledger, "job", "one")

    assert found is not None
    assert found.run_id == second.run_id
    assert participants.newest_run(ledger, "job", "two") is None

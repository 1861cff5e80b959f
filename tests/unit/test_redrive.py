"""A redrive sends what has failed; what has not failed yet belongs to the run that is open."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from include import pipeline
from include.errors import ConfigurationError
from include.job_spec import JobSpec, load_job, with_overrides
from include.ledger import Ledger
from include.ledger_records import Partition, Run

START = datetime(2026, 11, 1, tzinfo=UTC)
DAY = Partition("ticket_triage", START, START + timedelta(days=1))
NEXT_DAY = Partition("ticket_triage", DAY.end, DAY.end + timedelta(days=1))


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(sa.create_engine(f"sqlite:///{tmp_path}/ledger.db"))


@pytest.fixture(scope="module")
def spec() -> JobSpec:
    return load_job("ticket_triage")


def opened(ledger: Ledger, spec: JobSpec, mode: str, partition: Partition = DAY) -> Run:
    return pipeline.open_run(ledger, spec, partition, mode=mode, dag_id="d", dag_run_id="r")


def test_an_open_run_is_finished_before_a_redrive(ledger: Ledger, spec: JobSpec) -> None:
    """Beside an open run, a redrive would pay again for what its batches are doing."""
    run = opened(ledger, spec, pipeline.NORMAL)

    with pytest.raises(ConfigurationError, match=f"{run.run_id} is not finished.*without redrive"):
        opened(ledger, spec, pipeline.REDRIVE)


def test_a_done_run_can_be_redriven(ledger: Ledger, spec: JobSpec) -> None:
    """Other days and other requests do not matter; a second redrive joins the first."""
    ledger.finish_run(opened(ledger, spec, pipeline.NORMAL).run_id, loaded=1, failed=1)
    opened(ledger, spec, pipeline.NORMAL, NEXT_DAY)
    opened(ledger, with_overrides(spec, model="gpt-5-nano"), pipeline.NORMAL)

    first = opened(ledger, spec, pipeline.REDRIVE)

    assert first.mode == pipeline.REDRIVE
    assert opened(ledger, spec, pipeline.REDRIVE).run_id == first.run_id

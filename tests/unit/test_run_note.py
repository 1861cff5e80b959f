"""The note of a run: what it came to, in a few lines."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
import sqlalchemy as sa

from include.job_spec import JobSpec
from include.ledger import Ledger
from include.ledger_records import Partition, Run
from include.report import run_report
from include.run_note import LONGEST, SIGN, is_ours, note

START = datetime(2026, 11, 1, tzinfo=UTC)
SPEC = JobSpec.model_validate(
    {
        "name": "notes",
        "source": {"conn_id": "s", "sql": "SELECT 1", "key": ["id"]},
        "request": {"endpoint": "/v1/responses", "model": "gpt-5-mini", "prompt": "{{ a }}"},
        "target": {"conn_id": "t", "table": "labels"},
    }
)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(sa.create_engine(f"sqlite:///{tmp_path}/ledger.db"))


@pytest.fixture
def run(ledger: Ledger) -> Run:
    run = ledger.open_run(
        Partition("notes", START, START + timedelta(days=1)),
        spec_digest=SPEC.digest,
        spec=SPEC.to_json(),
        mode="normal",
        dag_id="notes",
        dag_run_id="one",
    )
    ledger.count_run(run.run_id, rows=105, reused=5, estimate_usd=Decimal("1.30"))
    return ledger.run(run.run_id)


def test_a_note_says_rows_problems_and_money(ledger: Ledger, run: Run) -> None:
    """What was loaded, what failed and why, and what it cost beside what was expected."""
    ledger.finish_run(run.run_id, loaded=90, failed=10, cost_usd=Decimal("1.25"))
    done = ledger.run(run.run_id)
    report = replace(run_report(done, ledger), reasons={"refusal": 8, "schema": 2})

    assert note(done, report).splitlines() == [
        f"{SIGN}90 of 105 rows loaded, 10 failed, 5 reused  ",
        "problems: refusal 8, schema 2  ",
        "0 requests, 0 batches, 0 rounds  ",
        "cost $1.2500, estimate $1.3000, real-time unknown",
    ]


def test_a_note_of_a_run_that_failed_before_its_load_promises_nothing(
    ledger: Ledger, run: Run
) -> None:
    """Nothing is loaded yet, and no cost of zero is claimed."""
    text = note(run, run_report(run, ledger))

    assert "nothing loaded yet of 105 rows" in text
    assert "cost unknown" in text


def test_a_note_fits_into_airflows_column(ledger: Ledger, run: Run) -> None:
    """However long the names of the problems are."""
    report = replace(run_report(run, ledger), reasons={f"{'x' * 400}{n}": n for n in range(9)})

    assert len(note(run, report)) == LONGEST


def test_a_note_of_a_person_is_not_ours() -> None:
    """Ours can be told by its beginning; where there is none, one may be written."""
    assert is_ours(None)
    assert is_ours(f"{SIGN}1 of 1 rows loaded")
    assert not is_ours("Known: the source was late.")

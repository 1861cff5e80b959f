from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from include.errors import FailureRateError
from include.job_spec import JobSpec
from include.ledger import Ledger
from include.ledger_records import Partition, Run
from include.report import check_failure_rate, run_report

START = datetime(2026, 11, 1, tzinfo=UTC)


def spec(**alert: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "notes",
            "source": {"conn_id": "s", "sql": "SELECT 1", "key": ["id"]},
            "request": {"endpoint": "/v1/responses", "model": "gpt-5-mini", "prompt": "{{ a }}"},
            "target": {"conn_id": "t", "table": "labels"},
            "alert": alert,
        }
    )


def done_run(ledger: Ledger, job: JobSpec, *, loaded: int, failed: int) -> Run:
    run = ledger.open_run(
        Partition("notes", START, START + timedelta(days=1)),
        spec_digest=job.digest,
        spec=job.to_json(),
        mode="normal",
        dag_id="notes",
        dag_run_id="one",
    )
    ledger.finish_run(run.run_id, loaded=loaded, failed=failed, cost_usd=Decimal("1.25"))
    return ledger.run(run.run_id)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(sa.create_engine(f"sqlite:///{tmp_path}/ledger.db"))


def test_too_many_failures_fail_the_run_and_say_what_to_do(ledger: Ledger) -> None:
    """Above the rate the message names job, partition, figures and the way out."""
    run = done_run(ledger, spec(failure_rate=0.02), loaded=90, failed=10)

    with pytest.raises(FailureRateError, match=r"notes.*2026-11-01.*10 of 100.*redrive=true"):
        check_failure_rate(run, run_report(run, ledger))


@pytest.mark.parametrize(
    ("alert", "loaded", "failed"),
    [
        ({}, 0, 10),
        ({"failure_rate": 0.1}, 90, 10),
        ({"failure_rate": 0.02, "min_failed": 3}, 26, 2),
        ({"failure_rate": 0}, 10, 0),
    ],
)
def test_what_is_allowed_does_not_fail_the_run(
    ledger: Ledger, alert: dict[str, Any], loaded: int, failed: int
) -> None:
    """No alert, a rate at the limit, and a handful of rows on a small day pass."""
    run = done_run(ledger, spec(**alert), loaded=loaded, failed=failed)

    check_failure_rate(run, run_report(run, ledger))


def test_a_report_is_plain_and_exact(ledger: Ledger) -> None:
    """The report's JSON form keeps money to the digit; its text names the unknown as unknown."""
    run = done_run(ledger, spec(), loaded=1, failed=0)

    report = run_report(run, ledger)

    assert report.as_dict()["cost_usd"] == "1.25"
    assert "cost $1.2500, estimate unknown" in report.text()

"""A person's yes holds only while there is money: the budgets are looked at again then."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
import sqlalchemy as sa

from include import ledger_tables as tables
from include import spend_limits
from include.approvals import approve, needs_approval, reject, was_rejected
from include.budgets import record_round
from include.errors import BudgetExceededError
from include.ledger import Ledger
from include.ledger_records import NewBatch, Partition, Run
from include.spend_limits import SpendLimit
from tests.faults.world import job

FIRST = datetime(2026, 11, 1, tzinfo=UTC)
SPEC = job(budget={"approve_above_usd": 1, "max_usd_per_month": 10})


@pytest.fixture
def ledger(empty_database: sa.Engine) -> Ledger:
    return Ledger(empty_database)


def planned(ledger: Ledger, day: int, usd: str) -> Run:
    """Open a run over a day of its own, and build its first round."""
    start = FIRST + timedelta(days=day)
    run = ledger.open_run(
        Partition(SPEC.name, start, start + timedelta(days=1)),
        spec_digest=SPEC.digest,
        spec=SPEC.to_json(),
        mode="normal",
        dag_id=SPEC.name,
        dag_run_id="r",
    )
    ledger.count_run(run.run_id, estimate_usd=Decimal(usd))
    new = NewBatch(
        run_id=run.run_id,
        job=run.job,
        round=1,
        shard=1,
        conn_id="openai_default",
        endpoint="/v1/responses",
        model=SPEC.request.model,
        request_file=f"{run.run_id}.jsonl",
        index_file=None,
        content_digest="d" * 64,
        requests=100,
        bytes=4_000,
        input_tokens=1_000,
        estimate_usd=Decimal(usd),
    )
    record_round(run, 1, [new], ledger, SPEC.budget)
    return ledger.run(run.run_id)


def decisions(ledger: Ledger, run: Run) -> list[str]:
    history = ledger.history(run.run_id)
    return [one["detail"] for one in history if one["became"] in {"APPROVED", "REJECTED"}]


def test_a_yes_within_the_budget_is_recorded(ledger: Ledger) -> None:
    """Its own plan is not counted twice; nobody is asked again."""
    run = planned(ledger, 0, "10")
    assert needs_approval(run, ledger)

    approve(run, ledger, by="ada")

    assert not needs_approval(run, ledger)
    assert decisions(ledger, run) == ["approved by ada, estimate $10.0000"]


def test_a_yes_after_others_have_spent_the_month_is_refused(ledger: Ledger) -> None:
    """With the figures; the plan that is refused stands in nobody's way, and is asked for again."""
    late = planned(ledger, 0, "6")
    reject(late, ledger, by="ada")
    planned(ledger, 1, "7")

    with pytest.raises(BudgetExceededError) as told:
        approve(late, ledger, by="kim")

    assert "Approved by kim" in str(told.value)
    assert "in flight $7.0000 + this round about $6.0000 = $13.0000" in str(told.value)
    assert was_rejected(late, ledger)
    assert needs_approval(late, ledger)
    assert decisions(ledger, late)[1].startswith("rejected by its budget, after kim had approved")
    assert planned(ledger, 2, "3")


def test_a_yes_in_another_month_is_held_against_that_month(ledger: Ledger) -> None:
    """What was planned in an earlier month counts in the one in which it is sent."""
    late = planned(ledger, 0, "6")
    with ledger.engine.begin() as connection:
        earlier = datetime.now(UTC) - timedelta(days=32)
        connection.execute(sa.update(tables.round_).values(built_at=earlier))
    planned(ledger, 1, "7")

    with pytest.raises(BudgetExceededError, match=r"= \$13\.0000"):
        approve(late, ledger, by="ada")


def test_a_yes_is_held_against_the_spend_limit_too(ledger: Ledger) -> None:
    """The other runs of its backfill may have cost more than they were to cost."""
    run = planned(ledger, 0, "6")
    spend_limits.join(ledger, run, SpendLimit("spring", Decimal(5)))

    with pytest.raises(BudgetExceededError, match="spend_limit spring"):
        approve(run, ledger, by="ada")

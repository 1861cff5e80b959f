"""Budgets: refused before anything is spent, with the figures, however many runs there are."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from include import ledger_tables, spend_limits, spending
from include.approvals import approve, reject, was_rejected
from include.budgets import check_priced, record_round
from include.calendar_month import Month
from include.errors import BudgetExceededError, ConfigurationError
from include.ledger import Ledger
from include.ledger_database import reading
from include.ledger_records import Batch, NewBatch, Partition, Run, now
from include.run_policy import Budget
from include.spend_limits import SpendLimit
from tests.faults.world import job

MODEL = "gpt-5-mini"
FIRST = datetime(2026, 11, 1, tzinfo=UTC)


@pytest.fixture
def ledger(empty_database: sa.Engine) -> Ledger:
    return Ledger(empty_database)


def run(ledger: Ledger, day: int = 0, *, spec: str = "a") -> Run:
    start = FIRST + timedelta(days=day)
    partition = Partition("job", start, start + timedelta(days=1))
    return ledger.open_run(
        partition, spec_digest=spec * 64, spec="{}", mode="normal", dag_id="job", dag_run_id="r"
    )


def planned(run: Run, usd: str | None, *, number: int = 1) -> NewBatch:
    return NewBatch(
        run_id=run.run_id,
        job=run.job,
        round=number,
        shard=1,
        conn_id="openai_default",
        endpoint="/v1/responses",
        model=MODEL,
        request_file=f"{run.run_id}-{number}.jsonl",
        index_file=None,
        content_digest="d" * 64,
        requests=100,
        bytes=4_000,
        input_tokens=1_000,
        estimate_usd=None if usd is None else Decimal(usd),
    )


def record(ledger: Ledger, run: Run, usd: str, number: int = 1, **budget: str) -> list[Batch]:
    bounds = Budget.model_validate(budget)
    return record_round(run, number, [planned(run, usd, number=number)], ledger, bounds)


def collect(ledger: Ledger, batch: Batch, **values: object) -> None:
    """Put a batch where it would be after it was collected."""
    table = ledger_tables.batch
    done = {"state": "COLLECTED", "collected_at": now(), **values}
    with ledger.engine.begin() as connection:
        connection.execute(
            sa.update(table).where(table.c.submission_id == batch.submission_id).values(**done)
        )


def test_a_run_within_its_budget_is_recorded(ledger: Ledger) -> None:
    """Up to the budget is fine."""
    assert len(record(ledger, run(ledger), "25", max_usd="25")) == 1


def test_a_run_over_its_budget_is_refused_with_the_figures(ledger: Ledger) -> None:
    """Nothing is recorded, so nothing can be sent; the message says what is missing."""
    ours = run(ledger)

    with pytest.raises(BudgetExceededError, match=r"\$25 \(budget\.max_usd\).*\$25\.0100.*Raise"):
        record(ledger, ours, "25.01", max_usd="25")

    assert ledger.rounds(ours.run_id) == []


def test_the_month_counts_what_is_spent_and_what_is_on_its_way(ledger: Ledger) -> None:
    """Collected batches cost what they cost, others what they are estimated to cost."""
    (first,) = record(ledger, run(ledger, 0), "5")
    collect(ledger, first, cost_usd=Decimal("4.10"))
    record(ledger, run(ledger, 1), "3")

    with pytest.raises(BudgetExceededError, match=r"Spent \$4\.1000 \+ in flight \$3\.0000"):
        record(ledger, run(ledger, 2), "3", max_usd_per_month="10")
    assert record(ledger, run(ledger, 2), "2.90", max_usd_per_month="10")


def test_two_runs_at_once_cannot_both_take_the_rest_of_the_month(ledger: Ledger) -> None:
    """Eight runs of $3 under a bound of $10: three are recorded."""
    runs = [run(ledger, day) for day in range(8)]

    def attempt(ours: Run) -> bool:
        try:
            return bool(record(ledger, ours, "3", max_usd_per_month="10"))
        except BudgetExceededError:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, runs)) == 3


def test_a_plan_that_a_newer_run_has_replaced_is_not_counted(ledger: Ledger) -> None:
    """The rest of a run that stopped does not stand in the way of the run that mends it."""
    record(ledger, run(ledger, spec="a"), "9")

    assert record(ledger, run(ledger, spec="b"), "9", max_usd_per_month="10")


def limited(ledger: Ledger, ours: Run, usd: str = "10") -> Run:
    """Put a run under the limit of all days."""
    columns = ledger_tables.run.c
    spec = job(request={**job().request.model_dump(exclude_none=True), "model": MODEL}).to_json()
    with ledger.engine.begin() as connection:
        connection.execute(
            sa.update(ledger_tables.run).where(columns.run_id == ours.run_id).values(spec=spec)
        )
    spend_limits.join(ledger, ledger.run(ours.run_id), SpendLimit("all days", Decimal(usd)))
    return ours


def test_a_plan_that_was_rejected_is_not_counted_in_a_limit(ledger: Ledger) -> None:
    """Until somebody says yes after all: then it has to fit beside the others."""
    late = limited(ledger, run(ledger))
    record(ledger, late, "9")
    reject(late, ledger, by="ada")

    assert record(ledger, limited(ledger, run(ledger, 1)), "8")
    with pytest.raises(BudgetExceededError, match=r"in flight \$17\.0000"):
        approve(ledger.run(late.run_id), ledger, by="kim")
    assert was_rejected(late, ledger)


@pytest.mark.parametrize(
    ("ask", "by"),
    [
        (lambda connection: spending.of_limit(connection, "all days"), "run_id=?"),
        (
            lambda connection: spending.of_month(connection, "job", Month.of(now())),
            "job=? AND collected_at",
        ),
    ],
)
def test_a_budget_passes_over_what_is_long_done(
    tmp_path: Path, ask: Callable[[sa.Connection], object], by: str
) -> None:
    """By an index: it is asked under the ledger's lock, however many batches there ever were."""
    ledger = Ledger(sa.create_engine(f"sqlite:///{tmp_path}/ledger.db"))
    asked: list[tuple[str, Any]] = []

    def note(_conn: Any, _cursor: Any, statement: str, parameters: Any, *_rest: Any) -> None:
        if statement.startswith("SELECT"):
            asked.append((statement, parameters))

    with reading(ledger.engine) as connection:
        sa.event.listen(ledger.engine, "before_cursor_execute", note)
        ask(connection)
        sa.event.remove(ledger.engine, "before_cursor_execute", note)
        plans = [
            step[3]
            for statement, parameters in asked
            for step in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
            if "llm_batch_batch" in step[3]
        ]

    assert len(plans) == len(asked) == 6
    assert {one for one in plans if by not in one} == set()


def test_another_month_is_another_budget(ledger: Ledger) -> None:
    """What was collected in an earlier month is not counted in this one."""
    (first,) = record(ledger, run(ledger), "9")
    collect(ledger, first, cost_usd=Decimal(9), collected_at=now() - timedelta(days=32))

    assert record(ledger, run(ledger, 1), "9", max_usd_per_month="10")


def test_a_later_round_over_the_budget_is_left_out(
    ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    """What is paid for can still be loaded; the log says what happens to the rest."""
    ours = run(ledger)
    (first,) = record(ledger, ours, "5", max_usd="6")
    collect(ledger, first, cost_usd=Decimal("5.50"))

    assert record(ledger, ours, "1", number=2, max_usd="6") == []
    assert "round 2 is left out, 100 rows go to the failures table" in caplog.text


def test_a_batch_without_price_is_priced_now_or_refused(ledger: Ledger) -> None:
    """Unknown money is never counted as 0."""
    (first,) = record(ledger, run(ledger), "1")
    collect(ledger, first, cost_usd=None, used_output_tokens=1_000_000)

    with reading(ledger.engine) as connection:
        assert spending.of_month(connection, "job", Month.of(now())).spent == 1

    collect(ledger, first, model="my-model")
    with pytest.raises(ConfigurationError, match="my-model, which has no price"):
        record(ledger, run(ledger, 1), "1", max_usd_per_month="10")


def test_a_batch_that_does_not_tell_its_usage_counts_as_estimated(ledger: Ledger) -> None:
    """What a server keeps to itself is not free."""
    (first,) = record(ledger, run(ledger), "4")
    collect(ledger, first, cost_usd=None, succeeded=100)

    with reading(ledger.engine) as connection:
        assert spending.of_month(connection, "job", Month.of(now())).spent == 4


def deployed(ledger: Ledger) -> Run:
    """A run of a deployment: its name has no price, the model behind it has."""
    request = job().request.model_dump() | {"model": "my-deployment", "priced_as": MODEL}
    partition = Partition("job", FIRST, FIRST + timedelta(days=1))
    return ledger.open_run(
        partition,
        spec_digest="d" * 64,
        spec=job(request=request).to_json(),
        mode="normal",
        dag_id="job",
        dag_run_id="r",
    )


def test_a_deployment_is_priced_as_its_model(ledger: Ledger) -> None:
    """Also under a limit of several runs, and when a batch has no cost of its own."""
    ours = deployed(ledger)

    spend_limits.join(ledger, ours, SpendLimit("all days", Decimal(5)))

    (first,) = record(ledger, ours, "1")
    collect(ledger, first, model="my-deployment", cost_usd=None, used_output_tokens=1_000_000)
    with reading(ledger.engine) as connection:
        assert spending.of_month(connection, "job", Month.of(now())).spent == 1


def test_the_budget_of_an_open_run_can_be_raised(ledger: Ledger) -> None:
    """Limits and budgets are no part of what was asked: an open run takes the new ones."""
    first = run(ledger)

    again = ledger.open_run(
        Partition("job", first.interval_start, first.interval_end),
        spec_digest="a" * 64,
        spec='{"budget": 2}',
        mode="normal",
        dag_id="job",
        dag_run_id="r",
    )

    assert (again.run_id, again.spec) == (first.run_id, '{"budget": 2}')


@pytest.mark.parametrize("key", ["max_usd", "max_usd_per_month", "approve_above_usd"])
def test_a_bound_needs_a_price(key: str) -> None:
    """The message names the key, the model and where a price is added."""
    request = job().request.model_dump() | {"model": "my-model"}
    spec = job(request=request, budget={key: "1"})

    with pytest.raises(ConfigurationError, match=rf"sets budget\.{key}.*price of its model my-mod"):
        check_priced(spec)
    check_priced(job(request=request))

"""Budgets: what is refused before it is spent.

A run's first round over a budget is an error, and nothing has been asked of the API. A later round
over it is left out: what is paid for is loaded, the rows still open go to the failures table.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from include import cost, ledger_database, spend_limits, spending
from include import ledger_queries as queries
from include import ledger_tables as tables
from include.calendar_month import Month
from include.errors import BudgetExceededError, ConfigurationError
from include.figures import counted, money
from include.job_spec import JobSpec
from include.ledger import Ledger
from include.ledger_records import Batch, NewBatch, Run, RunState, now
from include.run_policy import Budget

log = logging.getLogger(__name__)

OVER_BUDGET = "over_budget"  #: why rows of a round that was left out have failed
LEFT_OUT = "LEFT_OUT"  #: in the history of a run whose later round went over a budget
ADVICE = (
    "Nothing was submitted. Raise {key} in job.yaml and clear this run from extract on, or take a "
    "smaller sample or another model."
)


def check_priced(spec: JobSpec) -> None:
    """Raise `ConfigurationError` when the job bounds its money, but its model has no price."""
    bounds = list(_bounds(spec))
    if bounds and cost.price(spec.request.priced_model) is None:
        raise ConfigurationError(
            f"Job {spec.name} sets {' and '.join(bounds)}, but the price of its model "
            f"{spec.request.priced_model} is unknown. Add it to a price file and name that in "
            f"{cost.OVERRIDE_VARIABLE}."
        )


def _bounds(spec: JobSpec) -> Iterator[str]:
    for name in type(spec.budget).model_fields:
        if getattr(spec.budget, name) is not None:
            yield f"budget.{name}"
    if spec.canary.max_cost_per_row is not None:
        yield "canary.max_cost_per_row"


def record_round(
    run: Run,
    number: int,
    batches: Sequence[NewBatch],
    ledger: Ledger,
    budget: Budget,
    *,
    check: Callable[[Connection], None] = lambda _connection: None,
) -> list[Batch]:
    """Record a round unless it goes over a budget of the run or of its month, or `check` raises.

    Raises `BudgetExceededError` for round 1; a later round is logged and left out: [].
    """
    planned = sum((one.estimate_usd or Decimal(0) for one in batches), Decimal(0))

    def check_all(connection: Connection) -> None:
        check(connection)
        _check(connection, run, planned, budget)

    try:
        return ledger.build_round(run.run_id, number, batches, check=check_all)
    except BudgetExceededError as error:
        if number == 1:
            raise
        _leave_out(run, number, planned, ledger)
        requests = sum(one.requests for one in batches)
        log.error(
            "%s: round %s is left out, %s to the failures table. %s Afterwards run the "
            "partition with the param redrive=true.",
            run,
            number,
            counted(requests, "row goes", "rows go"),
            error,
        )
        return []


def _leave_out(run: Run, number: int, planned: Decimal, ledger: Ledger) -> None:
    """Record what a round that is left out would have cost; the same again is one line."""
    detail = f"round {number} went over a budget, by its estimate of ${planned}"
    last = _last_left_out(run.run_id, ledger)
    if last != detail:
        with ledger_database.writing(ledger.engine) as connection:
            queries.note(connection, run.run_id, None, RunState.OPEN, LEFT_OUT, detail)


@dataclass(frozen=True)
class LeftOutRound:
    """A round that a budget did not let begin."""

    number: int
    estimate_usd: Decimal
    text: str  #: what the history of the run says of it


def left_out_round(run_id: str, ledger: Ledger) -> LeftOutRound | None:
    """Return the round that a budget has left out; None when all that were tried are recorded."""
    detail = _last_left_out(run_id, ledger)
    if detail is None:
        return None
    number, amount = int(detail.split()[1]), Decimal(detail.rpartition("$")[2])
    was_built = any(one.round == number for one in ledger.rounds(run_id))
    return None if was_built else LeftOutRound(number, amount, detail)


def _last_left_out(run_id: str, ledger: Ledger) -> str | None:
    event = tables.event.c
    query = sa.select(event.detail).where(event.run_id == run_id, event.became == LEFT_OUT)
    with ledger_database.reading(ledger.engine) as connection:
        found: str | None = connection.scalar(query.order_by(event.event_id.desc()).limit(1))
    return found


def resume(run: Run, ledger: Ledger, budget: Budget) -> None:
    """Record that the canary of a run passes after it has stopped it.

    What it holds back counts as in flight again from here on. Raises `BudgetExceededError`, and
    records nothing, when others have spent the money meanwhile.
    """
    with ledger_database.writing(ledger.engine) as connection:
        ledger_database.exclusive(connection)
        if spending.last_verdict(connection, run.run_id) != spending.STOPPED:
            return
        queries.note(connection, run.run_id, None, RunState.OPEN, spending.PASSED)
        check_again(connection, run, budget)


def stop(run: Run, ledger: Ledger) -> None:
    """Record that the canary of a run has stopped it: what it holds back is not in flight."""
    with ledger_database.writing(ledger.engine) as connection:
        if spending.last_verdict(connection, run.run_id) != spending.STOPPED:
            queries.note(connection, run.run_id, None, RunState.OPEN, spending.STOPPED)


def _check(connection: Connection, run: Run, planned: Decimal, budget: Budget) -> None:
    spend_limits.check(connection, run, planned)
    if budget.max_usd is not None:
        _check_one(
            f"{run}: it", budget.max_usd, "budget.max_usd",
            spending.of_run(connection, run), planned,
        )  # fmt: skip
    _check_month(connection, run, planned, budget)


def _check_month(
    connection: Connection, run: Run, planned: Decimal, budget: Budget, *, but_for: str = ""
) -> None:
    if budget.max_usd_per_month is None:
        return
    month = Month.of(now())
    _check_one(
        f"{run}: in {month} the job", budget.max_usd_per_month, "budget.max_usd_per_month",
        spending.of_month(connection, run.job, month, but_for=but_for), planned,
    )  # fmt: skip


def check_again(connection: Connection, run: Run, budget: Budget) -> None:
    """Hold what a run has planned and not sent against its budgets as they are by now.

    Whenever it was planned: the month may be another one since. Raises `BudgetExceededError`. Call
    it under the ledger's lock, in the transaction that lets the run go on.
    """
    _check(connection, run, Decimal(0), budget.model_copy(update={"max_usd_per_month": None}))
    planned = spending.of_run(connection, run).in_flight
    _check_month(connection, run, planned, budget, but_for=run.run_id)


def _check_one(
    who: str, bound: Decimal, key: str, so_far: spending.Spending, planned: Decimal
) -> None:
    if so_far.total + planned <= bound:
        return
    raise BudgetExceededError(
        f"{who} may spend ${bound} ({key}). Spent {money(so_far.spent)} + in flight "
        f"{money(so_far.in_flight)} + this round about {money(planned)} = "
        f"{money(so_far.total + planned)}. {ADVICE.format(key=key)}"
    )

"""A person's word on a run's estimate: what they are asked, and the record of what they said."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC
from enum import StrEnum

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from include import budgets, ledger_database
from include import ledger_queries as queries
from include import ledger_tables as tables
from include.errors import BudgetExceededError
from include.figures import counted, dollars, money, noun
from include.job_spec import JobSpec
from include.ledger import Ledger
from include.ledger_records import Batch, Run, RunState


class Decision(StrEnum):
    """What became of a run in `llm_batch_event`; the run itself stays OPEN."""

    APPROVED = "APPROVED"
    REJECTED = "REJECTED"


def needs_approval(run: Run, ledger: Ledger) -> bool:
    """Tell whether a person has to be asked: the estimate is above the bound, nobody said yes."""
    bound = JobSpec.from_json(run.spec).budget.approve_above_usd
    if bound is None or run.estimate_usd is None or run.estimate_usd <= bound:
        return False
    return _last_decision(run, ledger) != Decision.APPROVED


def was_rejected(run: Run, ledger: Ledger) -> bool:
    """Tell whether a no is the last word on this run."""
    return _last_decision(run, ledger) == Decision.REJECTED


def approve(run: Run, ledger: Ledger, *, by: str) -> None:
    """Let a run go on, if there still is money for it, and record who has said so.

    Raises `BudgetExceededError` when its budgets do not hold it any more: others have spent the
    money while it waited. Then it is as rejected: its plan counts in no month and no spend limit.
    """
    try:
        with ledger_database.writing(ledger.engine) as connection:
            ledger_database.exclusive(connection)
            # First: the plan of a run that was rejected counts in its limit from here on.
            _note(connection, run, Decision.APPROVED, by)
            budgets.check_again(connection, run, JobSpec.from_json(run.spec).budget)
    except BudgetExceededError as error:
        reject(run, ledger, by=f"its budget, after {by} had approved it")
        raise BudgetExceededError(
            f"Approved by {by}, but there is no money left for it by now. {error} Clear it, and it "
            "asks again."
        ) from error


def reject(run: Run, ledger: Ledger, *, by: str) -> None:
    """Record who has said no; its plan counts in no month or limit any more."""
    with ledger_database.writing(ledger.engine) as connection:
        _note(connection, run, Decision.REJECTED, by)


def _note(connection: Connection, run: Run, decision: Decision, by: str) -> None:
    detail = f"{decision.lower()} by {by}, estimate {money(run.estimate_usd)}"
    queries.note(connection, run.run_id, None, RunState.OPEN, decision, detail)


def _last_decision(run: Run, ledger: Ledger) -> str | None:
    columns = tables.event.c
    query = (
        sa.select(columns.became)
        .where(columns.run_id == run.run_id, columns.became.in_(list(Decision)))
        .order_by(columns.event_id.desc())
        .limit(1)
    )
    with ledger_database.reading(ledger.engine) as connection:
        found: str | None = connection.execute(query).scalar()
        return found


def question(run: Run, batches: Sequence[Batch]) -> tuple[str, str]:
    """Return subject and body (Markdown) of what a person is asked, with the figures."""
    spec = JobSpec.from_json(run.spec)
    start, end = (
        f"{at.astimezone(UTC):%Y-%m-%d %H:%M}" for at in (run.interval_start, run.interval_end)
    )
    subject = f"Spend about {dollars(run.estimate_usd)} on {run.job}, {start} UTC?"
    requests = sum(one.requests for one in batches)
    body = f"""\
Job **{run.job}**, {start} to {end} UTC, model {spec.request.model}: \
{counted(requests, "request")} in {counted(len(batches), "batch")}; \
{run.reused:,} of {counted(run.rows, "row")} {noun(run.reused, "is", "are")} done already.

| estimate | US dollars |
|---|---|
| expected | {dollars(run.estimate_usd)} |
| low to upper | {dollars(run.estimate_low_usd)} to {dollars(run.estimate_upper_usd)} |

The job asks above {dollars(spec.budget.approve_above_usd)} (`budget.approve_above_usd`). Nothing \
has been sent. *Reject* ends the run without spend."""
    return subject, body

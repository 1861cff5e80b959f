"""What somebody should be told about a run before they ask, each cause once.

Nothing is sent here: `AlertRecord` says who still has to be told, and the adapter to Airflow's
notifiers does it. A message holds job, partition, figures and what to do next; never row text.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum

from include import spend_limits, spending
from include.budgets import LEFT_OUT, OVER_BUDGET, LeftOutRound, left_out_round
from include.calendar_month import Month
from include.errors import ConfigurationError
from include.figures import counted, money, noun
from include.job_spec import JobSpec
from include.ledger import Ledger
from include.ledger_database import reading
from include.ledger_records import Batch, BatchState, Run, RunState, digest, now
from include.report import RunReport, has_too_many_failures, run_report

UNFINISHED = frozenset({BatchState.PREPARED, BatchState.SUBMITTING, BatchState.SUBMITTED})
REASONS_SHOWN = 5
MONTH_IS_NEAR = (
    "Runs go on until the budget is reached. Raise budget.max_usd_per_month before that, or pause "
    "what can wait."
)
MONTH_IS_OVER = (
    "Runs that do not fit into the month do not begin; rounds that do not are left out, and their "
    "rows go to the failures table. Raise budget.max_usd_per_month and clear the run, or wait for "
    "the next month."
)


class AlertKind(StrEnum):
    """What an alert is about."""

    FAILURE_RATE = "failure_rate"
    LATE_BATCH = "late_batch"
    BUDGET = "budget"
    DUPLICATE_BATCH = "duplicate_batch"


@dataclass(frozen=True)
class Alert:
    """One message; `cause` (32 hex) is what it is sent only once about."""

    kind: AlertKind
    cause: str
    job: str
    run_id: str
    subject: str  #: one line
    figures: tuple[tuple[str, str], ...]
    todo: str
    link: str = ""  #: the task in Airflow

    @property
    def text(self) -> str:
        """The message as plain text."""
        lines = [f"{name}: {value}" for name, value in self._facts()]
        return "\n".join([self.subject, "", *lines, "", f"What to do: {self.todo}"])

    @property
    def html(self) -> str:
        """The message as a piece of HTML, every value escaped."""
        rows = "".join(
            f"<tr><th align='left'>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
            for name, value in self._facts()
        )
        return (
            f"<p><b>{html.escape(self.subject)}</b></p><table>{rows}</table>"
            f"<p>What to do: {html.escape(self.todo)}</p>"
        )

    def _facts(self) -> list[tuple[str, str]]:
        facts = [("job", self.job), *self.figures, ("run", self.run_id)]
        return [*facts, ("Airflow", self.link)] if self.link else facts


def of_run(run_id: str, ledger: Ledger) -> Iterator[Alert]:
    """Yield what there is to say about a run now: budget, duplicates, failures once it is done."""
    run = ledger.run(run_id)
    spec, report = JobSpec.from_json(run.spec), run_report(run, ledger)
    batches = ledger.batches(run.run_id)
    spent = _spent(batches)
    left_out = _left_out(run, spec, spent, ledger)
    yield from _budget(run, spec, spent) if left_out is None else (left_out,)
    yield from _duplicates(run, batches, ledger)
    if run.state == RunState.DONE and has_too_many_failures(spec, report):
        yield _failure_rate(run, spec, report)
    yield from _month_budget(run, spec, ledger)
    yield from _limit_left_out(run, spec, ledger)


def of_submission(batch: Batch, ledger: Ledger) -> Iterator[Alert]:
    """Yield an alert for each batch that was made beside this one."""
    yield from _duplicates(ledger.run(batch.run_id), [batch], ledger)


def late_at(batch: Batch, spec: JobSpec, window: timedelta) -> datetime | None:
    """Return when a batch that is not final is late: `alert.late_share` of its window has gone."""
    share = spec.alert.late_share
    if share is None or batch.submitted_at is None:
        return None
    return batch.submitted_at + window * float(share)


def of_waiting(batch: Batch, ledger: Ledger, window: timedelta) -> Iterator[Alert]:
    """Yield one alert for all late batches of a round, when this one is late."""
    run = ledger.run(batch.run_id)
    moment = late_at(batch, JobSpec.from_json(run.spec), window)
    if moment is None or batch.submitted_at is None or datetime.now(UTC) < moment:
        return
    batches = ledger.batches(run.run_id, batch.round)
    unfinished = sum(one.state in UNFINISHED for one in batches)
    waited = datetime.now(UTC) - batch.submitted_at
    yield Alert(
        kind=AlertKind.LATE_BATCH,
        cause=digest(AlertKind.LATE_BATCH, run.run_id, batch.round),
        job=run.job,
        run_id=run.run_id,
        subject=f"Job {run.job}: {unfinished} of {counted(len(batches), 'batch')} of round "
        f"{batch.round} {noun(unfinished, 'is', 'are')} late "
        f"({hours(waited)} of {hours(window)})",
        figures=(
            ("partition", partition_text(run)),
            ("batch", f"{batch.batch_id}, {batch.api_status}"),
            ("progress", _progress(batch)),
            ("cancelled at", moment_text(batch.submitted_at + window)),
        ),
        todo="Nothing has to be done: at the deadline the batch is cancelled, what it has done is "
        "kept, and the rest goes to the next round. To give up earlier: "
        f"`python -m llm_batch cancel {run.run_id} --batch {batch.batch_id}`.",
    )


def _progress(batch: Batch) -> str:
    requests = counted(batch.requests, "request")
    done = f"{batch.done_requests:,} done, {batch.failed_requests:,} failed of {requests}"
    return f"{done}, last moved {moment_text(batch.progress_at)}"


def _failure_rate(run: Run, spec: JobSpec, report: RunReport) -> Alert:
    worst = list(report.reasons.items())[:REASONS_SHOWN]
    return Alert(
        kind=AlertKind.FAILURE_RATE,
        cause=digest(AlertKind.FAILURE_RATE, run.run_id),
        job=run.job,
        run_id=run.run_id,
        subject=f"Job {run.job}: {report.failed:,} of "
        f"{counted(report.loaded + report.failed, 'row')} failed ({report.failure_rate:.1%})",
        figures=(
            ("partition", partition_text(run)),
            ("allowed", f"{spec.alert.failure_rate:.1%} (alert.failure_rate)"),
            ("rows", f"{report.loaded} loaded, {report.failed} failed, {report.reused} reused"),
            (
                "problems",
                ", ".join(f"{name} {n}" for name, n in worst) or "rejected before sending",
            ),
            ("cost", money(report.cost_usd)),
        ),
        todo=f"Everything good is loaded. Look at {spec.target.failures_place}, mend the cause, "
        "then run the partition again with the param redrive=true.",
    )


def _budget(run: Run, spec: JobSpec, spent: Decimal) -> Iterator[Alert]:
    limit, share = spec.budget.max_usd, spec.alert.budget_share
    reached = max(run.estimate_usd or Decimal(0), spent)
    if not limit or share is None or reached < limit * share:
        return
    is_over = reached > limit
    todo = "The run goes on. Raise budget.max_usd before its partitions grow over it, or take a "
    todo += "smaller sample or another model."
    if is_over:
        todo = (
            "A run whose estimate is over its budget does not begin, and nothing was sent; one "
            "that has begun is finished. Raise budget.max_usd, or take a smaller sample or another "
            "model, and clear the run."
        )
    yield Alert(
        kind=AlertKind.BUDGET,
        cause=digest(AlertKind.BUDGET, run.run_id, is_over),
        job=run.job,
        run_id=run.run_id,
        subject=f"Job {run.job}: {reached / limit:.0%} of the run's budget of {money(limit)}",
        figures=(
            ("partition", partition_text(run)),
            ("estimate", money(run.estimate_usd)),
            ("spent so far", money(spent)),
            ("budget", f"{money(limit)} a run (budget.max_usd)"),
        ),
        todo=todo,
    )


def _left_out(run: Run, spec: JobSpec, spent: Decimal, ledger: Ledger) -> Alert | None:
    """Tell of a later round that the run's budget has left out; None when there is none."""
    limit, found = spec.budget.max_usd, left_out_round(run.run_id, ledger)
    if not limit or spec.alert.budget_share is None or found is None:
        return None
    if spent + found.estimate_usd <= limit:  # another bound was in its way
        return None
    return Alert(
        kind=AlertKind.BUDGET,
        cause=digest(AlertKind.BUDGET, run.run_id, LEFT_OUT, found.number),
        job=run.job,
        run_id=run.run_id,
        subject=f"{_without(run, found, ledger)} the run's budget of {money(limit)}",
        figures=(
            *_planned(run, found),
            ("spent so far", money(spent)),
            ("budget", f"{money(limit)} a run (budget.max_usd)"),
        ),
        todo=f"{_where(spec)} {_again(spec)}",
    )


def _without(run: Run, found: LeftOutRound, ledger: Ledger) -> str:
    before = next(one for one in ledger.rounds(run.run_id) if one.round == found.number - 1)
    rows = counted(before.retry, "row fails", "rows fail")
    return f"Job {run.job}: round {found.number} is left out, {rows}: it would go over"


def _planned(run: Run, found: LeftOutRound) -> tuple[tuple[str, str], tuple[str, str]]:
    estimate = f"{money(found.estimate_usd)} (estimate of round {found.number})"
    return ("partition", partition_text(run)), ("left out", estimate)


def _where(spec: JobSpec) -> str:
    place = spec.target.failures_place
    return f"What is paid for is loaded; the rows are in {place}, with the reason {OVER_BUDGET}."


def _limit_left_out(run: Run, spec: JobSpec, ledger: Ledger) -> Iterator[Alert]:
    """Tell of a later round that a spend limit has left out."""
    found = left_out_round(run.run_id, ledger)
    if found is None or spec.alert.budget_share is None:
        return
    try:
        with reading(ledger.engine) as connection:
            over = list(spend_limits.exceeded(connection, run, found.estimate_usd))
    except ConfigurationError:  # no price: its runs do not begin, and have said so
        return
    for limit, so_far in over:
        yield Alert(
            kind=AlertKind.BUDGET,
            cause=digest(AlertKind.BUDGET, run.run_id, LEFT_OUT, found.number, limit.name),
            job=run.job,
            run_id=run.run_id,
            subject=f"{_without(run, found, ledger)} the spend limit of {money(limit.max_usd)}",
            figures=(
                *_planned(run, found),
                ("spent", money(so_far.spent)),
                ("in flight", money(so_far.in_flight)),
                ("spend limit", f"{money(limit.max_usd)} for all runs of {limit.name}"),
            ),
            todo=f"{_where(spec)} Run the partition again with the param redrive=true, and with a "
            f"larger max_usd in {spend_limits.PARAM} under the same name.",
        )


def _again(spec: JobSpec) -> str:
    if spec.queue is not None:
        return "Raise budget.max_usd; the applications put these requests again, under new ids."
    return (
        "Raise budget.max_usd if it has to hold every round, then run the partition again with "
        "the param redrive=true: it sends these rows alone, within a budget of its own."
    )


def _month_budget(run: Run, spec: JobSpec, ledger: Ledger) -> Iterator[Alert]:
    limit, share = spec.budget.max_usd_per_month, spec.alert.budget_share
    if not limit or share is None:
        return
    month = Month.of(now())
    try:
        with reading(ledger.engine) as connection:
            so_far = spending.of_month(connection, run.job, month)
    except ConfigurationError:  # no price: the run itself has said so and does not begin
        return
    planned, of_what = _not_begun(run, limit - so_far.total, ledger)
    reached = so_far.total + planned
    if reached < limit * share:
        return
    is_over = reached > limit
    yield Alert(
        kind=AlertKind.BUDGET,
        cause=digest(AlertKind.BUDGET, run.job, str(month), is_over),
        job=run.job,
        run_id=run.run_id,
        subject=f"Job {run.job}: {reached / limit:.0%} of the budget of {money(limit)} for {month}",
        figures=(
            ("partition", partition_text(run)),
            ("spent", money(so_far.spent)),
            ("in flight", money(so_far.in_flight)),
            ("not begun", f"{money(planned)} (estimate of {of_what})"),
            ("budget", f"{money(limit)} a month (budget.max_usd_per_month)"),
        ),
        todo=MONTH_IS_OVER if is_over else MONTH_IS_NEAR,
    )


def _not_begun(run: Run, left: Decimal, ledger: Ledger) -> tuple[Decimal, str]:
    """Return what the run has planned and not begun, and what that is of.

    A round that was left out counts when it was more than what is `left` of the budget.
    """
    if not ledger.rounds(run.run_id):
        return run.estimate_usd or Decimal(0), "this run"
    left_out = left_out_round(run.run_id, ledger)
    amount = Decimal(0) if left_out is None else left_out.estimate_usd
    return (amount if amount > left else Decimal(0)), "a round that is left out"


def _duplicates(run: Run, batches: list[Batch], ledger: Ledger) -> Iterator[Alert]:
    by_submission = {one.submission_id: one for one in batches}
    for found in ledger.duplicates(list(by_submission)):
        if not found["kept_batch_id"] or found["api_status"] == "failed":
            continue  # refused by the API: nothing was processed
        kept = by_submission[found["submission_id"]]
        yield Alert(
            kind=AlertKind.DUPLICATE_BATCH,
            cause=digest(AlertKind.DUPLICATE_BATCH, found["batch_id"]),
            job=run.job,
            run_id=run.run_id,
            subject=f"Job {run.job}: a batch was made twice, "
            f"{counted(found['done_requests'], 'request')} may be paid twice",
            figures=(
                ("partition", partition_text(run)),
                ("round and shard", f"{kept.round} and {kept.shard}"),
                ("kept", found["kept_batch_id"]),
                ("cancelled", f"{found['batch_id']}, {found['api_status']}"),
            ),
            todo="Nothing has to be done for this run: the results come from the batch that was "
            "kept. When it happens more than once, make [llm_batch] submit_grace longer.",
        )


def _spent(batches: list[Batch]) -> Decimal:
    return sum((one.cost_usd for one in batches if one.cost_usd is not None), Decimal(0))


def partition_text(run: Run) -> str:
    """Return the data interval for people."""
    return f"{run.interval_start:%Y-%m-%d %H:%M} to {run.interval_end:%Y-%m-%d %H:%M} UTC"


def moment_text(moment: datetime | None) -> str:
    """Return a time for people; `never` for None."""
    return "never" if moment is None else f"{moment:%Y-%m-%d %H:%M} UTC"


def hours(span: timedelta) -> str:
    """Return a duration for people."""
    minutes = max(int(span.total_seconds()) // 60, 0)
    return f"{minutes} min" if minutes < 60 else f"{minutes / 60:.1f} h"

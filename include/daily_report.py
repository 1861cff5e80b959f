"""What a day came to over all jobs, and what needs a person: few questions, each with a bound.

A day is what happened in it: runs that were finished, batches that were collected, alerts that were
raised. Whether something needs a person is as it stands when the report is made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, RowMapping

from include import dashboard, figures, ledger_database
from include import ledger_tables as tables
from include.cost import known_total
from include.dashboard import Spent
from include.figures import counted
from include.ledger_records import RunState, now
from include.overview import is_said_anew
from include.run_mode import OWN_FILE
from include.span import STEP, Span

HISTORY = 14  # days of the chart of money
MOST = 20  # rows of each list; its title says how many there are
STILL = timedelta(hours=2)  # without progress, after which an open run is worth a look
UNPAID = ("failed",)  # a duplicate that the API refused processed nothing


@dataclass(frozen=True)
class JobDay:
    """What one job did in the day. Money is US dollars; None means that a price is unknown."""

    job: str
    runs: int
    rows: int
    loaded: int
    failed: int
    reused: int
    batches: int
    requests: int
    cost_usd: Decimal | None
    largest_run_usd: Decimal | None  #: the run that was dearest
    budget_usd: Decimal | None  #: of one run
    month_usd: Decimal | None  #: of the calendar month up to this day
    month_budget_usd: Decimal | None


@dataclass(frozen=True)
class Finding:
    """One thing to look at: a run or a batch, and what is known of it."""

    job: str
    dag_id: str
    dag_run_id: str
    interval_start: datetime
    run_id: str
    what: str
    batch_id: str | None = None


@dataclass(frozen=True)
class Findings:
    """A list that may be cut: `total` counts all of them."""

    shown: tuple[Finding, ...]
    total: int


@dataclass(frozen=True)
class DailyReport:
    """One day over all jobs."""

    day: date
    made_at: datetime
    jobs: tuple[JobDay, ...]
    reasons: tuple[tuple[str, int], ...]
    money: tuple[tuple[date, Decimal], ...]  #: of the last `HISTORY` days, this one last
    is_money_whole: bool  #: False: the price of some batches is unknown
    slowest: Findings
    standing: Findings
    to_redrive: Findings
    duplicates: Findings
    quarantined: Findings
    alerts: Findings

    def total(self, name: str) -> int:
        """Return the sum of a count over all jobs."""
        return sum(getattr(one, name) for one in self.jobs)

    @property
    def cost_usd(self) -> Decimal | None:
        """What the day cost; None when a price is unknown."""
        return known_total(one.cost_usd for one in self.jobs)

    @property
    def needs_a_person(self) -> tuple[tuple[str, str, Findings], ...]:
        """What to look at: title, what to do, and the list; only what there is."""
        parts = (
            (
                "Open runs that stand still",
                "Look at the run's red or waiting task; clearing it is safe.",
                self.standing,
            ),
            (
                "Failed rows to redrive",
                "Look at the failures table, mend the cause, run the partition with redrive=true.",
                self.to_redrive,
            ),
            (
                "Batches that were made twice",
                "The second one was cancelled; what it did is paid for.",
                self.duplicates,
            ),
            (
                "Lines in quarantine",
                "The API sent lines that could not be used; their rows went to the next round.",
                self.quarantined,
            ),
            ("Alerts", "What was said, and to whom it could not be said.", self.alerts),
        )
        return tuple(part for part in parts if part[2].total)


def daily_report(engine: Engine, day: date) -> DailyReport:
    """Ask the ledger on `engine` about one UTC day; an empty ledger gives an empty report."""
    span = Span(day, day)
    with ledger_database.reading(engine) as connection:
        # A job may have had two DAGs: its own, and one of somebody who uses the operators.
        names = list(dict.fromkeys(one.job for one in dashboard.jobs(connection)))
        history = Span(day - (HISTORY - 1) * STEP, day)
        spent = dashboard.spent(connection, names, history)
        reasons, _ = dashboard.reasons(connection, names, span)
        return DailyReport(
            day=day,
            made_at=now(),
            jobs=_jobs(connection, names, span, spent),
            reasons=tuple(reasons.get(day, Counter()).most_common(MOST)),
            money=_money(spent, history),
            is_money_whole=all(one.cost_usd is not None for one in spent),
            slowest=_slowest(connection, span),
            standing=_standing(connection),
            to_redrive=_to_redrive(connection, span),
            duplicates=_duplicates(connection, span),
            quarantined=_quarantined(connection, span),
            alerts=_alerts(connection, span),
        )


def _jobs(
    connection: Connection, names: Sequence[str], span: Span, spent: Sequence[Spent]
) -> tuple[JobDay, ...]:
    counts = _finished(connection, span)
    batches = {one.job: one for one in spent if one.day == span.first}
    budgets = {one.job: one for one in dashboard.budgets(connection, names)}
    month = _by_job(dashboard.spent(connection, names, Span(span.first.replace(day=1), span.last)))
    days = []
    for job in names:
        if job not in counts and job not in batches:
            continue
        run, paid = counts.get(job), batches.get(job)
        days.append(
            JobDay(
                job=job,
                **{
                    name: int(run[name]) if run else 0
                    for name in ("runs", "rows", "loaded", "failed", "reused")
                },
                batches=paid.batches if paid else 0,
                requests=paid.requests if paid else 0,
                cost_usd=paid.cost_usd if paid else Decimal(0),
                largest_run_usd=run["largest"] if run else None,
                budget_usd=budgets[job].max_usd if job in budgets else None,
                month_usd=month.get(job, Decimal(0)),
                month_budget_usd=budgets[job].max_usd_per_month if job in budgets else None,
            )
        )
    return tuple(sorted(days, key=lambda one: (-one.rows, one.job)))


def _by_job(spent: Sequence[Spent]) -> dict[str, Decimal | None]:
    """Add up what jobs have spent; None for a job that has used a model without a price."""
    sums: dict[str, Decimal | None] = {}
    for one in spent:
        before = sums.get(one.job, Decimal(0))
        if before is None or one.cost_usd is None:
            sums[one.job] = None
        else:
            sums[one.job] = before + one.cost_usd
    return sums


def _finished(connection: Connection, span: Span) -> dict[str, RowMapping]:
    columns = tables.run.c
    sums = [
        sa.func.sum(columns[name]).label(name) for name in ("rows", "loaded", "failed", "reused")
    ]
    largest = sa.func.max(sa.cast(columns.cost_usd, sa.Numeric(38, 12)))
    query = (
        sa.select(columns.job, sa.func.count().label("runs"), *sums, largest.label("largest"))
        .where(
            columns.state == RunState.DONE,
            columns.done_at >= span.start,
            columns.done_at < span.end,
        )
        .group_by(columns.job)
        .limit(dashboard.MOST_JOBS)
    )
    return {row["job"]: row for row in connection.execute(query).mappings()}


def _money(spent: Sequence[Spent], history: Span) -> tuple[tuple[date, Decimal], ...]:
    by_day = dict.fromkeys(history.days, Decimal(0))
    for one in spent:
        by_day[one.day] += one.cost_usd or 0
    return tuple(by_day.items())


def _slowest(connection: Connection, span: Span) -> Findings:
    columns = tables.batch.c
    taken = columns.ended_at - columns.submitted_at
    if connection.dialect.name == "sqlite":
        taken = sa.func.julianday(columns.ended_at) - sa.func.julianday(columns.submitted_at)
    ended = (
        columns.ended_at >= span.start,
        columns.ended_at < span.end,
        columns.submitted_at.is_not(None),
    )

    def what(row: RowMapping) -> str:
        took = figures.span(row["ended_at"] - row["submitted_at"])
        return f"{took}, {counted(row['requests'], 'request')}, {row['api_status']}"

    return _batches(connection, ended, taken.desc(), what)


def _standing(connection: Connection) -> Findings:
    run, batch = tables.run.c, tables.batch.c
    moved = sa.func.max(
        sa.func.coalesce(batch.collected_at, batch.ended_at, batch.progress_at, batch.intent_at)
    )
    last = (
        sa.select(batch.run_id, sa.type_coerce(moved, tables.UtcTime).label("moved"))
        .join(tables.run)
        .where(run.state == RunState.OPEN)
        .group_by(batch.run_id)
        .subquery()
    )
    moment = sa.type_coerce(sa.func.coalesce(last.c.moved, run.created_at), tables.UtcTime)
    query = (
        sa.select(tables.run, moment.label("moved"))
        .outerjoin(last, run.run_id == last.c.run_id)
        .where(run.state == RunState.OPEN, run.mode != OWN_FILE, moment < now() - STILL)
        .order_by(moment)
    )
    return _found(
        connection,
        query,
        lambda row: f"{counted(row['rows'], 'row')}, last moved {_at(row['moved'])}",
    )


def _to_redrive(connection: Connection, span: Span) -> Findings:
    run = tables.run.c
    is_of_queue = sa.exists().where(tables.queue.c.run_id == run.run_id)
    query = (
        sa.select(tables.run)
        .where(
            run.state == RunState.DONE,
            run.done_at >= span.start,
            run.done_at < span.end,
            run.failed > 0,
            ~is_said_anew(),
            ~is_of_queue,  # its applications put these requests again
        )
        .order_by(run.failed.desc())
    )
    return _found(
        connection, query, lambda row: f"{row['failed']:,} of {counted(row['rows'], 'row')} failed"
    )


def _duplicates(connection: Connection, span: Span) -> Findings:
    found = tables.duplicate.c
    query = (
        sa.select(
            tables.run,
            found.batch_id,
            found.kept_batch_id,
            found.done_requests,
            found.api_status,
        )
        .join(tables.batch, tables.batch.c.submission_id == found.submission_id)
        .join(tables.run, tables.run.c.run_id == tables.batch.c.run_id)
        .where(
            found.found_at >= span.start,
            found.found_at < span.end,
            found.kept_batch_id != "",
            found.api_status.not_in(UNPAID),
        )
        .order_by(found.found_at)
    )

    def what(row: RowMapping) -> str:
        done = f"{counted(row['done_requests'], 'request')} done, {row['api_status']}"
        return f"{row['batch_id']} beside {row['kept_batch_id']}: {done}"

    return _found(connection, query, what)


def _quarantined(connection: Connection, span: Span) -> Findings:
    columns = tables.batch.c
    collected = (
        columns.collected_at >= span.start,
        columns.collected_at < span.end,
        columns.quarantined > 0,
    )
    return _batches(connection, collected, columns.quarantined.desc(), _lines)


def _lines(row: RowMapping) -> str:
    return counted(row["quarantined"], "line")


def _alerts(connection: Connection, span: Span) -> Findings:
    alert = tables.alert.c
    query = (
        sa.select(tables.run, alert.subject, alert.channel, alert.delivered_at)
        .join(tables.run, tables.run.c.run_id == alert.run_id)
        .where(
            alert.raised_at >= span.start,
            alert.raised_at < span.end,
            sa.or_(alert.channel == "log", alert.delivered_at.is_(None)),
        )
        .order_by(alert.raised_at)
    )

    def what(row: RowMapping) -> str:
        untold = "" if row["delivered_at"] else f" (could not be told to {_notifier(row)})"
        return f"{row['subject']}{untold}"

    return _found(connection, query, what)


def _notifier(row: RowMapping) -> str:
    """Return the class of a channel such as `0 SlackNotifier`."""
    return str(row["channel"]).rpartition(" ")[2]


def _batches(
    connection: Connection,
    where: Sequence[sa.ColumnElement[bool]],
    order: sa.ColumnElement[Any],
    what: Any,
) -> Findings:
    columns = tables.batch.c
    of_batch = ("batch_id", "submitted_at", "ended_at", "requests", "api_status", "quarantined")
    query = (
        sa.select(tables.run, *(columns[name] for name in of_batch))
        .join(tables.batch)
        .where(*where)
        .order_by(order)
    )
    return _found(connection, query, what)


def _found(connection: Connection, query: sa.Select[Any], what: Any) -> Findings:
    total = connection.execute(
        sa.select(sa.func.count()).select_from(query.order_by(None).subquery())
    ).scalar_one()
    rows = connection.execute(query.limit(MOST)).mappings().all() if total else []
    return Findings(tuple(_finding(row, what(row)) for row in rows), int(total))


def _finding(row: RowMapping, what: str) -> Finding:
    return Finding(
        job=row["job"],
        dag_id=row["dag_id"],
        dag_run_id=row["dag_run_id"],
        interval_start=row["interval_start"],
        run_id=row["run_id"],
        what=what,
        batch_id=row.get("batch_id"),
    )


def _at(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"

"""What the pages of the UI ask of the ledger: few questions, each with a bound on its rows.

Everything here reads. Sums are made by the database; what is listed has a `LIMIT`. A page over all
jobs asks the same dozen questions whether the ledger holds ten batches or a million.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, RowMapping

from include import ledger_tables as tables
from include.cost import known_total
from include.figures import counted
from include.ledger_records import OVER, BatchState, RunState
from include.ledger_sums import as_date, day_of, money_sum
from include.partition_state import failures_left
from include.span import Span

MOST_JOBS = 500
MOST_RUNS = 4_000  # of all jobs in the days that are shown
MOST_IN_FLIGHT = 100  # batches that are listed
MOST_REASONS = 3_000  # different texts of reasons
MOST_TIMES = 2_000  # newest batches whose times are compared
MANY = 0.05  # of the rows have failed: worth a stronger colour
WORKING = (BatchState.SUBMITTING, BatchState.SUBMITTED)


@dataclass(frozen=True)
class JobPlace:
    """A job and the DAG that runs it."""

    job: str
    dag_id: str


@dataclass(frozen=True)
class Day:
    """What the partitions of one job that begin on one day have come to."""

    job: str
    day: date
    partitions: int
    open: int  #: partitions whose newest run is not finished
    rows: int
    failed: int  #: rows that have failed for good, as it stands now
    cost_usd: Decimal | None  #: of all runs over them; None when a price is unknown
    dag_id: str
    dag_run_id: str  #: of the newest run

    @property
    def done(self) -> int:
        """Rows that are loaded."""
        return max(self.rows - self.failed, 0)

    @property
    def told(self) -> str:
        """What has become of the rows, in words."""
        if self.open:
            return f"{counted(self.rows, 'row')}, not finished"
        return f"{self.done:,} loaded, {self.failed:,} failed of {counted(self.rows, 'row')}"

    @property
    def state(self) -> str:
        """`open`, `loaded`, or how bad it is: `failed` (some rows), `worse` (many of them)."""
        if self.open:
            return "open"
        if self.failed > self.rows * MANY:
            return "worse"
        return "failed" if self.failed else "loaded"


@dataclass(frozen=True)
class Spent:
    """What one job's batches cost that were collected on one day."""

    job: str
    day: date
    batches: int
    requests: int
    cost_usd: Decimal | None


@dataclass(frozen=True)
class InFlight:
    """A batch that the API works on, or is about to get."""

    job: str
    dag_id: str
    dag_run_id: str
    interval_start: datetime
    run_id: str
    submission_id: str
    conn_id: str
    batch_id: str | None
    round: int
    shard: int
    state: str
    api_status: str | None
    requests: int
    done_requests: int
    failed_requests: int
    submitted_at: datetime | None
    progress_at: datetime | None


@dataclass(frozen=True)
class Load:
    """What is at the API over one connection, or waits to be sent."""

    conn_id: str
    state: str
    batches: int
    requests: int
    answered: int
    input_tokens: int


@dataclass(frozen=True)
class Took:
    """How long the batches that ended on one day took, from submitted to ended."""

    day: date
    batches: int
    median: timedelta
    longest: timedelta


@dataclass(frozen=True)
class JobBudget:
    """What a job's newest run says about its money."""

    job: str
    model: str
    max_usd: Decimal | None  #: that one run may be estimated to cost
    max_usd_per_month: Decimal | None  #: that the job may cost in a calendar month (UTC)


def jobs(connection: Connection) -> list[JobPlace]:
    """Return every job in the ledger, with its DAG."""
    columns = tables.run.c
    query = sa.select(columns.job, columns.dag_id).distinct().order_by(columns.job)
    return [JobPlace(**row) for row in _rows(connection, query, MOST_JOBS)]


def newest_day(connection: Connection, names: Sequence[str]) -> date | None:
    """Return the day of the newest partition of these jobs."""
    columns = tables.run.c
    query = sa.select(sa.func.max(columns.interval_start)).where(columns.job.in_(names))
    found = connection.execute(query).scalar()
    return None if found is None else found.date()


def days(connection: Connection, names: Sequence[str], span: Span) -> tuple[list[Day], bool]:
    """Return what the partitions of these jobs have come to, and whether some were left out."""
    columns = tables.run.c
    query = (
        sa.select(
            columns.job,
            columns.interval_start,
            columns.interval_end,
            columns.state,
            columns.mode,
            columns.rows,
            columns.reused,
            columns.failed,
            columns.cost_usd,
            columns.dag_id,
            columns.dag_run_id,
        )
        .where(
            columns.job.in_(names),
            columns.interval_start >= span.start,
            columns.interval_start < span.end,
        )
        .order_by(columns.interval_start.desc(), columns.created_at.desc())
    )
    found = _rows(connection, query, MOST_RUNS)
    partitions: dict[tuple[Any, ...], list[RowMapping]] = {}
    for row in reversed(found):
        key = (row["job"], row["interval_start"], row["interval_end"])
        partitions.setdefault(key, []).append(row)
    cells: dict[tuple[str, date], list[list[RowMapping]]] = {}
    for (job, start, _end), runs in partitions.items():
        cells.setdefault((job, start.date()), []).append(runs)
    return [_day(job, at, runs) for (job, at), runs in cells.items()], len(found) == MOST_RUNS


def _day(job: str, day: date, partitions: list[list[RowMapping]]) -> Day:
    newest = partitions[-1][-1]
    finished = [[one for one in runs if one["state"] == RunState.DONE] for runs in partitions]
    over = [one for runs in partitions for one in runs if one["state"] in OVER]
    return Day(
        job=job,
        day=day,
        partitions=len(partitions),
        open=sum(runs[-1]["state"] == RunState.OPEN for runs in partitions),
        rows=sum(runs[-1]["rows"] for runs in partitions),
        failed=sum(failures_left(_Counts(**_counts(one)) for one in runs) for runs in finished),
        cost_usd=known_total(one["cost_usd"] for one in over),
        dag_id=newest["dag_id"],
        dag_run_id=newest["dag_run_id"],
    )


@dataclass(frozen=True)
class _Counts:
    mode: str
    reused: int
    failed: int


def _counts(row: RowMapping) -> dict[str, Any]:
    return {name: row[name] for name in ("mode", "reused", "failed")}


def spent(connection: Connection, names: Sequence[str], span: Span) -> list[Spent]:
    """Return what these jobs' batches cost, by job and by the day they were collected on."""
    columns = tables.batch.c
    day = day_of(columns.collected_at, connection)
    query = (
        sa.select(
            columns.job,
            day.label("day"),
            sa.func.count().label("batches"),
            sa.func.count(columns.cost_usd).label("priced"),
            sa.func.sum(columns.requests).label("requests"),
            money_sum(connection, columns.cost_usd).label("cost_usd"),
        )
        .where(*_collected_in(names, span))
        .group_by(columns.job, day)
    )
    found = _rows(connection, query, MOST_JOBS * len(span.days))
    return [
        Spent(
            job=row["job"],
            day=as_date(row["day"]),
            batches=row["batches"],
            requests=int(row["requests"]),
            cost_usd=row["cost_usd"] if row["priced"] == row["batches"] else None,
        )
        for row in found
    ]


def reasons(
    connection: Connection, names: Sequence[str], span: Span
) -> tuple[dict[date, Counter[str]], bool]:
    """Return why answers were no good, by day, and whether some were left out."""
    columns = tables.batch.c
    day = day_of(columns.collected_at, connection)
    query = (
        sa.select(day.label("day"), columns.reasons, sa.func.count().label("times"))
        .where(*_collected_in(names, span), columns.reasons != "{}")
        .group_by(day, columns.reasons)
    )
    found = _rows(connection, query, MOST_REASONS)
    by_day: dict[date, Counter[str]] = {}
    for row in found:
        counter = by_day.setdefault(as_date(row["day"]), Counter())
        for reason, times in json.loads(row["reasons"] or "{}").items():
            counter[reason] += times * row["times"]
    return by_day, len(found) == MOST_REASONS


def took(connection: Connection, names: Sequence[str], span: Span) -> tuple[list[Took], bool]:
    """Return how long batches took, by day, and whether only the newest were compared."""
    columns = tables.batch.c
    query = (
        sa.select(columns.submitted_at, columns.ended_at)
        .where(
            *_collected_in(names, span),
            columns.submitted_at.is_not(None),
            columns.ended_at.is_not(None),
        )
        .order_by(columns.collected_at.desc())
    )
    found = _rows(connection, query, MOST_TIMES)
    by_day: dict[date, list[timedelta]] = {}
    for row in found:
        by_day.setdefault(row["ended_at"].date(), []).append(row["ended_at"] - row["submitted_at"])
    return [
        Took(day, len(times), sorted(times)[len(times) // 2], max(times))
        for day, times in sorted(by_day.items())
    ], len(found) == MOST_TIMES


def in_flight(connection: Connection, names: Sequence[str]) -> list[InFlight]:
    """Return what the API works on, the longest without progress first."""
    columns = tables.batch.c
    run = tables.run.c
    wanted = [one.name for one in columns if one.name in InFlight.__dataclass_fields__]
    query = (
        sa.select(
            *(columns[name] for name in wanted), run.dag_id, run.dag_run_id, run.interval_start
        )
        .join(tables.run)
        .where(columns.state.in_(WORKING), columns.job.in_(names))
        .order_by(columns.progress_at)
    )
    return [InFlight(**row) for row in _rows(connection, query, MOST_IN_FLIGHT)]


def load(connection: Connection, names: Sequence[str]) -> list[Load]:
    """Return how much is at the API, or waits to be sent, by connection."""
    columns = tables.batch.c
    query = (
        sa.select(
            columns.conn_id,
            columns.state,
            sa.func.count().label("batches"),
            sa.func.sum(columns.requests).label("requests"),
            sa.func.sum(columns.done_requests + columns.failed_requests).label("answered"),
            sa.func.sum(columns.input_tokens).label("input_tokens"),
        )
        .join(tables.run)
        .where(columns.state.in_((BatchState.PREPARED, *WORKING)), columns.job.in_(names))
        .where(tables.run.c.state != RunState.CLOSED)
        .group_by(columns.conn_id, columns.state)
        .order_by(columns.conn_id, columns.state)
    )
    whole = ("batches", "requests", "answered", "input_tokens")
    return [
        Load(row["conn_id"], row["state"], **{name: int(row[name]) for name in whole})
        for row in _rows(connection, query, MOST_JOBS)
    ]


def budgets(connection: Connection, names: Sequence[str]) -> list[JobBudget]:
    """Return what the newest run of each job says about its money."""
    columns = tables.run.c
    newest = (
        sa.select(columns.job, sa.func.max(columns.interval_start).label("newest"))
        .where(columns.job.in_(names))
        .group_by(columns.job)
        .subquery()
    )
    query = sa.select(columns.job, columns.spec).join(
        newest, sa.and_(columns.job == newest.c.job, columns.interval_start == newest.c.newest)
    )
    found = {row["job"]: row["spec"] for row in _rows(connection, query, 2 * MOST_JOBS)}
    return [_budget(job, spec) for job, spec in sorted(found.items())]


def _budget(job: str, spec: str) -> JobBudget:
    """Read the pinned spec as JSON: a release that wrote more or less must not break a page."""
    parts = json.loads(spec) if spec.startswith("{") else {}
    budget = parts.get("budget") or {}
    most, by_month = (budget.get(name) for name in ("max_usd", "max_usd_per_month"))
    model = (parts.get("request") or {}).get("model") or ""
    return JobBudget(
        job,
        str(model),
        max_usd=None if most is None else Decimal(str(most)),
        max_usd_per_month=None if by_month is None else Decimal(str(by_month)),
    )


def _collected_in(names: Sequence[str], span: Span) -> Iterable[sa.ColumnElement[bool]]:
    columns = tables.batch.c
    return (
        columns.collected_at >= span.start,
        columns.collected_at < span.end,
        columns.job.in_(names),
    )


def _rows(connection: Connection, query: sa.Select[Any], limit: int) -> Sequence[RowMapping]:
    return connection.execute(query.limit(limit)).mappings().all()

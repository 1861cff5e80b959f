"""What the pages over all jobs and over one DAG show: calendar, money, problems, times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Connection

from include import charts, dashboard, figures, run_view
from include.cost import known_total
from include.dashboard import JobPlace
from include.span import Span
from llm_batch import ui_airflow

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

DAYS = 35  # that a page shows
MOST_ROWS = 40  # jobs in the calendar
MOST_CHARTS = 12  # jobs with a chart of their own
MOST_SERIES = 6  # colours; what is left is added up
MOST_LATEST = 30  # runs that a DAG's page lists
OTHERS = "others"
UNITS = ((3_600, "h"), (60, "min"), (1, "s"))


@dataclass(frozen=True)
class CalendarRow:
    """One job and its days; a day without a partition is None."""

    job: str
    dag_id: str
    cells: tuple[dashboard.Day | None, ...]


@dataclass(frozen=True)
class JobMoney:
    """What one job spent, and the chart of it."""

    job: str
    model: str
    max_usd: Decimal | None
    cost_usd: Decimal | None
    batches: int
    requests: int
    dearest: Decimal | None
    month_usd: Decimal | None
    max_usd_per_month: Decimal | None
    chart: charts.Chart | None

    @property
    def is_over(self) -> bool:
        """Whether some partition cost more than the budget of one run."""
        return None not in (self.max_usd, self.dearest) and self.dearest > self.max_usd  # type: ignore[operator]


def span_until(last: date) -> Span:
    """Return the days up to `last` that a page shows."""
    return Span(last - timedelta(days=DAYS - 1), last)


def overview(
    connection: Connection, session: Session, places: Sequence[JobPlace], until: date | None
) -> dict[str, Any]:
    """Return what the page over these jobs shows; `until` is the calendar's last day."""
    names = [one.job for one in places]
    now = datetime.now(UTC)
    newest = dashboard.newest_day(connection, names) or now.date()
    calendar = span_until(until or newest)
    days, is_cut = dashboard.days(connection, names, calendar)
    return {
        "now": now,
        "places": places,
        "calendar": calendar,
        "newest": newest,
        "rows": _rows(places, days, calendar),
        "is_cut": is_cut,
        "partitions": Counter(one.state for one in days),
        **_working(connection, session, names),
        **_history(connection, names, days, span_until(now.date())),
    }


def _working(connection: Connection, session: Session, names: Sequence[str]) -> dict[str, Any]:
    load = dashboard.load(connection, names)
    return {
        "load": load,
        "at_api": sum(one.batches for one in load if one.state == "SUBMITTED"),
        "waiting": sum(one.batches for one in load if one.state != "SUBMITTED"),
        "in_flight": dashboard.in_flight(connection, names),
        "pool": ui_airflow.pool_use(session),
    }


def _history(
    connection: Connection, names: Sequence[str], days: Sequence[dashboard.Day], span: Span
) -> dict[str, Any]:
    spent = dashboard.spent(connection, names, span)
    reasons, reasons_cut = dashboard.reasons(connection, names, span)
    took, took_cut = dashboard.took(connection, names, span)
    counted = sum(reasons.values(), Counter[str]())
    shown = [name for name, _ in counted.most_common(MOST_SERIES)]
    return {
        "span": span,
        "money": _money(dashboard.budgets(connection, names), spent, days, span),
        "spent_usd": known_total(one.cost_usd for one in spent),
        "spent_today": known_total(one.cost_usd for one in spent if one.day == span.last),
        "requests": sum(one.requests for one in spent),
        "reasons": counted,
        "reasons_chart": _reasons_chart(reasons, shown, span),
        "reason_names": [*shown, *([OTHERS] if len(counted) > len(shown) else [])],
        "reasons_cut": reasons_cut,
        "took": took,
        "took_chart": _took_chart(took, span),
        "took_cut": took_cut,
    }


def _rows(
    places: Sequence[JobPlace], days: Sequence[dashboard.Day], span: Span
) -> list[CalendarRow]:
    found = {(one.job, one.day): one for one in days}
    return [
        CalendarRow(one.job, one.dag_id, tuple(found.get((one.job, day)) for day in span.days))
        for one in places[:MOST_ROWS]
    ]


def _money(
    budgets: Sequence[dashboard.JobBudget],
    spent: Sequence[dashboard.Spent],
    days: Sequence[dashboard.Day],
    span: Span,
) -> list[JobMoney]:
    found = [_job_money(one, spent, days, span) for one in budgets]
    found.sort(key=lambda one: one.cost_usd or Decimal(0), reverse=True)
    return [
        one if place < MOST_CHARTS else JobMoney(**{**vars(one), "chart": None})
        for place, one in enumerate(found)
    ]


def _job_money(
    budget: dashboard.JobBudget,
    spent: Sequence[dashboard.Spent],
    days: Sequence[dashboard.Day],
    span: Span,
) -> JobMoney:
    ours = [one for one in spent if one.job == budget.job]
    costs = [one.cost_usd for one in days if one.job == budget.job and one.partitions == 1]
    limit = budget.max_usd
    cost = known_total(one.cost_usd for one in ours)
    values = {one.day: one.cost_usd for one in ours if one.cost_usd is not None}
    told = "no budget" if limit is None else f"budget of a run {figures.dollars(limit)}"
    chart = charts.stacked(
        f"{budget.job}: {figures.dollars(cost)} from {span.first} to {span.last}, {told}.",
        span.days,
        [charts.Series(budget.job, values)],
        figures.dollars,
        axis=figures.short_dollars,
        limit=limit,
        limit_text=told,
    )
    return JobMoney(
        job=budget.job,
        model=budget.model,
        max_usd=limit,
        cost_usd=cost,
        batches=sum(one.batches for one in ours),
        requests=sum(one.requests for one in ours),
        month_usd=known_total(one.cost_usd for one in ours if one.day >= span.last.replace(day=1)),
        max_usd_per_month=budget.max_usd_per_month,
        dearest=max((one for one in costs if one is not None), default=None),
        chart=chart if values else None,
    )


def _reasons_chart(
    reasons: Mapping[date, Counter[str]], shown: Sequence[str], span: Span
) -> charts.Chart | None:
    if not reasons:
        return None
    series = [
        charts.Series(name, {day: one[name] for day, one in reasons.items() if one[name]})
        for name in shown
    ]
    others = {
        day: sum(times for name, times in one.items() if name not in shown)
        for day, one in reasons.items()
    }
    if any(others.values()):
        series.append(charts.Series(OTHERS, {day: n for day, n in others.items() if n}))
    worst = ", ".join(shown[:3])
    label = f"Answers that were no good by day and reason, {span.first} to {span.last}: {worst}."
    return charts.stacked(label, span.days, series, figures.short_count)


def _took_chart(took: Sequence[dashboard.Took], span: Span) -> charts.Chart | None:
    if not took:
        return None
    median = {one.day: one.median.total_seconds() for one in took}
    rest = {one.day: (one.longest - one.median).total_seconds() for one in took}
    slowest = max(one.longest for one in took)
    unit, name = next(one for one in UNITS if slowest.total_seconds() >= one[0] or one[0] == 1)
    return charts.stacked(
        f"Time from submitted to ended, by day: median, and the slowest on top; the slowest of "
        f"all took {figures.span(slowest)}.",
        span.days,
        [charts.Series("median", median), charts.Series("from median to slowest", rest)],
        figures.span,
        axis=lambda value: f"{value:g} {name}",
        unit=unit,
    )


def latest(connection: Connection, dag_id: str) -> list[run_view.RunOutline]:
    """Return the newest runs of a DAG."""
    runs = run_view.latest_runs(connection, dag_id, MOST_LATEST)
    return run_view.outlines(connection, runs)

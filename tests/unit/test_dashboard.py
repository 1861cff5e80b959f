"""What pages show is what the ledger holds, on every database, with bounded questions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from include import dashboard, ledger_database, run_view
from include import ledger_tables as tables
from include.bench.full_ledger import Size, fill
from include.dashboard import Day
from include.ledger import Ledger
from include.ledger_records import Batch, Run
from include.span import Span

TODAY = datetime(2026, 11, 20, 9, tzinfo=UTC)
SIZE = Size(jobs=3, days=6, requests=50)
SPAN = Span(date(2026, 10, 17), date(2026, 11, 20))
NAMES = ["job_00", "job_01"]  # the third is somebody else's


@pytest.fixture(
    scope="module", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)]
)
def ledger(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Ledger]:
    """Three jobs of six days, the last of them at work."""
    url = f"sqlite:///{tmp_path_factory.mktemp('ledger')}/ledger.db"
    if request.param == "postgresql":
        url = request.getfixturevalue("emptied_postgres_url")()
    engine = sa.create_engine(url)
    yield fill(engine, SIZE, today=TODAY)
    engine.dispose()
    if request.param == "postgresql":
        request.getfixturevalue("emptied_postgres_url")()


@pytest.fixture
def connection(ledger: Ledger) -> Iterator[sa.Connection]:
    with ledger_database.reading(ledger.engine) as connection:
        yield connection


def _batches(ledger: Ledger, job: str | None = None) -> list[Batch]:
    return [one for run in ledger.runs(job) for one in ledger.batches(run.run_id)]


def test_the_money_of_every_day_and_job_is_the_ledgers_to_the_last_digit(
    ledger: Ledger, connection: sa.Connection
) -> None:
    """Both databases say what exact addition says."""
    exact: Counter[tuple[str, date]] = Counter()
    for one in _batches(ledger):
        if one.job in NAMES and one.collected_at and one.cost_usd:
            exact[one.job, one.collected_at.date()] += one.cost_usd  # type: ignore[assignment]

    found = dashboard.spent(connection, NAMES, SPAN)

    assert {(one.job, one.day): one.cost_usd for one in found} == dict(exact)
    assert sum(one.batches for one in found) == 2 * 5 * 4


def test_large_sums_keep_their_last_digit(ledger: Ledger) -> None:
    """A binary fraction has 15 digits: a job of many thousand dollars needs more."""
    dear = Decimal("123456.000000000000000001")
    one = next(batch for batch in _batches(ledger, "job_00") if batch.collected_at)
    with ledger.engine.connect() as connection:
        change = sa.update(tables.batch).where(tables.batch.c.run_id == one.run_id)
        connection.execute(change.values(cost_usd=dear))
        (seen,) = run_view.outlines(connection, [ledger.run(one.run_id)])
        connection.rollback()

    assert seen.cost_usd == dear * seen.batches


def test_a_day_with_a_batch_of_unknown_price_is_unknown(ledger: Ledger) -> None:
    """Never 0, and never the sum of the others."""
    with ledger.engine.connect() as connection:
        one = next(batch for batch in _batches(ledger, "job_00") if batch.cost_usd is not None)
        connection.execute(
            sa.update(tables.batch)
            .where(tables.batch.c.submission_id == one.submission_id)
            .values(cost_usd=None)
        )
        found = dashboard.spent(connection, ["job_00"], SPAN)
        connection.rollback()

    day = one.collected_at.date() if one.collected_at else None
    assert {spent.day: spent.cost_usd for spent in found}[day] is None  # type: ignore[index]


def test_reasons_and_times_add_up(ledger: Ledger, connection: sa.Connection) -> None:
    """Every reason of every batch is counted once; every batch that ended has its time."""
    ours = [one for one in _batches(ledger) if one.job in NAMES and one.reasons]
    exact: Counter[str] = Counter()
    for one in ours:
        exact.update(json.loads(one.reasons or "{}"))

    reasons, reasons_cut = dashboard.reasons(connection, NAMES, SPAN)
    took, took_cut = dashboard.took(connection, NAMES, SPAN)

    assert sum(reasons.values(), Counter[str]()) == exact
    assert sum(one.batches for one in took) == len(ours)
    times = [one.ended_at - one.submitted_at for one in ours if one.ended_at and one.submitted_at]
    assert max(one.longest for one in took) == max(times)
    assert all(min(times) <= one.median <= one.longest for one in took)
    assert not reasons_cut
    assert not took_cut


def test_the_calendar_has_each_partition_once(ledger: Ledger, connection: sa.Connection) -> None:
    """Its state, rows, failures and cost; only the chosen jobs."""
    runs = {(run.job, run.interval_start.date()): run for run in ledger.runs() if run.job in NAMES}

    days, is_cut = dashboard.days(connection, NAMES, SPAN)

    assert {(one.job, one.day) for one in days} == set(runs)
    for one in days:
        run = runs[one.job, one.day]
        assert (one.rows, one.failed, bool(one.open)) == (run.rows, run.failed, run.state == "OPEN")
        assert one.dag_run_id == run.dag_run_id
        if run.state == "DONE":
            assert one.cost_usd == run.cost_usd
    assert not is_cut


def test_a_redrive_takes_its_rows_out_of_the_calendars_failures(ledger: Ledger) -> None:
    """What is left is the newest word; what both cost is added."""
    first = next(run for run in ledger.runs("job_00") if run.state == "DONE")
    again = {
        **vars(first),
        "run_id": "e" * 32,
        "mode": "redrive",
        "reused": first.rows - 7,
        "loaded": 5,
        "failed": 2,
        "cost_usd": Decimal("0.25"),
        "created_at": first.created_at + timedelta(days=1),
    }
    with ledger.engine.connect() as connection:
        connection.execute(
            sa.update(tables.run).where(tables.run.c.run_id == first.run_id).values(failed=7)
        )
        connection.execute(sa.insert(tables.run).values(again))
        days, _ = dashboard.days(connection, ["job_00"], SPAN)
        connection.rollback()

    (day,) = [one for one in days if one.day == first.interval_start.date()]
    assert (day.partitions, day.failed, day.state) == (1, 2, "failed")
    assert day.cost_usd == (first.cost_usd or 0) + Decimal("0.25")


def test_what_is_at_the_api_is_listed_and_summed(ledger: Ledger, connection: sa.Connection) -> None:
    """The list, longest without progress first, and the sums by connection."""
    ours = [one for one in _batches(ledger) if one.job in NAMES and one.state == "SUBMITTED"]

    listed = dashboard.in_flight(connection, NAMES)
    (load,) = dashboard.load(connection, NAMES)

    assert {one.submission_id for one in listed} == {one.submission_id for one in ours}
    moments = [one.progress_at for one in listed if one.progress_at]
    assert moments == sorted(moments)
    assert (load.state, load.batches) == ("SUBMITTED", len(ours))
    assert load.requests == sum(one.requests for one in ours)
    assert load.answered == sum(one.done_requests + one.failed_requests for one in ours)


def test_budgets_are_those_of_the_newest_run(connection: sa.Connection) -> None:
    """Read as JSON, so that a spec of another release breaks no page."""
    assert dashboard.budgets(connection, NAMES) == [
        dashboard.JobBudget(name, "gpt-5-mini", Decimal("2.5"), Decimal(60)) for name in NAMES
    ]


def test_a_run_adds_up_over_its_rounds(ledger: Ledger, connection: sa.Connection) -> None:
    """Sums, cost and reasons are those of its batches, done or at work."""
    for run in ledger.runs("job_00"):
        batches = ledger.batches(run.run_id)
        view = run_view.view(connection, run)
        (outline,) = run_view.outlines(connection, [run])

        assert view.batches == outline.batches == len(batches) == len(view.shards)
        for name in ("requests", "succeeded", "retry", "used_input_tokens"):
            assert view.total(name) == sum(getattr(one, name) for one in batches)
        assert view.cost_usd == outline.cost_usd == _cost(batches)
        assert view.progress == outline.progress
        assert view.at_api == sum(one.state == "SUBMITTED" for one in batches)


def _cost(batches: list[Batch]) -> Decimal:
    return sum((one.cost_usd for one in batches if one.cost_usd is not None), Decimal(0))


def test_a_live_run_counts_what_the_api_has_answered(
    ledger: Ledger, connection: sa.Connection
) -> None:
    """Before anything is collected: half of each batch, as the last poll said."""
    (run,) = [one for one in ledger.runs("job_00") if one.state == "OPEN"]

    progress = run_view.view(connection, run).progress

    assert (progress.done, progress.failed, progress.total) == (100, 0, 150)
    assert progress.percent == 66


def test_a_run_is_found_by_the_airflow_runs_that_work_on_it(tmp_path: Path) -> None:
    """One that joined shows the same run; one of another DAG with the same id shows nothing."""
    ledger = Ledger(sa.create_engine(f"sqlite:///{tmp_path}/ledger.db"))
    run = _opened(ledger, "first")
    _opened(ledger, "second")

    with ledger_database.reading(ledger.engine) as connection:
        found = [run_view.runs_of(connection, "a_dag", name) for name in ("first", "second")]
        foreign = run_view.runs_of(connection, "another", "first")

    assert [[one.run_id for one in runs] for runs in found] == [[run.run_id]] * 2
    assert foreign == []


def _opened(ledger: Ledger, dag_run_id: str) -> Run:
    from include.ledger_records import Partition

    start = datetime(2026, 11, 1, tzinfo=UTC)
    return ledger.open_run(
        Partition("a_job", start, start + timedelta(days=1)),
        spec_digest="0" * 64,
        spec="{}",
        mode="normal",
        dag_id="a_dag",
        dag_run_id=dag_run_id,
    )


def test_questions_do_not_grow_with_the_ledger(tmp_path: Path) -> None:
    """As many for 240 batches as for 24, each with a LIMIT or a sum."""
    asked = []
    for days in (2, 20):
        engine = sa.create_engine(f"sqlite:///{tmp_path}/{days}.db")
        fill(engine, Size(jobs=3, days=days, requests=9), today=TODAY)
        asked.append(_asked(engine))

    assert [one[0] for one in asked[0]] == [one[0] for one in asked[1]]
    for statement, _ in asked[1]:
        assert "LIMIT" in statement or "count(" in statement or "max(" in statement, statement


def _asked(engine: sa.Engine) -> list[tuple[str, Any]]:
    seen: list[tuple[str, Any]] = []

    def note(_conn: Any, _cursor: Any, statement: str, parameters: Any, *_rest: Any) -> None:
        if statement.startswith("SELECT"):
            seen.append((statement, parameters))

    sa.event.listen(engine, "before_cursor_execute", note)
    with ledger_database.reading(engine) as connection:
        names = [one.job for one in dashboard.jobs(connection)]
        dashboard.newest_day(connection, names)
        for question in (dashboard.days, dashboard.spent, dashboard.reasons, dashboard.took):
            question(connection, names, SPAN)
        for question_now in (dashboard.in_flight, dashboard.load, dashboard.budgets):
            question_now(connection, names)
    return seen


def test_a_span_moves_by_its_own_length() -> None:
    """Earlier and later, without a gap or an overlap."""
    earlier = SPAN.moved(-1)

    assert len(SPAN.days) == 35
    assert earlier.last == SPAN.first - timedelta(days=1)
    assert earlier.moved(1) == SPAN


def test_an_open_day_claims_nothing_loaded() -> None:
    """What a field of the calendar says of a partition that is not finished."""
    day = Day("job", date(2026, 11, 1), 1, 1, 63, 0, Decimal(0), "job", "run")

    assert day.told == "63 rows, not finished"
    assert replace(day, open=0, failed=3).told == "60 loaded, 3 failed of 63 rows"

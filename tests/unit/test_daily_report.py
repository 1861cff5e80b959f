"""The daily report: what the ledger says of a day, as a page and as text."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from include import daily_report_page as page
from include import ledger_tables
from include.alert_record import AlertRecord
from include.alerts import Alert, AlertKind
from include.daily_report import MOST, DailyReport, daily_report
from include.job_spec import JobSpec
from include.ledger import Ledger
from include.ledger_records import Batch, NewBatch, Partition, Run

HOSTILE = 'batch_<img src=x onerror="x()">\x1b[31m{{ 7 * 7 }}'
DAY = date(2026, 11, 20)
NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
MOMENTS = (
    (ledger_tables.run, "done_at"),
    (ledger_tables.batch, "submitted_at"),
    (ledger_tables.batch, "ended_at"),
    (ledger_tables.batch, "collected_at"),
    (ledger_tables.duplicate, "found_at"),
    (ledger_tables.alert, "raised_at"),
)
URL = "http://airflow.example/"


def spec(job: str) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": job,
            "source": {"conn_id": "s", "sql": "SELECT 1", "key": ["id"]},
            "request": {"endpoint": "/v1/responses", "model": "gpt-5-mini", "prompt": "{{ a }}"},
            "target": {"conn_id": "t", "table": "labels"},
            "budget": {"max_usd": 10, "max_usd_per_month": 5},
        }
    )


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Ledger:
    if request.param == "sqlite":
        return Ledger(sa.create_engine(f"sqlite:///{tmp_path}/ledger.db"))
    return Ledger(sa.create_engine(request.getfixturevalue("empty_postgres_url")))


def begun(
    ledger: Ledger, job: str, *, day: int = 1, batch_id: str | None = None, dag_id: str = ""
) -> Run:
    """A run with one batch at the API."""
    start = datetime(2026, 11, day, tzinfo=UTC)
    run = ledger.open_run(
        Partition(job, start, start + timedelta(days=1)),
        spec_digest=spec(job).digest,
        spec=spec(job).to_json(),
        mode="normal",
        dag_id=dag_id or job,
        dag_run_id=f"scheduled__{day}+00:00",
    )
    new = NewBatch(run.run_id, job, 1, 0, "openai_default", "/v1/responses", "gpt-5-mini", "f", "i",
                   "d" * 64, 100, 100, 50)  # fmt: skip
    (built,) = ledger.build_round(run.run_id, 1, [new])
    claim = ledger.claim(
        built.submission_id, owner="o", lease=timedelta(minutes=2), enqueued_tokens=None
    )
    assert claim is not None
    ledger.submitted(claim.batch, batch_id or f"batch_{job}_{day}", "in_progress")
    return run


def finished(ledger: Ledger, run: Run, *, failed: int = 0, **counts: Any) -> Batch:
    (batch,) = ledger.batches(run.run_id)
    ledger.ended(batch, api_status="completed", done=100, failed=0)
    ledger.collected(
        batch,
        reasons={"invalid_request": failed},
        succeeded=100 - failed,
        failed=failed,
        cost_usd=Decimal("1.25"),
        **counts,
    )
    ledger.count_run(run.run_id, rows=100)
    ledger.finish_run(run.run_id, loaded=100 - failed, failed=failed, cost_usd=Decimal("1.25"))
    return ledger.batch(batch.submission_id)


def made(ledger: Ledger, day: date = DAY) -> DailyReport:
    """The report of a day; all that the test has done so far happened at noon of DAY."""
    with ledger.engine.begin() as connection:
        for table, name in MOMENTS:
            happened = sa.update(table).where(table.c[name].is_not(None))
            connection.execute(happened.values({name: NOON}))
    return daily_report(ledger.engine, day)


def test_an_empty_ledger_gives_an_empty_page(ledger: Ledger) -> None:
    """Nothing happened: the page and the text say so."""
    report = made(ledger)

    assert report.jobs == ()
    assert report.needs_a_person == ()
    assert "Nothing was finished or collected." in page.html(report, URL)
    assert "WHAT NEEDS A PERSON\nNothing." in page.text(report, URL)


def test_the_figures_are_the_ledgers(ledger: Ledger) -> None:
    """Volumes, reasons and money of the day, by job; another day has none of them."""
    finished(ledger, begun(ledger, "notes", day=1), failed=4)
    finished(ledger, begun(ledger, "notes", day=2))
    finished(ledger, begun(ledger, "texts"))

    report = made(ledger)

    notes, texts = report.jobs
    assert (notes.job, notes.runs, notes.rows, notes.loaded, notes.failed) == (
        "notes", 2, 200, 196, 4,
    )  # fmt: skip
    assert (notes.cost_usd, notes.largest_run_usd, notes.budget_usd) == (
        Decimal("2.5"), Decimal("1.25"), Decimal(10),
    )  # fmt: skip
    assert (notes.month_usd, notes.month_budget_usd) == (Decimal("2.5"), Decimal(5))
    assert texts.requests == 100
    assert dict(report.reasons) == {"invalid_request": 4}
    assert report.money[-1] == (DAY, Decimal("3.75"))
    assert report.cost_usd == Decimal("3.75")
    assert made(ledger, DAY - timedelta(days=1)).jobs == ()


def test_what_needs_a_person_is_listed_with_a_link(ledger: Ledger) -> None:
    """Failed rows, a run that stands still, a duplicate, quarantine and an alert untold."""
    batch = finished(ledger, begun(ledger, "notes"), failed=4, quarantined=3)
    still = begun(ledger, "stands_still")
    ledger.record_duplicate("batch_2", kept=batch, api_status="completed", done=7, cost=None)
    alert = Alert(AlertKind.BUDGET, "c", "notes", batch.run_id, "the subject", (), "")
    record = AlertRecord(ledger.engine)
    record.claim(alert, "0 SlackNotifier")
    record.failed(alert, "0 SlackNotifier", "OSError")
    long_ago = (datetime.now(UTC) - timedelta(hours=5)).replace(tzinfo=None)
    with ledger.engine.begin() as connection:
        connection.execute(
            sa.text("UPDATE llm_batch_batch SET progress_at = :at, intent_at = :at "
                    "WHERE run_id = :run"),
            {"at": f"{long_ago:%Y-%m-%d %H:%M:%S.%f}", "run": still.run_id},
        )  # fmt: skip

    report = made(ledger)
    text = page.text(report, URL)

    assert [title for title, _, _ in report.needs_a_person] == [
        "Open runs that stand still",
        "Failed rows to redrive",
        "Batches that were made twice",
        "Lines in quarantine",
        "Alerts",
    ]
    assert [one.job for one in report.standing.shown] == ["stands_still"]
    assert "4 of 100 rows failed" in text
    assert "http://airflow.example/dags/notes/runs/scheduled__1+00:00" in text
    assert "could not be told to SlackNotifier" in text


def test_what_needs_a_person_comes_before_the_figures_of_jobs(ledger: Ledger) -> None:
    """The one part that somebody has to read is first, on the page and in the text."""
    finished(ledger, begun(ledger, "notes"), failed=4)
    report = made(ledger)
    html, text = page.html(report, URL), page.text(report, URL)

    assert html.index("What needs a person") < html.index("By job")
    assert text.index("WHAT NEEDS A PERSON") < text.index("BY JOB")
    assert "this month $1.25 of $5.00" in text


def test_a_month_with_an_unknown_price_is_unknown(ledger: Ledger) -> None:
    """What cannot be added up is not called a sum."""
    finished(ledger, begun(ledger, "notes", day=1))
    batch = finished(ledger, begun(ledger, "notes", day=2))
    with ledger.engine.begin() as connection:
        connection.execute(
            sa.update(ledger_tables.batch)
            .where(ledger_tables.batch.c.batch_id == batch.batch_id)
            .values(cost_usd=None)
        )

    (notes,) = made(ledger).jobs

    assert notes.month_usd is None
    assert "this month unknown of $5.00" in page.text(made(ledger), URL)


def test_rows_that_were_redriven_need_nobody(ledger: Ledger) -> None:
    """A redrive that is done takes the partition off the list."""
    run = begun(ledger, "notes")
    finished(ledger, run, failed=4)
    again = ledger.open_run(
        Partition(run.job, run.interval_start, run.interval_end),
        spec_digest=run.spec_digest,
        spec=run.spec,
        mode="redrive",
        dag_id="notes",
        dag_run_id="again",
    )
    before = made(ledger).to_redrive.total
    ledger.finish_run(again.run_id, loaded=4, failed=0)

    assert before == 1
    assert made(ledger).to_redrive.total == 0


def test_rows_that_a_new_prompt_has_done_again_need_nobody(ledger: Ledger) -> None:
    """Nor do requests of the queue: nobody can redrive them."""
    run = begun(ledger, "notes")
    finished(ledger, run, failed=4)
    again = ledger.open_run(
        Partition(run.job, run.interval_start, run.interval_end),
        spec_digest="e" * 64,
        spec=run.spec,
        mode="normal",
        dag_id="notes",
        dag_run_id="again",
    )
    ledger.finish_run(again.run_id, loaded=100, failed=0)
    requests = begun(ledger, "requests")
    finished(ledger, requests, failed=4)
    with ledger.engine.begin() as connection:
        request = {"request_id": "a", "state": "failed", "run_id": requests.run_id}
        connection.execute(sa.insert(ledger_tables.queue).values(request))

    assert made(ledger).to_redrive.total == 0


def test_a_job_of_two_dags_is_counted_once(ledger: Ledger) -> None:
    """Its operators are in a DAG of one's own since: one line, and the money is not doubled."""
    finished(ledger, begun(ledger, "notes", day=1))
    finished(ledger, begun(ledger, "notes", day=2, dag_id="my_notes"))

    report = made(ledger)

    assert [one.job for one in report.jobs] == ["notes"]
    assert report.cost_usd == Decimal("2.5")
    assert report.total("rows") == 200


def test_long_lists_are_cut_and_say_so(ledger: Ledger) -> None:
    """No list is longer than its bound; the count is of all."""
    for day in range(1, MOST + 4):
        finished(ledger, begun(ledger, "notes", day=day), failed=1)

    report = made(ledger)

    assert len(report.to_redrive.shown) == MOST
    assert report.to_redrive.total == MOST + 3
    assert f"{MOST} of {MOST + 3} are listed" in page.html(report, URL)


class Tags(HTMLParser):
    """The elements of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.addresses += [str(value) for name, value in attrs if name in {"src", "href"}]


def test_what_comes_from_outside_is_text(ledger: Ledger) -> None:
    """A batch id with markup, control characters and a template stays text in both forms."""
    finished(ledger, begun(ledger, "notes", batch_id=HOSTILE), failed=1, quarantined=1)
    report = made(ledger)
    tags = Tags()
    html, text = page.html(report, URL), page.text(report, URL)
    tags.feed(html)

    assert "img" not in tags.names
    assert "script" not in tags.names
    assert {address.split("/dags")[0] for address in tags.addresses} == {URL.rstrip("/")}
    assert "\x1b" not in html + text
    assert "{{ 7 * 7 }}" in text

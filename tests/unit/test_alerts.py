"""What somebody is told about a run, and that nobody is told twice."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from include import alerts, spend_limits
from include import ledger_tables as tables
from include.alert_record import MOST_TRIES, AlertRecord
from include.alerts import Alert, AlertKind
from include.budgets import record_round
from include.job_spec import JobSpec
from include.ledger import Ledger
from include.ledger_records import Batch, NewBatch, Partition, Run
from include.spend_limits import SpendLimit

START = datetime(2026, 11, 1, tzinfo=UTC)
WINDOW = timedelta(hours=26)
MakeLedger = Callable[[], Ledger]


def spec(**changes: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "notes",
            "source": {"conn_id": "s", "sql": "SELECT 1", "key": ["id"]},
            "request": {"endpoint": "/v1/responses", "model": "gpt-5-mini", "prompt": "{{ a }}"},
            "target": {"conn_id": "t", "table": "labels"},
            **changes,
        }
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(sa.create_engine(f"sqlite:///{tmp_path}/ledger.db"))


def opened(ledger: Ledger, job: JobSpec, *, day: int = 0) -> Run:
    start = START + timedelta(days=day)
    return ledger.open_run(
        Partition("notes", start, start + timedelta(days=1)),
        spec_digest=job.digest,
        spec=job.to_json(),
        mode="normal",
        dag_id="notes",
        dag_run_id="one",
    )


def shard_of(run: Run, shard: int) -> NewBatch:
    return NewBatch(
        run.run_id, "notes", 1, shard, "openai_default", "/v1/responses", "gpt-5-mini",
        "f", "i", "d" * 64, 10, 100, 50,
    )  # fmt: skip


def collected(ledger: Ledger, run: Run, cost: Decimal) -> None:
    """One batch of this run that has cost this."""
    (batch,) = ledger.build_round(run.run_id, 1, [shard_of(run, 0)])
    with ledger.engine.begin() as connection:
        connection.execute(
            sa.update(tables.batch)
            .where(tables.batch.c.submission_id == batch.submission_id)
            .values(state="COLLECTED", collected_at=datetime.now(UTC), cost_usd=cost)
        )


def submitted(ledger: Ledger, run: Run, *, shards: int = 1, age: timedelta = WINDOW) -> list[Batch]:
    """Batches of round 1 that the API has had for `age`."""
    new = [shard_of(run, shard) for shard in range(shards)]
    for one in ledger.build_round(run.run_id, 1, new):
        claim = ledger.claim(
            one.submission_id, owner="o", lease=timedelta(minutes=2), enqueued_tokens=None
        )
        assert claim is not None
        ledger.submitted(claim.batch, f"batch_{one.shard}", "in_progress")
    with ledger.engine.begin() as connection:
        connection.execute(
            sa.text("UPDATE llm_batch_batch SET submitted_at = :at"),
            {"at": (datetime.now(UTC) - age).strftime("%Y-%m-%d %H:%M:%S.%f")},
        )
    return ledger.batches(run.run_id)


def test_a_done_run_with_too_many_failures_is_told(ledger: Ledger) -> None:
    """The message has job, partition, figures and the way out; an open run is not told yet."""
    run = opened(ledger, spec(alert={"failure_rate": 0.02}))
    before = list(alerts.of_run(run.run_id, ledger))
    ledger.finish_run(run.run_id, loaded=90, failed=10, cost_usd=Decimal("1.25"))

    (alert,) = alerts.of_run(run.run_id, ledger)

    assert before == []
    assert alert.kind == AlertKind.FAILURE_RATE
    for part in ("notes", "2026-11-01 00:00", "10 of 100", "2.0%", "$1.25", "redrive=true"):
        assert part in alert.text


@pytest.mark.parametrize(
    ("estimate", "told"), [("7.9", []), ("8", ["80%"]), ("10", ["100%"]), ("11", ["110%"])]
)
def test_a_run_near_or_over_its_budget_is_told(
    ledger: Ledger, estimate: str, told: list[str]
) -> None:
    """From `alert.budget_share` of the budget on, with both amounts."""
    run = opened(ledger, spec(budget={"max_usd": 10}))
    ledger.count_run(run.run_id, estimate_usd=Decimal(estimate))

    found = list(alerts.of_run(run.run_id, ledger))

    assert [share for one in found for share in told if share in one.subject] == told
    assert len(found) == len(told)
    assert all("$10.0000" in one.text for one in found)


def test_a_run_that_goes_from_near_to_over_is_told_twice(ledger: Ledger) -> None:
    """Near and over are two causes; more of the same is not."""
    run = opened(ledger, spec(budget={"max_usd": 10}))
    causes = []
    for estimate in ("8", "9", "11", "12"):
        ledger.count_run(run.run_id, estimate_usd=Decimal(estimate))
        causes += [one.cause for one in alerts.of_run(run.run_id, ledger)]

    assert len(causes) == 4
    assert len(set(causes)) == 2


def of_month(ledger: Ledger, run: Run) -> list[Alert]:
    return [one for one in alerts.of_run(run.run_id, ledger) if "max_usd_per_month" in one.text]


def test_a_month_near_its_budget_is_told_once_for_all_of_its_runs(ledger: Ledger) -> None:
    """From `alert.budget_share` of the month on; what earlier runs have spent counts."""
    job = spec(budget={"max_usd_per_month": 10})
    first, second = opened(ledger, job), opened(ledger, job, day=1)
    collected(ledger, first, Decimal("7.9"))
    before = of_month(ledger, first)
    collected(ledger, second, Decimal("0.2"))

    found = of_month(ledger, first) + of_month(ledger, second)

    assert before == []
    assert len(found) == 2
    assert len({one.cause for one in found}) == 1
    for part in ("81%", f"{datetime.now(UTC):%Y-%m}", "spent: $8.1000", "$10.0000 a month"):
        assert part in found[0].text


def test_a_run_that_does_not_fit_into_its_month_is_told(ledger: Ledger) -> None:
    """What is over is the estimate of a run that was refused: another cause than near."""
    job = spec(budget={"max_usd_per_month": 10})
    first, refused = opened(ledger, job), opened(ledger, job, day=1)
    collected(ledger, first, Decimal("8.5"))
    ledger.count_run(refused.run_id, estimate_usd=Decimal(2))

    (near,), (over,) = of_month(ledger, first), of_month(ledger, refused)

    assert near.cause != over.cause
    assert "105%" in over.subject
    assert "not begun: $2.0000" in over.text
    assert "do not begin" in over.todo


def test_a_round_that_does_not_fit_into_the_month_is_told(ledger: Ledger) -> None:
    """It is left out, and its rows fail: told as over, with its estimate, until it is built."""
    job = spec(budget={"max_usd_per_month": 10})
    run = opened(ledger, job)
    collected(ledger, run, Decimal("8.5"))
    (near,) = of_month(ledger, run)
    second = replace(shard_of(run, 1), round=2, estimate_usd=Decimal(2))

    for _ in range(2):  # the task is tried again
        assert record_round(run, 2, [second], ledger, job.budget) == []
    (over,) = of_month(ledger, run)
    left_out = [one for one in ledger.history(run.run_id) if one["became"] == "LEFT_OUT"]
    ledger.build_round(run.run_id, 2, [replace(second, estimate_usd=Decimal(1))])
    (after,) = of_month(ledger, run)

    assert near.cause != over.cause
    assert "105%" in over.subject
    assert "not begun: $2.0000 (estimate of a round that is left out)" in over.text
    assert "left out" in over.todo
    assert len(left_out) == 1
    assert after.cause == near.cause


def test_a_round_that_another_budget_leaves_out_is_not_told_of_the_month(ledger: Ledger) -> None:
    """The month has room for it: it is not what is over."""
    job = spec(budget={"max_usd": 8, "max_usd_per_month": 100})
    run = opened(ledger, job)
    collected(ledger, run, Decimal("7.5"))
    second = replace(shard_of(run, 1), round=2, estimate_usd=Decimal(2))

    assert record_round(run, 2, [second], ledger, job.budget) == []

    assert of_month(ledger, run) == []


def run_with_a_round_left_out(
    ledger: Ledger, job: JobSpec, *, limit: SpendLimit | None = None
) -> Run:
    """A run that has spent $7.50, and whose second round of $2 did not fit."""
    run = opened(ledger, job)
    if limit is not None:
        spend_limits.join(ledger, run, limit)
    collected(ledger, run, Decimal("7.5"))
    with ledger.engine.begin() as connection:
        connection.execute(sa.update(tables.batch).values(retry=3, succeeded=7))
    ledger.settle_round(run.run_id, 1)
    second = replace(shard_of(run, 1), round=2, estimate_usd=Decimal(2))
    assert record_round(run, 2, [second], ledger, job.budget) == []
    return run


def test_a_round_that_the_budget_of_the_run_leaves_out_is_told(ledger: Ledger) -> None:
    """With its rows, the money and the way out; a cause of its own beside near and over."""
    run = run_with_a_round_left_out(ledger, spec(budget={"max_usd": 8}))

    (alert,) = alerts.of_run(run.run_id, ledger)

    assert alert.kind == AlertKind.BUDGET
    assert "round 2 is left out, 3 rows fail" in alert.subject
    for part in ("left out: $2.0000", "spent so far: $7.5000", "$8.0000 a run"):
        assert part in alert.text
    for part in ("labels_failures", "over_budget", "redrive=true"):
        assert part in alert.todo
    ledger.build_round(run.run_id, 2, [replace(shard_of(run, 1), round=2)])
    (near,) = alerts.of_run(run.run_id, ledger)
    assert near.cause != alert.cause


def test_a_round_that_the_month_leaves_out_is_not_told_of_the_run(ledger: Ledger) -> None:
    """Nor does a job say anything that wants no alerts of money."""
    month = spec(budget={"max_usd": 100, "max_usd_per_month": 8})
    silent = spec(budget={"max_usd": 8}, alert={"budget_share": None})

    run = run_with_a_round_left_out(ledger, month)
    assert [one for one in alerts.of_run(run.run_id, ledger) if "a run (" in one.text] == []
    with ledger.engine.begin() as connection:
        connection.execute(sa.update(tables.run).values(spec=silent.to_json()))

    assert list(alerts.of_run(run.run_id, ledger)) == []


def test_a_round_that_a_spend_limit_leaves_out_is_told(ledger: Ledger) -> None:
    """With its rows, the money of all runs of the limit and the way out."""
    run = run_with_a_round_left_out(ledger, spec(), limit=SpendLimit("a backfill", Decimal(8)))

    (alert,) = alerts.of_run(run.run_id, ledger)

    assert alert.kind == AlertKind.BUDGET
    assert "round 2 is left out, 3 rows fail" in alert.subject
    for part in ("left out: $2.0000", "spent: $7.5000", "$8.0000 for all runs of a backfill"):
        assert part in alert.text
    for part in ("labels_failures", "over_budget", "redrive=true", "max_usd"):
        assert part in alert.todo


def test_a_round_that_another_bound_leaves_out_is_not_told_of_the_limit(ledger: Ledger) -> None:
    """Nor does a job say anything of a limit that wants no alerts of money."""
    wide = SpendLimit("a backfill", Decimal(80))
    run = run_with_a_round_left_out(ledger, spec(budget={"max_usd": 8}), limit=wide)
    (alert,) = alerts.of_run(run.run_id, ledger)
    assert "a run (budget.max_usd)" in alert.text
    silent = spec(alert={"budget_share": None})
    with ledger.engine.begin() as connection:
        connection.execute(sa.update(tables.run).values(spec=silent.to_json()))
        connection.execute(sa.update(tables.spend_limit).values(max_usd=Decimal(8)))

    assert list(alerts.of_run(run.run_id, ledger)) == []


def test_an_alert_of_the_month_can_be_never(ledger: Ledger) -> None:
    """Neither without a budget for the month nor with `budget_share: null`."""
    for more in ({}, {"budget": {"max_usd_per_month": 10}, "alert": {"budget_share": None}}):
        run = opened(ledger, spec(**more), day=len(more))
        collected(ledger, run, Decimal(9))

        assert of_month(ledger, run) == []


def test_a_late_batch_is_told_once_a_round(ledger: Ledger) -> None:
    """All late batches of a round are one cause; one that is in time says nothing."""
    run = opened(ledger, spec(alert={"late_share": 0.5}))
    batches = submitted(ledger, run, shards=3, age=timedelta(hours=14))

    found = [alert for one in batches for alert in alerts.of_waiting(one, ledger, WINDOW)]
    in_time = list(alerts.of_waiting(batches[0], ledger, timedelta(hours=30)))

    assert len({one.cause for one in found}) == 1
    assert "3 of 3 batches of round 1 are late (14.0 h of 26.0 h)" in found[0].subject
    assert "batch_0" in found[0].text
    assert in_time == []


def test_late_can_be_never(ledger: Ledger) -> None:
    """`late_share: null` wakes nobody."""
    run = opened(ledger, spec(alert={"late_share": None}))
    (batch,) = submitted(ledger, run)

    assert list(alerts.of_waiting(batch, ledger, WINDOW)) == []


def test_a_batch_that_was_made_twice_is_told(ledger: Ledger) -> None:
    """Each second batch is a cause; one that the API refused cost nothing and is none."""
    run = opened(ledger, spec())
    (kept,) = submitted(ledger, run)
    for name, status in (("batch_x", "completed"), ("batch_y", "failed")):
        ledger.record_duplicate(name, kept=kept, api_status=status, done=7, cost=None)

    (alert,) = alerts.of_submission(kept, ledger)

    assert [one.cause for one in alerts.of_run(run.run_id, ledger)] == [alert.cause]
    assert "7 requests" in alert.subject
    assert "batch_x" in alert.text
    assert "batch_0" in alert.text


def test_html_of_an_alert_is_escaped() -> None:
    """Whatever a value holds, it is text in the mail."""
    alert = Alert(AlertKind.BUDGET, "c", "<b>", "r", "s<script>", (("x", "<img>"),), "a & b")

    assert "<script>" not in alert.html
    assert "<img>" not in alert.html
    assert "a &amp; b" in alert.html


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def record(request: pytest.FixtureRequest, tmp_path: Path) -> AlertRecord:
    url = f"sqlite:///{tmp_path}/ledger.db"
    if request.param == "postgres":
        url = request.getfixturevalue("empty_postgres_url")
    return AlertRecord(Ledger(sa.create_engine(url)).engine)


def an_alert(cause: str) -> Alert:
    return Alert(AlertKind.BUDGET, cause, "notes", "r", "subject", (), "nothing")


def test_many_tasks_tell_a_channel_once(record: AlertRecord) -> None:
    """Whoever claims first tells; other channels and other causes are told as well."""
    alert = an_alert("many")
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda _: record.claim(alert, "mail"), range(16)))

    assert claimed.count(True) == 1
    assert record.claim(alert, "chat")
    assert record.claim(an_alert("many more"), "mail")


def test_a_delivery_that_failed_is_tried_again_a_few_times(record: AlertRecord) -> None:
    """Only a certain failure opens the claim again, and not for ever."""
    alert = an_alert("failing")
    tries = 0
    while record.claim(alert, "mail"):
        assert not record.claim(alert, "mail")
        record.failed(alert, "mail", "ConnectionRefusedError")
        tries += 1

    assert tries == MOST_TRIES


def test_what_was_delivered_is_not_told_again(record: AlertRecord) -> None:
    """After a delivery there is nothing to claim."""
    alert = an_alert("delivered")
    assert record.claim(alert, "mail")
    record.delivered(alert, "mail")

    assert not record.claim(alert, "mail")

"""What goes to Airflow's metrics (StatsD, OpenTelemetry); `docs/signals.md` lists all of it.

Names are fixed; tags are the job, and what the table of the page says: nothing per row or run.
A step that finds its work done counts nothing.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from airflow.sdk.observability.stats import Stats

if TYPE_CHECKING:
    from include.alerts import Alert
    from include.ledger import Ledger
    from include.ledger_records import Batch, Run
    from include.report import RunReport

MICRO = 1_000_000  # micro-dollars in a dollar: counters are whole numbers


def alert(raised: Alert) -> None:
    """Count an alert, once for each cause."""
    Stats.incr("llm_batch.alerts", tags={"job": raised.job, "kind": str(raised.kind)})


def submitted(batch: Batch) -> None:
    """Count a batch that the API has got, and its requests; later rounds are the retries."""
    tags = {**_tags(batch), "round": str(batch.round)}
    Stats.incr("llm_batch.batches.submitted", tags=tags)
    Stats.incr("llm_batch.requests.submitted", batch.requests, tags=tags)


def collected(batch: Batch) -> None:
    """Count what became of a batch: outcomes, tokens, money, and how long the API took."""
    tags = _tags(batch)
    Stats.incr("llm_batch.batches.collected", tags={**tags, "status": batch.api_status or "none"})
    for outcome in ("succeeded", "retry", "failed", "missing", "quarantined"):
        _count("llm_batch.requests.outcomes", getattr(batch, outcome), {**tags, "outcome": outcome})
    for kind in ("input", "cached", "output", "reasoning"):
        _count("llm_batch.tokens", getattr(batch, f"used_{kind}_tokens"), {**tags, "kind": kind})
    if batch.cost_usd is not None:
        _count("llm_batch.cost_microusd", round(batch.cost_usd * MICRO), tags)
    if batch.submitted_at is not None and batch.ended_at is not None:
        Stats.timing("llm_batch.batch.duration", batch.ended_at - batch.submitted_at, tags=tags)


def in_flight(batch: Batch, ledger: Ledger) -> None:
    """Gauge what the API works on for this batch's job and connection."""
    from include import dashboard, ledger_database

    with ledger_database.reading(ledger.engine) as connection:
        loads = dashboard.load(connection, [batch.job])
    found: Counter[str] = Counter()
    for one in loads:
        if one.conn_id == batch.conn_id and one.state in dashboard.WORKING:
            found.update(batches=one.batches, requests=one.requests)
    tags = {"job": batch.job, "conn_id": batch.conn_id}
    Stats.gauge("llm_batch.in_flight.batches", found["batches"], tags=tags)
    Stats.gauge("llm_batch.in_flight.requests", found["requests"], tags=tags)


def reported(run: Run, report: RunReport) -> None:
    """Gauge what a run came to, and how long it took from its first task on."""
    tags = {"job": run.job}
    for name, value in report.metrics().items():
        Stats.gauge(f"llm_batch.run.{name}", value, tags=tags)
    if run.done_at is not None:
        Stats.timing("llm_batch.run.duration", run.done_at - run.created_at, tags=tags)


def _count(name: str, value: int, tags: dict[str, str]) -> None:
    if value:
        Stats.incr(name, value, tags=tags)


def _tags(batch: Batch) -> dict[str, str]:
    return {"job": batch.job, "model": batch.model}

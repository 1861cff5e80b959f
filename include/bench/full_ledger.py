"""A ledger with years of work in it, made without doing any: for measuring pages, and their tests.

Ten jobs of a day each: a first round of three shards, and a second one for what was open. The last
day of every job is at work.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from include import ledger_database
from include import ledger_tables as tables
from include.ledger import Ledger
from include.ledger_records import digest

SHARDS = (3, 1)  # batches in round 1 and 2
DAY = timedelta(days=1)
SPEC = {
    "budget": {"max_usd": "2.5", "max_usd_per_month": 60},
    "request": {"model": "gpt-5-mini", "endpoint": "/v1/responses"},
}


@dataclass(frozen=True)
class Size:
    """How much is in the ledger; `requests` of one batch."""

    jobs: int = 10
    days: int = 125
    requests: int = 200

    @property
    def batches(self) -> int:
        """All of them."""
        return self.jobs * self.days * sum(SHARDS)


def fill(engine: sa.Engine, size: Size, *, today: datetime | None = None, seed: int = 7) -> Ledger:
    """Fill an empty ledger up to yesterday, and return it."""
    ledger = Ledger(engine)
    last = (today or datetime.now(UTC)).replace(hour=0, minute=0, second=0, microsecond=0)
    dice = random.Random(seed)  # noqa: S311  # the same ledger every time
    with ledger_database.writing(engine) as connection:
        for number in range(size.jobs):
            for back in range(size.days, 0, -1):
                partition = _Partition(f"job_{number:02d}", last - back * DAY, size, back == 1)
                _insert(connection, partition, dice)
    return ledger


@dataclass(frozen=True)
class _Partition:
    job: str
    start: datetime
    size: Size
    is_open: bool

    @property
    def run_id(self) -> str:
        return digest(self.job, self.start.isoformat())


def _insert(connection: sa.Connection, partition: _Partition, dice: random.Random) -> None:
    rows = partition.size.requests * SHARDS[0]
    failed = dice.choice((0, 0, 0, 1, 7))
    batches = list(_batches(partition, dice))
    connection.execute(
        sa.insert(tables.run).values(
            run_id=partition.run_id,
            job=partition.job,
            interval_start=partition.start,
            interval_end=partition.start + DAY,
            spec_digest="0" * 64,
            mode="normal",
            generation=1,
            state="OPEN" if partition.is_open else "DONE",
            spec=json.dumps({"name": partition.job, **SPEC}),
            dag_id=partition.job,
            dag_run_id=f"scheduled__{partition.start.isoformat()}",
            rows=rows,
            loaded=0 if partition.is_open else rows - failed,
            failed=0 if partition.is_open else failed,
            estimate_usd=Decimal("1.5"),
            cost_usd=None if partition.is_open else sum(one["cost_usd"] for one in batches),
            created_at=partition.start + DAY,
            done_at=None if partition.is_open else partition.start + 1.2 * DAY,
        )
    )
    rounds = {one["round"]: one["built_at"] for one in batches}
    connection.execute(
        sa.insert(tables.round_),
        [
            {
                "run_id": partition.run_id,
                "round": number,
                "state": "BUILT" if partition.is_open else "SETTLED",
                "requests": partition.size.requests * SHARDS[number - 1],
                "built_at": at,
            }
            for number, at in rounds.items()
        ],
    )
    for one in batches:
        del one["built_at"]
    connection.execute(sa.insert(tables.batch), batches)


def _batches(partition: _Partition, dice: random.Random) -> Iterator[dict[str, Any]]:
    for number, shards in enumerate(SHARDS, start=1):
        for shard in range(shards):
            yield _batch(partition, number, shard, dice)


def _batch(partition: _Partition, number: int, shard: int, dice: random.Random) -> dict[str, Any]:
    requests = partition.size.requests
    name = digest(partition.run_id, number, shard)
    begun = partition.start + DAY + timedelta(hours=number)
    ended = begun + timedelta(minutes=dice.randint(20, 600))
    bad = {"rate_limited": dice.randint(0, 9), "schema_invalid": dice.randint(0, 4)}
    retry = sum(bad.values())
    return {
        "submission_id": name,
        "run_id": partition.run_id,
        "job": partition.job,
        "round": number,
        "shard": shard,
        "state": "SUBMITTED" if partition.is_open else "COLLECTED",
        "conn_id": "openai_default",
        "endpoint": "/v1/responses",
        "model": "gpt-5-mini",
        "request_file": f"{partition.job}/{name}.jsonl",
        "content_digest": name,
        "requests": requests,
        "bytes": requests * 900,
        "input_tokens": requests * 220,
        "first_intent_at": begun,
        "batch_id": f"batch_{name}",
        "submitted_at": begun,
        "api_status": "in_progress" if partition.is_open else "completed",
        "done_requests": requests // 2 if partition.is_open else requests - retry,
        "failed_requests": 0 if partition.is_open else retry,
        "progress_at": begun,
        "ended_at": None if partition.is_open else ended,
        "collected_at": None if partition.is_open else ended + timedelta(minutes=2),
        "succeeded": 0 if partition.is_open else requests - retry,
        "retry": 0 if partition.is_open else retry,
        "reasons": None if partition.is_open else json.dumps({k: v for k, v in bad.items() if v}),
        "used_input_tokens": requests * 210,
        "used_output_tokens": requests * 60,
        "cost_usd": None
        if partition.is_open
        else Decimal(dice.randint(100_000, 900_000)) / 1_000_000,
        "built_at": begun,
    }

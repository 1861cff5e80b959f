"""One run as its page shows it: rounds, shards, money, problems, and what comes next."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, RowMapping

from include import batch_status
from include import ledger_tables as tables
from include.cost import known_total
from include.ledger_records import Batch, BatchState, Round, Run, RunState
from include.ledger_sums import money_sum

MOST_SHARDS = 200  # that are listed, those at work first
MOST_GENERATIONS = 20  # runs of the ledger that one Airflow run may have begun
MOST_REASONS = 2_000
STILL = timedelta(hours=2)  # without progress, after which a batch is worth a look
ORDER = (
    BatchState.SUBMITTED,
    BatchState.SUBMITTING,
    BatchState.PREPARED,
    BatchState.ENDED,
    BatchState.COLLECTED,
)
SUMS = (
    "requests",
    "succeeded",
    "retry",
    "failed",
    "missing",
    "quarantined",
    "duplicates",
    "done_requests",
    "failed_requests",
    "used_input_tokens",
    "used_cached_tokens",
    "used_output_tokens",
    "used_reasoning_tokens",
)


@dataclass(frozen=True)
class Progress:
    """Requests that are answered well, answered badly, and in all.

    `again` are answers that were no good, but may be in the next round.
    """

    done: int
    failed: int
    total: int
    again: int = 0

    @property
    def open(self) -> int:
        """Requests without an answer."""
        return max(self.total - self.done - self.failed - self.again, 0)

    @property
    def percent(self) -> int:
        """The answered share, rounded down, so that 100 means all."""
        return 100 * (self.total - self.open) // self.total if self.total else 0


def of_batch(batch: Batch) -> Progress:
    """Return how far a batch is: by its outcomes when they are collected, else by the API."""
    if batch.state == BatchState.COLLECTED:
        return Progress(batch.succeeded, batch.failed, batch.requests, batch.retry)
    return Progress(batch.done_requests, batch.failed_requests, batch.requests)


@dataclass(frozen=True)
class RoundView:
    """One round, added up over its shards."""

    number: int
    state: str
    batches: int
    states: dict[str, int]
    sums: dict[str, int]
    cost_usd: Decimal | None  #: of what is collected; None when a price is unknown
    reasons: Counter[str]
    built_at: datetime
    settled_at: datetime | None

    @property
    def progress(self) -> Progress:
        """How far the round is."""
        sums = self.sums
        return Progress(
            sums["succeeded"] + sums["waiting_done"],
            sums["failed"] + sums["waiting_failed"],
            sums["requests"],
            sums["retry"],
        )


@dataclass(frozen=True)
class RunView:
    """One run of the ledger, whole."""

    run: Run
    rounds: list[RoundView]
    shards: list[Batch]
    duplicates: int
    generations: list[Run] = field(default_factory=list)

    @property
    def batches(self) -> int:
        """How many batches the run has, listed or not."""
        return sum(one.batches for one in self.rounds)

    def total(self, name: str) -> int:
        """Return a sum over all rounds."""
        return sum(one.sums[name] for one in self.rounds)

    @property
    def cost_usd(self) -> Decimal | None:
        """What the collected batches have cost so far."""
        return known_total(one.cost_usd for one in self.rounds)

    @property
    def is_done(self) -> bool:
        """Whether every row has ended."""
        return self.run.state == RunState.DONE

    @property
    def is_open(self) -> bool:
        """Whether somebody may still go on with it."""
        return self.run.state == RunState.OPEN

    @property
    def progress(self) -> Progress:
        """How many rows have ended, as far as can be told before the load."""
        run = self.run
        if self.is_done:
            return Progress(run.loaded + run.reused, run.failed, run.rows)
        done = run.reused + self.total("succeeded") + self.total("waiting_done")
        return Progress(min(done, run.rows), run.rejected + self.total("failed"), run.rows)

    @property
    def reasons(self) -> Counter[str]:
        """Why answers were no good, over all rounds."""
        total: Counter[str] = Counter()
        for one in self.rounds:
            total.update(one.reasons)
        return total

    @property
    def at_api(self) -> int:
        """How many batches the API works on."""
        return sum(one.states.get(BatchState.SUBMITTED, 0) for one in self.rounds)


@dataclass(frozen=True)
class RunOutline:
    """One run in a list of runs."""

    run: Run
    progress: Progress
    batches: int
    at_api: int
    cost_usd: Decimal | None  #: of the batches that are collected


States = dict[str, RowMapping]  #: what batches add up to, by their state


def _states(
    connection: Connection, by: sa.ColumnElement[Any], which: sa.ColumnElement[bool]
) -> defaultdict[Any, States]:
    """Add up batches by a column and by state, by one question."""
    columns = tables.batch.c
    query = (
        sa.select(
            by.label("of"),
            columns.state,
            sa.func.count().label("batches"),
            sa.func.count(columns.cost_usd).label("priced"),
            money_sum(connection, columns.cost_usd).label("cost_usd"),
            *(sa.func.sum(columns[name]).label(name) for name in SUMS),
        )
        .where(which)
        .group_by(by, columns.state)
    )
    found = defaultdict[Any, States](dict)
    for row in connection.execute(query).mappings():
        found[row["of"]][row["state"]] = row
    return found


def _collected(states: States, name: str) -> int:
    return int(states[BatchState.COLLECTED][name]) if BatchState.COLLECTED in states else 0


def _waiting(states: States, name: str) -> int:
    return sum(int(row[name]) for state, row in states.items() if state != BatchState.COLLECTED)


def _all(states: States, name: str) -> int:
    return sum(int(row[name]) for row in states.values())


def _cost(states: States) -> Decimal | None:
    """Return what the collected batches have cost, None when a price is unknown."""
    if _collected(states, "priced") != _collected(states, "batches"):
        return None
    collected = states.get(BatchState.COLLECTED)
    return Decimal(0) if collected is None else collected["cost_usd"]


def outlines(connection: Connection, runs: Sequence[Run]) -> list[RunOutline]:
    """Return these runs with what their batches add up to, by one question."""
    run_id = tables.batch.c.run_id
    states = _states(connection, run_id, run_id.in_([one.run_id for one in runs]))
    return [_outline(one, states[one.run_id]) for one in runs]


def _outline(run: Run, states: States) -> RunOutline:
    done = _collected(states, "succeeded") + _waiting(states, "done_requests")
    failed = run.rejected + _collected(states, "failed")
    progress = Progress(min(done + run.reused, run.rows), failed, run.rows)
    if run.state == RunState.DONE:
        progress = Progress(run.loaded + run.reused, run.failed, run.rows)
    at_api = states.get(BatchState.SUBMITTED)
    return RunOutline(
        run=run,
        progress=progress,
        batches=_all(states, "batches"),
        at_api=0 if at_api is None else at_api["batches"],
        cost_usd=_cost(states),
    )


def run_of(connection: Connection, dag_id: str, run_id: str) -> Run | None:
    """Return a run by its id, if it is one of this DAG."""
    columns = tables.run.c
    query = sa.select(tables.run).where(columns.run_id == run_id, columns.dag_id == dag_id)
    row = connection.execute(query).mappings().first()
    return None if row is None else Run(**row)


def runs_of(connection: Connection, dag_id: str, dag_run_id: str) -> list[Run]:
    """Return the ledger's runs that an Airflow run has begun or joined, newest first.

    One of an earlier release has no list of those who take part: then those that it has begun.
    """
    columns, part = tables.run.c, tables.participant.c
    joined = sa.select(part.run_id).where(part.dag_id == dag_id, part.dag_run_id == dag_run_id)
    found = _newest(connection, sa.select(tables.run).where(columns.run_id.in_(joined)))
    begun = sa.select(tables.run).where(columns.dag_id == dag_id, columns.dag_run_id == dag_run_id)
    return found or _newest(connection, begun)


def latest_runs(connection: Connection, dag_id: str, limit: int) -> list[Run]:
    """Return the runs of a DAG over its newest partitions, newest first."""
    columns = tables.run.c
    query = sa.select(tables.run).where(columns.dag_id == dag_id)
    query = query.order_by(columns.interval_start.desc(), columns.created_at.desc()).limit(limit)
    return [Run(**row) for row in connection.execute(query).mappings()]


def _newest(connection: Connection, query: sa.Select[Any]) -> list[Run]:
    query = query.order_by(tables.run.c.created_at.desc()).limit(MOST_GENERATIONS)
    return [Run(**row) for row in connection.execute(query).mappings()]


def view(connection: Connection, run: Run, generations: Sequence[Run] = ()) -> RunView:
    """Return everything that the page of a run shows."""
    return RunView(
        run=run,
        rounds=_rounds(connection, run.run_id),
        shards=_shards(connection, run.run_id),
        duplicates=_duplicates(connection, run.run_id),
        generations=list(generations),
    )


def _rounds(connection: Connection, run_id: str) -> list[RoundView]:
    query = sa.select(tables.round_).where(tables.round_.c.run_id == run_id)
    query = query.order_by(tables.round_.c.round)
    rounds = [Round(**row) for row in connection.execute(query).mappings()]
    columns = tables.batch.c
    states = _states(connection, columns.round, columns.run_id == run_id)
    reasons = _reasons(connection, run_id)
    return [_round(one, states[one.round], reasons) for one in rounds]


def _round(one: Round, states: States, reasons: dict[int, Counter[str]]) -> RoundView:
    sums = {name: _all(states, name) for name in SUMS}
    sums["waiting_done"] = _waiting(states, "done_requests")
    sums["waiting_failed"] = _waiting(states, "failed_requests")
    return RoundView(
        number=one.round,
        state=one.state,
        batches=_all(states, "batches"),
        states={state: row["batches"] for state, row in states.items()},
        sums=sums,
        cost_usd=_cost(states),
        reasons=reasons.get(one.round, Counter()),
        built_at=one.built_at,
        settled_at=one.settled_at,
    )


def _reasons(connection: Connection, run_id: str) -> dict[int, Counter[str]]:
    columns = tables.batch.c
    query = (
        sa.select(columns.round, columns.reasons, sa.func.count().label("times"))
        .where(columns.run_id == run_id, columns.reasons.is_not(None), columns.reasons != "{}")
        .group_by(columns.round, columns.reasons)
        .limit(MOST_REASONS)
    )
    found: dict[int, Counter[str]] = {}
    for row in connection.execute(query).mappings():
        counter = found.setdefault(row["round"], Counter())
        for reason, count in json.loads(row["reasons"]).items():
            counter[reason] += count * row["times"]
    return found


def _shards(connection: Connection, run_id: str) -> list[Batch]:
    columns = tables.batch.c
    order = sa.case({state: place for place, state in enumerate(ORDER)}, value=columns.state)
    query = (
        sa.select(tables.batch)
        .where(columns.run_id == run_id)
        .order_by(order, columns.round.desc(), columns.shard)
        .limit(MOST_SHARDS)
    )
    return [Batch(**row) for row in connection.execute(query).mappings()]


def _duplicates(connection: Connection, run_id: str) -> int:
    table = tables.duplicate
    query = (
        sa.select(sa.func.count())
        .select_from(table)
        .join(tables.batch, tables.batch.c.submission_id == table.c.submission_id)
        .where(tables.batch.c.run_id == run_id, table.c.kept_batch_id != "")
    )
    return int(connection.execute(query).scalar_one())


def is_still(batch: Batch, at: datetime) -> bool:
    """Whether the API works on this batch and has shown no progress for a long time."""
    seen = batch.progress_at or batch.submitted_at
    return batch.state == BatchState.SUBMITTED and seen is not None and at - seen > STILL


def status_of(batch: Batch) -> str:
    """Return the word for where a batch is: the API's own while it has the batch."""
    if batch.state in {BatchState.SUBMITTED, BatchState.ENDED}:
        return batch.api_status or batch.state.lower()
    if (
        batch.state == BatchState.COLLECTED
        and batch.api_status != batch_status.BatchStatus.COMPLETED
    ):
        return f"collected ({batch.api_status})"
    return batch.state.lower()

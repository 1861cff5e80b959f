"""What the ledger holds, as frozen values: runs, rounds, batches and their states."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum


class RunState(StrEnum):
    """Where a run is."""

    OPEN = "OPEN"  #: Work is left; whoever runs this partition again joins it.
    DONE = "DONE"  #: Every row has ended and has been loaded.
    CLOSED = "CLOSED"  #: A person has ended it: nothing of it is sent or loaded any more.


OVER = (RunState.DONE, RunState.CLOSED)  #: nobody works on it; what it has cost is known


class BatchState(StrEnum):
    """Where one request file is on its way. Arrows go down this list, or back from the second."""

    PREPARED = "PREPARED"  #: The request file is written; nothing has been asked of the API.
    SUBMITTING = "SUBMITTING"  #: Somebody is about to create the batch, or was when they died.
    SUBMITTED = "SUBMITTED"  #: The API has the batch.
    ENDED = "ENDED"  #: The batch has a final status.
    COLLECTED = "COLLECTED"  #: Its outcomes are written.


EDGES = frozenset(
    {
        (BatchState.PREPARED, BatchState.SUBMITTING),
        (BatchState.SUBMITTING, BatchState.SUBMITTING),  # taken over from a dead process
        (BatchState.SUBMITTING, BatchState.PREPARED),  # the API refused for certain
        (BatchState.SUBMITTING, BatchState.SUBMITTED),
        (BatchState.SUBMITTED, BatchState.ENDED),
        (BatchState.SUBMITTED, BatchState.PREPARED),  # refused only for the token limit
        (BatchState.ENDED, BatchState.COLLECTED),
    }
)


AT_REST = (BatchState.PREPARED, BatchState.COLLECTED)  #: nothing of it is at the API


@dataclass(frozen=True)
class Partition:
    """One data interval of a job: start included, end excluded, aware UTC."""

    job: str
    start: datetime
    end: datetime


@dataclass(frozen=True)
class Run:
    """One run of a partition with one spec; see `llm_batch_run`."""

    run_id: str
    job: str
    interval_start: datetime
    interval_end: datetime
    spec_digest: str
    mode: str
    generation: int
    state: str
    spec: str
    dag_id: str
    dag_run_id: str
    snapshot: str | None
    rows: int
    reused: int
    rejected: int
    loaded: int
    failed: int
    rejected_file: str | None
    shared: int
    estimate_usd: Decimal | None
    estimate_low_usd: Decimal | None
    estimate_upper_usd: Decimal | None
    cost_usd: Decimal | None
    realtime_usd: Decimal | None
    created_at: datetime
    done_at: datetime | None
    artifacts_compressed_at: datetime | None = None
    artifacts_deleted_at: datetime | None = None

    @property
    def directory(self) -> str:
        """Where this run's artifacts are."""
        return f"{self.job}/{self.run_id}"

    def __str__(self) -> str:
        return f"job {self.job}, partition {self.interval_start:%Y-%m-%dT%H:%MZ}, run {self.run_id}"


@dataclass(frozen=True)
class Batch:
    """One request file and what became of it; see `llm_batch_batch`."""

    submission_id: str
    run_id: str
    job: str
    round: int
    shard: int
    state: str
    conn_id: str
    endpoint: str
    model: str
    request_file: str
    index_file: str | None
    content_digest: str
    requests: int
    bytes: int
    input_tokens: int
    estimate_usd: Decimal | None
    epoch: int
    owner: str | None
    first_intent_at: datetime | None
    intent_at: datetime | None
    file_id: str | None
    batch_id: str | None
    submitted_at: datetime | None
    api_status: str | None
    done_requests: int
    failed_requests: int
    polled_at: datetime | None
    progress_at: datetime | None
    ended_at: datetime | None
    collected_at: datetime | None
    outcomes_file: str | None
    succeeded: int
    retry: int
    failed: int
    missing: int
    quarantined: int
    duplicates: int
    reasons: str | None
    used_input_tokens: int
    used_cached_tokens: int
    used_output_tokens: int
    used_reasoning_tokens: int
    cost_usd: Decimal | None
    realtime_usd: Decimal | None
    error: str | None
    output_file_id: str | None = None
    error_file_id: str | None = None
    files_deleted_at: datetime | None = None

    def __str__(self) -> str:
        name = self.batch_id or f"submission {self.submission_id}"
        return f"job {self.job}, round {self.round}, shard {self.shard}, {name}"


@dataclass(frozen=True)
class Round:
    """The totals of one round; see `llm_batch_round`."""

    run_id: str
    round: int
    state: str
    requests: int
    succeeded: int
    retry: int
    failed: int
    missing: int
    built_at: datetime
    settled_at: datetime | None


@dataclass(frozen=True)
class NewBatch:
    """A request file about to enter the ledger."""

    run_id: str
    job: str
    round: int
    shard: int
    conn_id: str
    endpoint: str
    model: str
    request_file: str
    index_file: str | None
    content_digest: str
    requests: int
    bytes: int
    input_tokens: int
    estimate_usd: Decimal | None = None

    @property
    def submission_id(self) -> str:
        """The same file of the same run always has the same id: a retry finds its own traces."""
        return digest(self.run_id, self.round, self.shard, self.content_digest)


@dataclass(frozen=True)
class Claim:
    """The right to create the batch of one request file, until somebody takes it over."""

    batch: Batch
    is_takeover: bool  #: An earlier holder may have created the batch already.


def digest(*parts: object) -> str:
    """Return 32 hex characters that stand for `parts`."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:32]


def now() -> datetime:
    """Return the current time, aware UTC."""
    return datetime.now(UTC)

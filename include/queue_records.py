"""What the queue tells of its requests, as frozen values."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any


class RequestState(StrEnum):
    """Where a request is."""

    QUEUED = "queued"  #: It waits for the next drain, and can still be cancelled.
    PROCESSING = "processing"  #: A run has taken it; it ends within the day or two.
    COMPLETED = "completed"  #: The answer is there.
    FAILED = "failed"  #: There is no answer and no further try; the reason says why.
    CANCELLED = "cancelled"  #: It was cancelled before a run took it; nothing was sent.


ENDED = (RequestState.COMPLETED, RequestState.FAILED, RequestState.CANCELLED)


@dataclass(frozen=True)
class RequestResult:
    """What became of one request. Tokens and cost are of all its tries together.

    `answer` is the model's text, a JSON object for a job with an output schema, or the API's whole
    answer as JSON text for other endpoints; None unless the state is completed. `cost_usd` is None
    when nothing was sent, when the price of the model is unknown, or when the server does not say
    what the answer used.
    """

    request_id: str
    state: RequestState
    model: str | None
    answer: str | None
    reason: str | None
    error_code: str | None
    error_message: str | None
    rounds: int | None
    input_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None
    reasoning_tokens: int | None
    cost_usd: Decimal | None
    queued_at: datetime
    claimed_at: datetime | None
    ended_at: datetime | None
    run_id: str | None

    @property
    def has_ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in ENDED

    def json(self) -> Any:
        """Return the answer as JSON value; raises `ValueError` when it is no JSON."""
        return json.loads(self.answer or "")


@dataclass(frozen=True)
class QueueStatistics:
    """How many requests are in each state, and since when the oldest of the waiting ones waits."""

    queued: int
    processing: int
    completed: int
    failed: int
    cancelled: int
    oldest_queued_at: datetime | None

    @property
    def total(self) -> int:
        """All requests that the table holds."""
        return self.queued + self.processing + self.completed + self.failed + self.cancelled

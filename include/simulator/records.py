"""The two things that the simulator keeps, and how the published API shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

FINAL = frozenset({"completed", "failed", "expired", "cancelled"})
DAY = 86_400


@dataclass(frozen=True)
class FileRecord:
    """One uploaded or generated file; `no` names it on disk."""

    no: int
    id: str
    filename: str
    purpose: str
    bytes: int
    created_at: float
    expires_at: float | None
    input_tokens: int | None
    model: str | None
    deleted: int

    def view(self) -> dict[str, Any]:
        """The schema `OpenAIFile`."""
        return {
            "object": "file",
            "id": self.id,
            "purpose": self.purpose,
            "filename": self.filename,
            "bytes": self.bytes,
            "created_at": int(self.created_at),
            "expires_at": whole(self.expires_at),
            "status": "processed",
            "status_details": None,
        }


@dataclass(frozen=True)
class BatchRecord:
    """One batch; `next_at` is when its present status ends, None when it never does."""

    no: int
    id: str
    status: str
    next_at: float | None
    created_at: float
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: str | None
    output_seconds: int | None
    traits: str
    ends_as: str
    answered: int
    model: str | None
    total: int
    completed: int
    failed: int
    errors: str | None
    output_file_id: str | None
    error_file_id: str | None
    in_progress_at: float | None
    finalizing_at: float | None
    completed_at: float | None
    failed_at: float | None
    expired_at: float | None
    cancelling_at: float | None
    cancelled_at: float | None
    enqueued_tokens: int
    billed: int
    error_lines: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int

    @property
    def tags(self) -> dict[str, str]:
        """The metadata of the submission, empty when there is none."""
        return dict(orjson.loads(self.metadata)) if self.metadata else {}

    def answered_by(self, moment: float, seconds: float) -> int:
        """How many of its requests a steady worker has answered at `moment`."""
        if self.in_progress_at is None:
            return 0
        share = 1.0 if seconds <= 0 else (moment - self.in_progress_at) / seconds
        return max(0, min(self.total, int(self.total * share)))

    def view(self, now: float, seconds_in_progress: float) -> dict[str, Any]:
        """The schema `Batch`, with counts that grow while it is in progress."""
        ended = self.status in FINAL
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "model": self.model,
            "errors": orjson.loads(self.errors) if self.errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_file_id if ended else None,
            "error_file_id": self.error_file_id if ended else None,
            **self._moments(),
            "request_counts": self._counts(now, seconds_in_progress),
            "usage": self._usage() if ended else None,
            "metadata": orjson.loads(self.metadata) if self.metadata else None,
        }

    def _moments(self) -> dict[str, int | None]:
        return {
            "created_at": int(self.created_at),
            "in_progress_at": whole(self.in_progress_at),
            "expires_at": int(self.created_at) + DAY,
            "finalizing_at": whole(self.finalizing_at),
            "completed_at": whole(self.completed_at),
            "failed_at": whole(self.failed_at),
            "expired_at": whole(self.expired_at),
            "cancelling_at": whole(self.cancelling_at),
            "cancelled_at": whole(self.cancelled_at),
        }

    def _counts(self, now: float, seconds_in_progress: float) -> dict[str, int]:
        if self.answered or self.in_progress_at is None:
            done, failed = self.completed, self.failed
        else:
            done, failed = self.answered_by(self.cancelling_at or now, seconds_in_progress), 0
        return {"total": self.total, "completed": done, "failed": failed}

    def _usage(self) -> dict[str, Any]:
        return {
            "input_tokens": self.input_tokens,
            "input_tokens_details": {"cached_tokens": self.cached_tokens},
            "output_tokens": self.output_tokens,
            "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "total_tokens": self.input_tokens + self.output_tokens,
        }


def whole(moment: float | None) -> int | None:
    """Unix seconds as the API writes them."""
    return None if moment is None else int(moment)

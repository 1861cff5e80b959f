"""A batch as the API describes it, in values that need no SDK."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from include import batch_status

PAGE = 100  # batches per list call, the API's maximum
_LATEST_SECOND = 100_000_000_000  # a larger number is one of milliseconds


@dataclass(frozen=True)
class BatchProblem:
    """One entry of a batch's `errors.data`: `line` is 1-based in the request file."""

    code: str | None
    line: int | None

    @property
    def is_token_limit(self) -> bool:
        """Whether the file was refused only because too many tokens are waiting."""
        return "token_limit_exceeded" in (self.code or "")


@dataclass(frozen=True)
class BatchView:
    """A batch as the API last described it, with absent, null and empty fields made alike."""

    batch_id: str
    status: str
    created_at: datetime
    input_file_id: str | None
    output_file_id: str | None
    error_file_id: str | None
    done: int
    failed: int
    total: int
    metadata: Mapping[str, str]
    problems: tuple[BatchProblem, ...]

    @property
    def is_final(self) -> bool:
        """Whether the batch will never change again."""
        return batch_status.is_final(self.status)

    @property
    def hit_token_limit(self) -> bool:
        """Whether the same request file only has to be submitted again later."""
        return self.status == "failed" and any(one.is_token_limit for one in self.problems)

    @property
    def submission_id(self) -> str | None:
        """The ledger's id, when the batch is ours."""
        return self.metadata.get("submission_id")


def moment(value: object) -> datetime:
    """Return when something was, of Unix seconds or milliseconds or ISO 8601 text.

    What cannot be read, or is absent, counts as now: a batch of unknown age must not look too old
    to be ours.
    """
    try:
        if isinstance(value, str) and not value.isdecimal():
            found = datetime.fromisoformat(value)
            return found if found.tzinfo else found.replace(tzinfo=UTC)
        number = float(value or 0)  # type: ignore[arg-type]
        if number > 0:
            return datetime.fromtimestamp(number / (1000 if number > _LATEST_SECOND else 1), UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        pass
    return datetime.now(UTC)


@dataclass(frozen=True)
class StoredFile:
    """A file at the provider; `size` is in bytes."""

    file_id: str
    size: int


def lost(batch_id: str) -> BatchView:
    """Return the view of a batch that the API does not know any more."""
    return BatchView(
        batch_id=batch_id,
        status=batch_status.BatchStatus.LOST,
        created_at=datetime.now(UTC),
        input_file_id=None,
        output_file_id=None,
        error_file_id=None,
        done=0,
        failed=0,
        total=0,
        metadata={},
        problems=(),
    )

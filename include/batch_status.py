"""The statuses of a batch, which of them are final, and what each lets us do.

Source: the Batch object of the published API schema. Servers in the wild add statuses and spell
`cancelled` with one l; an unknown status is simply not final.
"""

from __future__ import annotations

from enum import StrEnum


class BatchStatus(StrEnum):
    """A status as the API writes it, or `LOST` when the API does not know the batch any more."""

    VALIDATING = "validating"  #: The input file is being checked.
    FAILED = "failed"  #: The input file was refused; nothing was processed.
    IN_PROGRESS = "in_progress"  #: Requests are being processed.
    FINALIZING = "finalizing"  #: All requests are done, the files are being written.
    COMPLETED = "completed"  #: The files are ready.
    EXPIRED = "expired"  #: The window closed; what was done is in the files.
    CANCELLING = "cancelling"  #: Cancel was asked for; results may still come for ten minutes.
    CANCELLED = "cancelled"  #: Cancelled; what was done is in the files.
    LOST = "lost"  #: The API answers 404: nothing of it can be collected.


FINAL = frozenset(
    {
        BatchStatus.FAILED,
        BatchStatus.COMPLETED,
        BatchStatus.EXPIRED,
        BatchStatus.CANCELLED,
        BatchStatus.LOST,
    }
)
SPELLINGS = {"canceled": "cancelled", "canceling": "cancelling"}


def normal(status: str | None) -> str:
    """Return `status` in the API's own spelling; absent becomes `unknown`."""
    word = (status or "unknown").strip().lower()
    return SPELLINGS.get(word, word)


def is_final(status: str | None) -> bool:
    """Tell whether a batch in `status` will never change again."""
    return normal(status) in FINAL

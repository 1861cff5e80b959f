"""What to do about a submitted batch: wait on, collect it, or send its file again.

The deadline is absolute, counted from the submission that the ledger records: neither a restart
nor a retry moves it. At the deadline the batch is cancelled; what it has done is collected and the
rest goes to the next round.

A batch that the API does not know (404) is lost, but only when it says so for a while: a batch may
be unknown just after it was made, and its rows would be paid for a second time beside it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import TYPE_CHECKING

from include.batch_status import BatchStatus
from include.batch_view import BatchView, lost
from include.errors import NotThereError, TransientError
from include.ledger import Ledger
from include.ledger_records import Batch, BatchState

if TYPE_CHECKING:
    from include.batch_api import BatchApi

log = logging.getLogger(__name__)

ABANDONED = "abandoned"  #: Neither final nor cancelled in time; what files there are, are taken.


@dataclass(frozen=True)
class WaitPolicy:
    """How long a batch may take, in hours after its submission."""

    deadline_hours: float = 26.0  #: the API promises 24
    cancel_hours: float = 1.0  #: more, for a cancel that the API says takes ten minutes
    lost_minutes: float = 10.0  #: of answers that there is no such batch, before it counts as lost

    @property
    def window(self) -> timedelta:
        """How long after its submission the batch is cancelled."""
        return timedelta(hours=self.deadline_hours)

    def deadline(self, batch: Batch) -> datetime:
        """When the batch is cancelled."""
        return (batch.submitted_at or datetime.now(UTC)) + self.window

    def last_call(self, batch: Batch) -> datetime:
        """When a batch that does not even end by being cancelled is given up."""
        return self.deadline(batch) + timedelta(hours=self.cancel_hours)

    def is_lost(self, since: datetime) -> bool:
        """Tell whether a batch that the API has not known since then will not come back."""
        return datetime.now(UTC) - since >= timedelta(minutes=self.lost_minutes)

    def may_come_back(self, batch: Batch) -> bool:
        """Tell whether it is too early to call a batch lost that the API does not know now."""
        # The ledger has the time of the last change: here, of the first such answer.
        was_unknown = batch.api_status == BatchStatus.LOST
        since = (batch.progress_at if was_unknown else None) or datetime.now(UTC)
        return datetime.now(UTC) < self.deadline(batch) and not self.is_lost(since)


class Verdict(Enum):
    """What a look at a batch leads to."""

    WAIT = "wait"  #: It is not final; ask again.
    OVER = "over"  #: It has ended; collect it.
    RESUBMIT = "resubmit"  #: It only hit the token limit; submit the same file again.


def look(batch: Batch, ledger: Ledger, api: BatchApi, policy: WaitPolicy) -> Verdict:
    """Ask the API once, record what it says, and cancel a batch that is past its deadline.

    A poll that fails is no verdict: the answer is WAIT, until the deadline. Nor is one 404.
    """
    if batch.state in {BatchState.ENDED, BatchState.COLLECTED}:
        return Verdict.OVER
    if batch.batch_id is None:
        return Verdict.RESUBMIT
    try:
        view = _view(batch, api)
    except TransientError as error:
        log.warning("%s: %s Asked again until %s.", batch, error, policy.deadline(batch))
        return Verdict.WAIT
    if view.hit_token_limit:
        log.warning("%s hit the enqueued-token limit; its file is submitted again later.", batch)
        ledger.requeue(batch)
        return Verdict.RESUBMIT
    if view.status == BatchStatus.LOST and policy.may_come_back(batch):
        ledger.polled(view.batch_id, api_status=view.status, done=view.done, failed=view.failed)
        return Verdict.WAIT
    if not view.is_final:
        return _overdue(batch, view, ledger, api, policy)
    ledger.ended(batch, api_status=view.status, done=view.done, failed=view.failed)
    log.info(
        "%s is %s: %s done, %s failed of %s. Next: it is collected.",
        batch,
        view.status,
        view.done,
        view.failed,
        batch.requests,
    )
    if view.problems:
        codes = ", ".join(sorted({one.code or "no code" for one in view.problems}))
        log.error("%s: the API refused the request file: %s.", batch, codes)
    return Verdict.OVER


def _view(batch: Batch, api: BatchApi) -> BatchView:
    try:
        return api.retrieve(str(batch.batch_id))
    except NotThereError as error:
        log.error("%s: %s When that lasts it is lost, and its rows go again.", batch, error)
        return lost(str(batch.batch_id))


def _overdue(
    batch: Batch, view: BatchView, ledger: Ledger, api: BatchApi, policy: WaitPolicy
) -> Verdict:
    ledger.polled(view.batch_id, api_status=view.status, done=view.done, failed=view.failed)
    now = datetime.now(UTC)
    if now >= policy.last_call(batch):
        log.error("%s is still %s long after its deadline; it is given up.", batch, view.status)
        ledger.ended(batch, api_status=ABANDONED, done=view.done, failed=view.failed)
        return Verdict.OVER
    if now >= policy.deadline(batch) and view.status != "cancelling":
        log.warning("%s is still %s at its deadline; it is being cancelled.", batch, view.status)
        api.cancel(view.batch_id)
    return Verdict.WAIT

"""Batches that carry the id of a request file which has another one: found, cancelled, recorded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from include.batch_ownership import Ownership
from include.errors import NotOfferedError
from include.ledger import Ledger
from include.ledger_records import Batch
from include.submission import SubmissionPolicy, drop_duplicate

if TYPE_CHECKING:
    from include.batch_api import BatchApi
    from include.batch_view import BatchView

log = logging.getLogger(__name__)


def find_duplicates(
    batches: list[Batch], ledger: Ledger, api: BatchApi, policy: SubmissionPolicy
) -> int:
    """Cancel and record batches that carry our ids but are not ours; return how many are new."""
    # One whose answer was lost has no batch to stand by yet: submitting it again adopts it.
    ours = {one.submission_id: one for one in batches if one.batch_id is not None}
    if not ours:
        return 0
    recorded = {one["batch_id"] for one in ledger.duplicates(list(ours))}
    first = min(one.first_intent_at for one in ours.values() if one.first_intent_at)
    ownership = Ownership(ledger, list(ours))
    found = 0
    for view in _listed(api, first - timedelta(seconds=policy.skew)):
        owner = ownership.of(view)
        if owner is None:
            continue
        kept = ledger.batch(owner)  # as it is now: it may have changed since
        if kept.batch_id in {None, view.batch_id}:
            continue
        is_known = view.batch_id in recorded
        # One that is recorded and still at work was not cancelled: somebody died in between.
        if not (is_known and view.is_final):
            drop_duplicate(ledger, api, kept, view)
        found += not is_known
    return found


def _listed(api: BatchApi, since: datetime) -> Iterator[BatchView]:
    try:
        yield from api.newest(since)
    except NotOfferedError as error:
        log.warning("%s A second batch of one request file could not be found.", error)

"""Which submission a batch at the API belongs to.

The batch's metadata says so where the server keeps it. Where it does not, the batch's input file
does: each submission uploads a file of its own, and the ledger has its id before the batch is
created.
"""

from __future__ import annotations

from collections.abc import Sequence

from include.batch_view import BatchView
from include.ledger import Ledger


class Ownership:
    """The batches of some submissions among all those that the API lists."""

    def __init__(self, ledger: Ledger, submission_ids: Sequence[str]) -> None:
        self._ledger = ledger
        self._ids = frozenset(submission_ids)
        self._files = ledger.input_files(submission_ids)

    def of(self, view: BatchView) -> str | None:
        """Return the submission that the batch was made for; None when it is none of these."""
        if view.submission_id is not None:
            return view.submission_id if view.submission_id in self._ids else None
        owner = self._files.get(view.input_file_id or "")
        if owner is None:
            return None
        # A server that names files by their content gives the same id to the same file of a later
        # run: then the ledger knows whose batch it is.
        known = self._ledger.batch_by_id(view.batch_id)
        return owner if known is None or known.submission_id == owner else None

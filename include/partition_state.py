"""What several runs over the same rows add up to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from include.run_mode import NORMAL


class RunCounts(Protocol):
    """The part of a run that says what it left."""

    @property
    def mode(self) -> str:
        """How the run chose its rows: `normal`, `redrive` or `force`."""

    @property
    def reused(self) -> int:
        """Rows that were loaded, or had failed for good, before."""

    @property
    def failed(self) -> int:
        """Rows that this run put into the failures table."""


def failures_left(runs: Iterable[RunCounts]) -> int:
    """Return how many rows of a partition have failed for good, from its runs, oldest first.

    A normal run leaves out the rows that have failed before, and adds its own failures to them.
    A redrive, a forced run, and one that reused nothing (another model or prompt) say it anew.
    """
    left = 0
    for run in runs:
        if run.mode == NORMAL and run.reused:
            left += run.failed
        else:
            left = run.failed
    return left

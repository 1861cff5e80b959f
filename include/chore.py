"""One chore of housekeeping: what it found, what it did, and which connections failed in it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from include.errors import LLMBatchError
from include.figures import counted

log = logging.getLogger(__name__)

SHOWN = 50  # lines of a report
ONE = {  # of what chores count
    "batches": "batch",
    "second batches": "second batch",
    "files": "file",
    "files compressed": "file compressed",
    "runs": "run",
    "runs compressed": "run compressed",
    "runs deleted": "run deleted",
}


@dataclass
class Chore:
    """What one chore found, and whether it did something about it."""

    name: str
    applied: bool
    counts: dict[str, int] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def note(self, what: str, line: str = "") -> None:
        """Count one thing; keep a line about it as long as there are few."""
        self.counts[what] = self.counts.get(what, 0) + 1
        if line and len(self.lines) < SHOWN:
            self.lines.append(line)

    def text(self) -> str:
        """Return the lines that somebody reads."""
        counts = ", ".join(
            counted(number, ONE.get(what, what), what) for what, number in self.counts.items()
        )
        mode = "done" if self.applied else "dry run, nothing was changed"
        return "\n".join((f"{self.name} ({mode}): {counts or 'nothing to do'}", *self.lines))


@dataclass
class Failing:
    """The connections that failed in a chore, each with its first error."""

    errors: dict[str, LLMBatchError] = field(default_factory=dict)

    @contextmanager
    def apart(self, conn_id: str) -> Iterator[None]:
        """Keep an error of this connection until the chore has done the others."""
        try:
            yield
        except LLMBatchError as error:
            log.error("Connection %s: %s", conn_id, error)
            self.errors.setdefault(conn_id, error)

    def tell(self) -> None:
        """Raise the first error, if there was one."""
        for error in self.errors.values():
            raise error

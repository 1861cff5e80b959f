"""The answer of a moderation request: whether a text was flagged, for what, and all scores."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import msgspec

from include.classification import Problem, Reason
from include.output_columns import CATEGORIES, moderation_columns

Record = msgspec.Struct


class _Result(msgspec.Struct, gc=False):
    flagged: bool
    categories: dict[str, bool | None]
    category_scores: dict[str, float | None]


_decode = msgspec.json.Decoder(_Result).decode


class ModerationReader:
    """Turns the JSON of one moderation result into a record: `f0`, `f1`, ... in column order.

    A category that a later model adds is in the column `categories` when it was flagged.
    """

    trap = "\x00"  # JSON text has none

    def __init__(self) -> None:
        self.columns = moderation_columns()
        names = [f"f{number}" for number in range(len(self.columns))]
        self.getters: list[Callable[[Any], Any]] = [attrgetter(name) for name in names]
        self._record = msgspec.defstruct("Output", [(name, Any) for name in names], gc=False)
        self.nothing: Record = self._record(*(None for _ in names))

    def read(self, content: str) -> Record | Problem:
        """Return the record of one result."""
        try:
            found = _decode(content)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return Problem(
                Reason.INVALID_ANSWER, message="The answer is not one moderation result."
            )
        marks, scores = found.categories, found.category_scores
        named = sorted(name for name, is_flagged in marks.items() if is_flagged)
        return self._record(
            found.flagged,
            msgspec.json.encode(named).decode(),
            *(marks.get(name) for name in CATEGORIES),
            *(scores.get(name) for name in CATEGORIES),
        )

    quick = read

"""What goes round again, in what form, and when a row has had its last chance."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from include.classification import Reason, State


class Change(StrEnum):
    """How a request differs from the one of the round before."""

    NONE = ""  #: The same body again.
    LARGER_OUTPUT = "larger_output"  #: A larger output token limit.


CHANGES: Mapping[Reason, Change] = {
    Reason.CUT_OFF: Change.LARGER_OUTPUT,
}


def next_change(reason: Reason) -> Change:
    """Return how the next request must differ; `NONE` as well for reasons that never go again."""
    return CHANGES.get(reason, Change.NONE)


def is_terminal(state: State, *, round_number: int, last_round: int) -> bool:
    """Tell whether a row with `state` after `round_number` gets no other request.

    A row that may be tried again but has no round left is left over: it goes to the failures
    table with the reason of its last try and the number of rounds that it had.
    """
    return state is not State.RETRY or round_number >= last_round

"""What goes round again, in what form, and when it is over."""

from __future__ import annotations

import pytest

from include.classification import Reason, State
from include.retry_plan import Change, is_terminal, next_change


def test_only_a_cut_off_answer_needs_another_request() -> None:
    """Everything else is sent again as it was."""
    changed = {reason for reason in Reason if next_change(reason) is not Change.NONE}

    assert changed == {Reason.CUT_OFF}
    assert next_change(Reason.CUT_OFF) is Change.LARGER_OUTPUT


@pytest.mark.parametrize(
    ("state", "number", "terminal"),
    [
        (State.SUCCEEDED, 1, True),
        (State.FAILED, 1, True),
        (State.RETRY, 1, False),
        (State.RETRY, 3, True),
    ],
)
def test_row_is_left_over_after_the_last_round(state: State, number: int, terminal: bool) -> None:  # noqa: FBT001
    """A row that may be tried again ends only with the rounds."""
    assert is_terminal(state, round_number=number, last_round=3) is terminal

"""Tables for a terminal are aligned, plain, and whole when it is narrow."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest

from include.text_table import duration, printable, text_table

NOON = datetime(2026, 11, 1, 12, tzinfo=UTC)


def test_columns_are_aligned() -> None:
    """Text stands to the left, figures to the right, nothing trails."""
    text = text_table(("job", "rows", "cost", "at"), [("a", 5, Decimal("0.1"), NOON)])

    assert text == "job  rows     cost  at\na       5  $0.1000  2026-11-01 12:00"


def test_a_narrow_terminal_gets_every_character() -> None:
    """What does not fit goes on in the next line: an id is never cut off."""
    text = text_table(("batch",), [("b" * 50,)], width=20)

    assert all(len(line) <= 20 for line in text.splitlines())
    assert text.count("b") - 1 == 50


def test_brackets_are_no_markup() -> None:
    """A cell is shown as it is, whatever a table library makes of brackets."""
    assert "[bold]x" in text_table(("a",), [("[bold]x",)])


def test_nothing_steers_the_terminal() -> None:
    """A server's id with an escape sequence in it does not reach the terminal as one."""
    assert printable("batch_\x1b[2J1") == "batch_?[2J1"
    assert "\x1b" not in text_table(("a",), [("\x1b[31m",)])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 s"), (59, "59 s"), (61, "1 min"), (5400, "1 h 30 min"), (93600, "1 d 2 h")],
)
def test_durations(seconds: int, text: str) -> None:
    """The two largest units of a length of time."""
    assert duration(timedelta(seconds=seconds)) == text

"""Tables for a terminal: plain, aligned, and still readable when it is narrow."""

from __future__ import annotations

import io
from collections.abc import Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from include.figures import money

WIDEST = 200  # characters a line, when nobody looks at a terminal


def text_table(header: Sequence[str], rows: Sequence[Sequence[Any]], *, width: int = WIDEST) -> str:
    """Return `rows` below `header`; numbers, money and durations stand to the right.

    None is `-`, money is a `Decimal` in dollars, times are UTC. No cell is ever cut off: in a
    narrow terminal its text goes on in the next line.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="", expand=False)
    for place, name in enumerate(header):
        is_number = any(_is_number(row[place]) for row in rows)
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(shown(cell)) for cell in row))
    page = io.StringIO()
    Console(file=page, width=width, color_system=None, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())


def shown(value: Any) -> str:
    """Return a value as a person reads it."""
    if value is None:
        return "-"
    if isinstance(value, Decimal):
        return money(value)
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M}"
    if isinstance(value, timedelta):
        return duration(value)
    return f"{value:,}" if isinstance(value, int) else printable(str(value))


def duration(time: timedelta) -> str:
    """Return a length of time in its two largest units: `3 d 4 h`, `2 h 5 min`, `12 s`."""
    seconds = max(int(time.total_seconds()), 0)
    if seconds < 60:
        return f"{seconds} s"
    minutes = seconds // 60
    for size, unit, smaller, name in ((1440, "d", 60, "h"), (60, "h", 1, "min")):
        if minutes >= size:
            return f"{minutes // size} {unit} {minutes % size // smaller} {name}"
    return f"{minutes} min"


def printable(text: str) -> str:
    """Return `text` without what would steer a terminal: ids come from another server."""
    return "".join(one if one.isprintable() else "?" for one in text)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | Decimal | timedelta)

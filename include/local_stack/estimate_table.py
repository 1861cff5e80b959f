"""What a backfill would send and cost, as a table for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from include.backfill_estimate import IntervalEstimate
from include.cost import known_total
from include.figures import money

HEADERS = (
    "interval (UTC)", "rows", "reused", "rejected", "requests", "batches", "tokens in",
    "cost", "at most",
)  # fmt: skip
WIDTHS = (16, 9, 9, 9, 9, 8, 13, 11, 11)


def estimate_lines(estimates: Iterable[IntervalEstimate]) -> Iterator[str]:
    """Yield a line for each interval as soon as it is known, then the total."""
    yield _line(HEADERS)
    yield "-" * len(_line(HEADERS))
    found = []
    for one in estimates:
        found.append(one)
        yield _line((f"{one.start:%Y-%m-%d %H:%M}", *_cells([one])))
    yield "-" * len(_line(HEADERS))
    yield _line(("total", *_cells(found)))


def _cells(found: list[IntervalEstimate]) -> list[str]:
    names = ("rows", "reused", "rejected", "requests", "batches", "input_tokens")
    numbers = [f"{sum(getattr(one, name) for one in found):,}" for name in names]
    dollars = [
        known_total(getattr(one, name) for one in found) for name in ("cost_usd", "upper_usd")
    ]
    return [*numbers, *map(money, dollars)]


def _line(cells: Iterable[str]) -> str:
    first, *others = zip(cells, WIDTHS, strict=True)
    left = first[0].ljust(first[1])
    return "  ".join([left, *(cell.rjust(width) for cell, width in others)])

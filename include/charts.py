"""Bar charts over days as plain geometry; a template draws them as SVG.

Units are those of the SVG's view box, from the top left. Values are numbers of any kind; what is
written beside them is made by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal

Value = int | float | Decimal

WIDTH = 640.0
HEIGHT = 190.0
LEFT = 56.0  # for the figures at the side
BOTTOM = 24.0  # for the days below
TOP = 12.0
GAP = 0.25  # of a day's width, between two bars
LABELS = 8  # days that are written below, at most
STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Bar:
    """A rectangle; `series` is the number of its colour, `title` what it says when pointed at."""

    x: float
    y: float
    width: float
    height: float
    series: int
    title: str


@dataclass(frozen=True)
class Tick:
    """A text beside an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """A horizontal line across the chart, with its text."""

    y: float
    text: str


@dataclass(frozen=True)
class Chart:
    """What a template draws; `label` says the chart in one sentence."""

    label: str
    bars: tuple[Bar, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...] = ()
    notes: tuple[str, ...] = ()
    width: float = WIDTH
    height: float = HEIGHT

    @property
    def base(self) -> float:
        """Where the bars stand."""
        return self.height - BOTTOM

    @property
    def left(self) -> float:
        """Where the bars begin."""
        return LEFT


@dataclass(frozen=True)
class Series:
    """One colour of a chart: a name and a value for some days."""

    name: str
    values: Mapping[date, Value]


def stacked(
    label: str,
    days: Sequence[date],
    series: Sequence[Series],
    text: Callable[[Value], str],
    *,
    axis: Callable[[float], str] | None = None,
    unit: float = 1.0,
    limit: Value | None = None,
    limit_text: str = "",
) -> Chart:
    """Return a chart with one bar for each day, in which the series stand on each other.

    The axis has round numbers of `unit`, written by `axis` (default: by `text`). A `limit` is drawn
    as a line where the chart reaches that far; where it would flatten every bar, it becomes a
    note instead.
    """
    highest = max((sum(_number(one, day) for one in series) for day in days), default=0.0)
    reach, lines_at = _reach(highest, limit)
    scale = (HEIGHT - BOTTOM - TOP) / reach
    bars: list[Bar] = []
    for place, day in enumerate(days):
        stands_on = 0.0
        for number, one in enumerate(series):
            value = _number(one, day)
            if value <= 0:
                continue
            x, width = _column(place, len(days))
            top = stands_on + value
            title = f"{day:%Y-%m-%d} {one.name}: {text(one.values[day])}"
            y = HEIGHT - BOTTOM - top * scale
            bars.append(Bar(x, y, width, max(value * scale, 1.0), number, title))
            stands_on = top
    return Chart(
        label=label,
        bars=tuple(bars),
        x_ticks=_day_ticks(days),
        y_ticks=tuple(
            Tick(HEIGHT - BOTTOM - value * unit * scale, (axis or text)(value))
            for value in _round_values(reach / unit)
        ),
        lines=tuple(Line(HEIGHT - BOTTOM - at * scale, limit_text) for at in lines_at),
        notes=(limit_text,) if limit is not None and not lines_at else (),
    )


def _number(series: Series, day: date) -> float:
    return float(series.values.get(day, 0))


def _reach(highest: float, limit: Value | None) -> tuple[float, list[float]]:
    """Return the value at the top of the chart, and where the limit is drawn."""
    if limit is not None and 0 < float(limit) <= max(highest * 4, 0.0):
        return max(highest, float(limit)) * 1.08, [float(limit)]
    return (highest * 1.08 or 1.0), []


def _column(place: int, columns: int) -> tuple[float, float]:
    step = (WIDTH - LEFT) / max(columns, 1)
    return LEFT + step * (place + GAP / 2), step * (1 - GAP)


def _day_ticks(days: Sequence[date]) -> tuple[Tick, ...]:
    every = max(1, math.ceil(len(days) / LABELS))
    step = (WIDTH - LEFT) / max(len(days), 1)
    return tuple(
        Tick(LEFT + step * (place + 0.5), f"{day.day} {day:%b}")
        for place, day in enumerate(days)
        if place % every == 0
    )


def _round_values(reach: float) -> list[float]:
    """Return about three round values from 0 to `reach`."""
    rough = reach / 3
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * one for one in STEPS if power * one >= rough)
    return [step * n for n in range(int(reach / step) + 1)]

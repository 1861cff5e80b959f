"""Charts are true to their figures, and figures read well."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import pytest

from include import charts, figures
from include.charts import Series, stacked

DAYS = [date(2026, 11, 1) + timedelta(days=n) for n in range(10)]


def test_heights_are_in_proportion_and_stand_on_each_other() -> None:
    """A bar of twice the value is twice as high; the second series begins where the first ends."""
    first = Series("a", {DAYS[0]: 10, DAYS[1]: 20})
    second = Series("b", {DAYS[1]: Decimal(5)})

    chart = stacked("test", DAYS, [first, second], figures.count)

    low, high, top = sorted(chart.bars, key=lambda bar: (bar.series, bar.x))
    assert high.height == pytest.approx(2 * low.height)
    assert top.height == pytest.approx(low.height / 2)
    assert top.y + top.height == pytest.approx(high.y)
    assert low.y + low.height == pytest.approx(chart.base)
    assert top.title == "2026-11-02 b: 5"


def test_a_limit_within_reach_is_a_line_and_one_far_above_a_note() -> None:
    """A line that would flatten every bar is written instead."""
    values = [Series("a", {DAYS[0]: 10})]

    near = stacked("test", DAYS, values, figures.count, limit=20, limit_text="limit 20")
    far = stacked("test", DAYS, values, figures.count, limit=900, limit_text="limit 900")

    (line,) = near.lines
    assert chart_value(near, line.y) == pytest.approx(20, rel=0.02)
    assert near.notes == ()
    assert (far.lines, far.notes) == ((), ("limit 900",))


def chart_value(chart: charts.Chart, y: float) -> float:
    (bar,) = chart.bars
    return (chart.base - y) / bar.height * 10


@pytest.mark.parametrize("values", [{}, {DAYS[3]: 0}, {DAYS[3]: 1e-9}, {DAYS[3]: 10**12}])
def test_any_values_can_be_drawn(values: dict[date, float]) -> None:
    """Nothing, almost nothing and very much stay inside the picture."""
    chart = stacked("test", DAYS, [Series("a", values)], figures.short_count)

    for bar in chart.bars:
        assert 0 <= bar.y <= chart.base
        assert chart.left <= bar.x <= bar.x + bar.width <= chart.width
    assert 1 <= len(chart.y_ticks) <= 5
    assert len(chart.x_ticks) <= charts.LABELS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (figures.dollars(None), "unknown"),
        (figures.dollars(Decimal("0.01234")), "$0.0123"),
        (figures.dollars(Decimal("1234.567")), "$1,234.57"),
        (figures.dollars(Decimal(0)), "$0"),
        (figures.dollars(Decimal("1.25")), "$1.25"),
        (figures.money(Decimal("1234.567")), "$1,234.5670"),
        (figures.money(Decimal(0)), "$0.0000"),
        (figures.short_dollars(2.5), "$2.5"),
        (figures.count(1234567), "1,234,567"),
        (figures.short_count(1_500_000), "1.5M"),
        (figures.short_count(12_000), "12k"),
        (figures.span(42), "42 s"),
        (figures.span(timedelta(hours=2, minutes=10, seconds=5)), "2 h 10 min"),
        (figures.span(timedelta(days=3, seconds=5)), "3 d"),
        (figures.span(-3), "0 s"),
        (figures.span(None), "—"),
        (
            figures.ago(datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 11, 1, 1, tzinfo=UTC)),
            "1 h ago",
        ),
    ],
)
def test_figures_read_well(text: str, expected: str) -> None:
    """An unknown price is never 0, small money has digits, large money has cents."""
    assert text == expected

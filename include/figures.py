"""Figures as people read them: money, counts, spans of time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal

MINUTE, HOUR, DAY = 60, 3_600, 86_400  # seconds
NOTHING = "—"


def money(amount: Decimal | float | None) -> str:
    """Return dollars to a hundredth of a cent, to be added up or compared; None is unknown."""
    return "unknown" if amount is None else f"${amount:,.4f}"


def dollars(amount: Decimal | float | None) -> str:
    """Return dollars to be read by themselves: cents from one dollar on; None is unknown."""
    if amount == 0:
        return "$0"
    return f"${amount:,.2f}" if amount is not None and abs(float(amount)) >= 1 else money(amount)


def short_dollars(amount: float | Decimal) -> str:
    """Return dollars for an axis: $2, $2.5, $0.05."""
    return f"${float(amount):,.4g}"


def count(number: float | Decimal) -> str:
    """Return a whole number with separators."""
    return f"{number:,.0f}"


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number with what it counts: `1 batch`, `2,000 rows`; `many` where -s is wrong."""
    return f"{number:,} {noun(number, one, many)}"


def noun(number: int, one: str, many: str = "") -> str:
    """Return what `number` counts: `one` or its plural, which is `many` where -s is wrong."""
    if number == 1:
        return one
    return many or (f"{one}es" if one.endswith(("ch", "s", "x")) else f"{one}s")


def short_count(number: float | Decimal) -> str:
    """Return a number for an axis: 950, 12k, 1.5M."""
    for size, unit in ((1_000_000, "M"), (1_000, "k")):
        if abs(float(number)) >= size:
            return f"{float(number) / size:.3g}{unit}"
    return f"{float(number):.3g}"


def span(seconds: float | Decimal | timedelta | None) -> str:
    """Return a time span in its two largest units: 42 s, 3 min 5 s, 2 h 10 min, 3 d 4 h."""
    if seconds is None:
        return NOTHING
    whole = int(seconds.total_seconds() if isinstance(seconds, timedelta) else seconds)
    if whole < MINUTE:
        return f"{max(whole, 0)} s"
    units = ((DAY, "d"), (HOUR, "h"), (MINUTE, "min"), (1, "s"))
    parts: list[str] = []
    for size, unit in units:
        amount, whole = divmod(whole, size)
        if amount or parts:
            parts.append(f"{amount} {unit}" if amount else "")
        if len(parts) == 2:
            break
    return " ".join(filter(None, parts))


def ago(moment: datetime | None, at: datetime | None = None) -> str:
    """Return how long ago something was."""
    if moment is None:
        return NOTHING
    return f"{span((at or datetime.now(UTC)) - moment)} ago"

"""Some whole days, one after the other, in UTC."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta

STEP = timedelta(days=1)


@dataclass(frozen=True)
class Span:
    """The days that a page is about, first and last included, in UTC."""

    first: date
    last: date

    @property
    def days(self) -> list[date]:
        """Every day."""
        return [self.first + n * STEP for n in range((self.last - self.first).days + 1)]

    @property
    def start(self) -> datetime:
        """When the first day begins."""
        return datetime.combine(self.first, time(), UTC)

    @property
    def end(self) -> datetime:
        """When the day after the last begins."""
        return datetime.combine(self.last + STEP, time(), UTC)

    def moved(self, spans: int) -> Span:
        """Return the span as many of its lengths later (earlier when negative)."""
        by = spans * len(self.days) * STEP
        return Span(self.first + by, self.last + by)

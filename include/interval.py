"""A data interval as text: in SQL, in the paths of files."""

from __future__ import annotations

from datetime import UTC, datetime


def interval_text(moment: datetime) -> str:
    """Return an aware datetime as `2026-11-01T00:00:00Z`, with microseconds if it has any."""
    if moment.tzinfo is None:
        raise ValueError("interval bounds must be aware datetimes")
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat() + "Z"


def interval_words(start: datetime, end: datetime) -> dict[str, str]:
    """Return what a path may name of its interval, by the names of the placeholders; all in UTC."""
    day = start.astimezone(UTC)
    return {
        "ds": f"{day:%Y-%m-%d}",
        "ds_nodash": f"{day:%Y%m%d}",
        "ts_nodash": f"{day:%Y%m%dT%H%M%S}",
        "interval_start": interval_text(start),
        "interval_end": interval_text(end),
    }

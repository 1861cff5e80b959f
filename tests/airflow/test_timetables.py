"""Every moment belongs to one data interval, also where clocks are changed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from airflow.serialization.serialized_objects import DagSerialization
from llm_batch.dag import batch_dag

HOUR = timedelta(hours=1)
YEAR = (datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 12, 31, tzinfo=UTC))


def intervals(schedule: str, timezone: str) -> list[tuple[datetime, datetime]]:
    """The data intervals that a backfill of 2026 has, in UTC."""
    dag: Any = batch_dag(
        "ticket_triage", schedule=schedule, start_date=datetime(2025, 1, 1, tzinfo=UTC),
        timezone=timezone,
    )  # fmt: skip
    stored = DagSerialization.from_dict(DagSerialization.to_dict(dag))
    found = [info.data_interval for info in stored.iter_dagrun_infos_between(*YEAR)]
    return [
        (
            datetime.fromtimestamp(one.start.timestamp(), UTC),
            datetime.fromtimestamp(one.end.timestamp(), UTC),
        )
        for one in found
    ]


@pytest.mark.parametrize("schedule", ["@daily", "30 2 * * *", "@weekly", "@monthly"])
@pytest.mark.parametrize(
    "timezone", ["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kolkata"]
)
def test_a_year_has_no_gap_and_no_overlap(schedule: str, timezone: str) -> None:
    """Each interval begins where the one before has ended, through both changes of the clock."""
    found = intervals(schedule, timezone)

    assert len(found) >= 11
    assert all(before[1] == after[0] for before, after in pairwise(found))


@pytest.mark.parametrize(
    ("timezone", "day", "hours"),
    [
        ("Europe/Berlin", datetime(2026, 3, 28, 23, tzinfo=UTC), 23),
        ("Europe/Berlin", datetime(2026, 10, 24, 22, tzinfo=UTC), 25),
        ("America/New_York", datetime(2026, 3, 8, 5, tzinfo=UTC), 23),
        ("America/New_York", datetime(2026, 11, 1, 4, tzinfo=UTC), 25),
        ("Australia/Lord_Howe", datetime(2026, 4, 4, 13, tzinfo=UTC), 24.5),
        ("UTC", datetime(2026, 3, 29, tzinfo=UTC), 24),
    ],
)
def test_a_day_is_as_long_as_its_clock_says(timezone: str, day: datetime, hours: float) -> None:
    """Midnight to midnight in the time zone of the schedule: 23 or 25 hours where clocks change."""
    found = dict(intervals("@daily", timezone))

    assert found[day] - day == hours * HOUR


def test_the_dag_has_the_time_zone_of_its_schedule() -> None:
    """Airflow takes what somebody writes without an offset in this time zone."""
    start = datetime(2025, 1, 1, tzinfo=UTC)
    dag: Any = batch_dag(
        "ticket_triage", schedule="@daily", start_date=start, timezone="Europe/Berlin"
    )

    assert (
        str(DagSerialization.from_dict(DagSerialization.to_dict(dag)).timezone) == "Europe/Berlin"
    )
    assert dag.start_date == start


def test_all_other_days_have_24_hours() -> None:
    """Two days of a year are different, and their lengths make up for each other."""
    lengths = [end - start for start, end in intervals("@daily", "Europe/Berlin")]

    assert sorted(length for length in lengths if length != 24 * HOUR) == [23 * HOUR, 25 * HOUR]

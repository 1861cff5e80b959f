"""The sample tickets are what their README says, and can be made again."""

from __future__ import annotations

import csv
import gzip
import io
from collections import Counter
from datetime import datetime
from pathlib import Path

import pytest

from include.sample_data import make_reviews, make_tickets


@pytest.fixture(scope="module")
def tickets() -> list[dict[str, str]]:
    """The committed tickets."""
    text = gzip.decompress(make_tickets.TICKETS.read_bytes()).decode()
    return list(csv.DictReader(io.StringIO(text)))


def test_generator_writes_the_committed_content() -> None:
    """Running the generator again gives the same tickets, byte for byte."""
    committed = gzip.decompress(make_tickets.TICKETS.read_bytes())

    assert make_tickets.as_csv(make_tickets.make_tickets()) == committed


def test_file_holds_no_time_of_its_making(tmp_path: Path) -> None:
    """Two runs write identical files."""
    first, second = tmp_path / "first.csv.gz", tmp_path / "second.csv.gz"
    make_tickets.write_tickets(first)
    make_tickets.write_tickets(second)

    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes()[4:8] == b"\0\0\0\0"  # the mtime of a gzip header


def test_tickets_are_unique_and_ordered(tickets: list[dict[str, str]]) -> None:
    """2,000 tickets, numbered in order of time."""
    numbers = [ticket["ticket_id"] for ticket in tickets]
    times = [ticket["created_at"] for ticket in tickets]

    assert numbers == [f"T-{100_001 + index}" for index in range(2000)]
    assert times == sorted(times)


def test_tickets_cover_fourteen_days(tickets: list[dict[str, str]]) -> None:
    """Each day from 1 to 14 November has tickets, weekends fewer than any working day."""
    per_day = Counter(datetime.fromisoformat(one["created_at"]).date() for one in tickets)
    weekend = [count for day, count in per_day.items() if day.weekday() >= 5]
    working = [count for day, count in per_day.items() if day.weekday() < 5]

    assert sorted(day.day for day in per_day) == list(range(1, 15))
    assert max(weekend) < min(working)


def test_no_slot_is_left_open(tickets: list[dict[str, str]]) -> None:
    """Every text is filled in; the only braces are those of the hostile ticket."""
    texts = [ticket["subject"] + ticket["body"].replace("{{ 7*7 }}", "") for ticket in tickets]

    assert all(texts)
    assert not [text for text in texts if "{" in text]


def test_values_are_those_of_the_readme(tickets: list[dict[str, str]]) -> None:
    """Channels and tiers are the listed ones, and all of them occur."""
    assert {one["channel"] for one in tickets} == {"email", "web", "chat", "phone"}
    assert {one["customer_tier"] for one in tickets} == {"free", "pro", "enterprise"}
    assert max(len(one["body"]) for one in tickets) <= 900


def test_reviews_are_what_their_generator_writes(tmp_path: Path) -> None:
    """Running the generator again gives the same reviews, byte for byte."""
    make_reviews.write_reviews(tmp_path / "again.csv.gz")
    committed = gzip.decompress(make_reviews.REVIEWS.read_bytes())

    assert gzip.decompress((tmp_path / "again.csv.gz").read_bytes()) == committed
    rows = list(csv.DictReader(io.StringIO(committed.decode())))
    assert {row["written_at"][:10] for row in rows} == {
        f"2026-11-{day:02d}" for day in range(1, 15)
    }
    assert not [row for row in rows if "{" in row["title"] + row["body"]]

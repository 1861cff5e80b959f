"""The job folder of a queue says when it is drained; a mistake in it is named."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from include.errors import JobSpecError
from include.job_spec import JOBS_ROOT, JobSpec
from include.queue_spec import Drain, Group, group_spec, load_queue

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
BODIES = Group("", "/v1/responses", "gpt-5-mini")


def due(waiting: int, oldest: datetime | None, **parts: Any) -> bool:
    return Drain(**parts).is_due(waiting, oldest, NOON)


def test_requests_are_taken_when_many_wait() -> None:
    """From `min_requests` on, however young they are."""
    assert due(10, NOON, min_requests=10)
    assert not due(9, NOON, min_requests=10)


def test_requests_are_taken_when_the_oldest_has_waited() -> None:
    """From `max_age_minutes` on, however few they are."""
    assert due(1, NOON - HOUR, max_age_minutes=60)
    assert not due(99, NOON - HOUR + timedelta(seconds=1), max_age_minutes=60)


def test_requests_are_taken_every_day() -> None:
    """What was put before the daily moment is taken at the first look after it, not later ones."""
    assert due(1, NOON - 3 * HOUR, daily_at="10:00")
    assert not due(1, NOON - HOUR, daily_at="10:00")
    assert not due(1, NOON - 3 * HOUR, daily_at="13:00")
    assert due(1, NOON - 24 * HOUR, daily_at="13:00")


def test_the_day_is_that_of_the_time_zone() -> None:
    """10:00 in Tokyo is 01:00 UTC."""
    assert due(1, NOON - 12 * HOUR, daily_at="10:00", timezone="Asia/Tokyo")
    assert not due(1, NOON - 10 * HOUR, daily_at="10:00", timezone="Asia/Tokyo")


def test_one_occasion_is_enough() -> None:
    """Each of the three is judged by itself."""
    every = {"min_requests": 10, "max_age_minutes": 60, "daily_at": "10:00"}

    assert due(10, NOON, **every)
    assert due(1, NOON - HOUR, **every)
    assert due(1, NOON - 3 * HOUR, **every)
    assert not due(1, NOON, **every)


def test_an_empty_queue_is_never_due() -> None:
    """Not even at night."""
    assert not due(0, None, min_requests=1, daily_at="10:00")


def write(folder: Path, text: str) -> None:
    (folder / "requests").mkdir()
    (folder / "requests" / "job.yaml").write_text(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("source: {queue: {}}", "job.yaml:1: source.queue: needs one of min_requests"),
        ("source:\n  queue: {min_request: 5}", r"job.yaml:2: source.queue.min_request: unknown"),
        ("source: {queue: {daily_at: 12:30}}", r"must be a time of the day in quotes.*found 750"),
        ("source: {queue: {daily_at: '25:00'}}", "must be a time of the day"),
        ("source: {queue: {min_requests: 1, timezone: Mars}}", "must be a time zone such as UTC"),
        ("source: {queue: {min_requests: 0}}", "source.queue.min_requests"),
        ("request: {}", "source: is missing"),
        ("source: [", "job.yaml:1: is not valid YAML"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, message: str) -> None:
    """With file, line and key."""
    write(tmp_path, text)

    with pytest.raises(JobSpecError, match=message):
        load_queue("requests", tmp_path)


def test_a_queue_that_is_not_there_is_named(tmp_path: Path) -> None:
    """The message has the file that was looked for."""
    with pytest.raises(JobSpecError, match=r"no file .*/requests/job\.yaml"):
        load_queue("requests", tmp_path)


def test_a_group_of_bodies_is_a_job_without_a_prompt() -> None:
    """Endpoint and model are the group's, everything else is the queue's, and it can be pinned."""
    queue = load_queue("request_queue")

    spec = group_spec(queue, BODIES)

    assert (spec.request.endpoint, spec.request.model) == ("/v1/responses", "gpt-5-mini")
    assert (spec.request.prompt, spec.retry) == (None, queue.retry)
    assert JobSpec.from_json(spec.to_json()) == spec


def test_a_group_of_a_job_asks_what_the_job_asks() -> None:
    """Prompt, model, schema and params are those of the job's folder."""
    spec = group_spec(load_queue("request_queue"), Group("ticket_triage", "", ""))

    assert spec.request.prompt is not None
    assert spec.request.output_schema is not None
    assert spec.name == "request_queue"
    assert JobSpec.from_json(spec.to_json()) == spec


def test_groups_never_share_a_run() -> None:
    """The digest tells groups apart, also a job from bodies for the same model."""
    queue = load_queue("request_queue")
    groups = [BODIES, Group("", "/v1/responses", "gpt-4o"), Group("ticket_triage", "", "")]
    groups += [Group("", "/v1/chat/completions", "gpt-4o"), Group("commit_labels", "", "")]

    assert len({group_spec(queue, one).digest for one in groups}) == len(groups)


def test_a_job_whose_answers_have_a_request_id_cannot_be_queued(tmp_path: Path) -> None:
    """Its column would be taken for the queue's own."""
    folder = tmp_path / "labels"
    folder.mkdir()
    for name in ("job.yaml", "rows.sql", "prompt.md", "output.schema.json"):
        text = (JOBS_ROOT / "ticket_triage" / name).read_text()
        (folder / name).write_text(text.replace('"needs_human"', '"request_id"'))

    with pytest.raises(JobSpecError, match=r"labels cannot be asked through a queue.*request_id"):
        group_spec(load_queue("request_queue"), Group("labels", "", ""), tmp_path)

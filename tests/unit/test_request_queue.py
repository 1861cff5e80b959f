"""Applications put requests, ask for them and cancel them, any number at once."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from include import ledger_tables as tables
from include.errors import (
    ConfigurationError,
    RequestRefusedError,
    TransientError,
    UnknownRequestError,
)
from include.ledger import Ledger
from include.queue_records import RequestState
from include.queue_request import QueueRequest
from include.request_queue import RequestQueue, main

BODY = {"model": "gpt-5-mini", "input": "canary-row-text"}
TICKET = {"subject": "Late", "body": "canary-row-text", "channel": "mail", "customer_tier": "pro"}
URL = "/v1/responses"


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def url(request: pytest.FixtureRequest, empty_ledger: Path, tmp_path: Path) -> Iterator[str]:
    """A database with an empty queue."""
    if request.param == "sqlite":
        yield f"sqlite:///{shutil.copy(empty_ledger, tmp_path / 'ledger.db')}"
        return
    found = request.getfixturevalue("empty_postgres_url")
    Ledger(sa.create_engine(found)).engine.dispose()
    yield found


@pytest.fixture
def queue(url: str) -> Iterator[RequestQueue]:
    queue = RequestQueue(url)
    yield queue
    queue.engine.dispose()


def end(queue: RequestQueue, request_id: str, **values: Any) -> None:
    """Let a request end as a run would."""
    with queue.engine.begin() as connection:
        connection.execute(
            sa.update(tables.queue).where(tables.queue.c.request_id == request_id).values(**values)
        )


def test_a_request_waits_until_a_run_takes_it(queue: RequestQueue) -> None:
    """What was put is queued, with the time of the database, and has no answer yet."""
    assert queue.put("r1", endpoint=URL, body=BODY)

    found = queue.result("r1")
    assert (found.state, found.has_ended, found.answer) == (RequestState.QUEUED, False, None)
    assert abs(found.queued_at - datetime.now(UTC)) < timedelta(minutes=5)
    assert queue.state("r1") == "queued"


def test_putting_the_same_again_changes_nothing(queue: RequestQueue) -> None:
    """The order of keys is not another request; nor is a state that has moved on."""
    queue.put("r1", endpoint=URL, body=BODY)
    end(queue, "r1", state="completed", answer="yes")

    again = queue.put("r1", endpoint=URL, body=dict(reversed(BODY.items())))

    assert again is False
    assert queue.result("r1").answer == "yes"


@pytest.mark.parametrize(
    "other",
    [
        {"endpoint": URL, "body": BODY | {"input": "else"}},
        {"endpoint": URL, "body": BODY | {"store": True}},
        {"endpoint": "/v1/chat/completions", "body": BODY},
        {"job": "ticket_triage", "row": TICKET},
    ],
)
def test_an_id_stands_for_one_request(queue: RequestQueue, other: dict[str, Any]) -> None:
    """The same id with another request is an error that names the id, and changes nothing."""
    queue.put("r1", endpoint=URL, body=BODY | {"store": 1})

    with pytest.raises(RequestRefusedError, match=r"'r1' is there already .*another id"):
        queue.put("r1", **other)

    assert queue.statistics().total == 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"endpoint": "/v1/response", "body": BODY}, "unknown endpoint '/v1/response' .did you"),
        ({"endpoint": "/v1/responses", "body": ["x"]}, "body is a list; expected an object"),
        ({"endpoint": URL, "body": {"input": "x"}}, r"body\.model is missing; expected the name"),
        ({"endpoint": URL, "body": {"model": 5}}, r"body\.model is of type int"),
        ({"endpoint": URL, "body": BODY | {"stream": True}}, "body sets stream, which a batch"),
        ({"endpoint": URL, "body": BODY | {"input": float("nan")}}, "body holds something that"),
        ({"endpoint": URL, "body": BODY | {"input": "\ud800"}}, "body holds a lone surrogate"),
        ({"endpoint": URL}, "endpoint given; expected either endpoint and body, or job and row"),
        ({}, "nothing given; expected either"),
        ({"endpoint": URL, "body": BODY, "job": "x", "row": {}}, "body and endpoint and job and"),
        ({"job": "ticket_triage", "row": {"subject": "x"}}, "row lacks .*body.* prompt.md of job"),
        ({"job": "ticket_triage", "row": TICKET | {"body": None}}, "row lacks body, or it is null"),
        ({"job": "ticket_triage", "row": [1]}, "row is a list; expected an object"),
        ({"job": "ticket_triag", "row": TICKET}, "no job 'ticket_triag' .did you mean 'ticket_tr"),
        ({"job": "../jobs/x", "row": TICKET}, "there is no job"),
        ({"job": "request_queue", "row": TICKET}, "there is no job 'request_queue'"),
        ({"endpoint": URL, "body": BODY, "priority": 1.5}, "priority must be a whole number"),
    ],
)
def test_a_wrong_request_is_refused(
    queue: RequestQueue, request_: dict[str, Any], message: str
) -> None:
    """The error names the request, what is wrong and what was expected, and no text of it."""
    with pytest.raises(RequestRefusedError, match=message) as caught:
        queue.put("r1", **request_)

    assert "Request 'r1', number 1 of the call" in str(caught.value)
    assert "canary" not in str(caught.value)
    assert queue.statistics().total == 0


@pytest.mark.parametrize("request_id", ["", "x" * 201, "a\nb", 7, None])
def test_an_id_is_a_text_that_can_be_printed(queue: RequestQueue, request_id: Any) -> None:
    """Anything else is refused before the database sees it."""
    with pytest.raises(RequestRefusedError, match="request_id"):
        queue.put(request_id, endpoint=URL, body=BODY)


def test_a_field_that_is_not_there_is_named(queue: RequestQueue) -> None:
    """A mapping with a misspelt key is no request."""
    with pytest.raises(RequestRefusedError, match="its fields are request_id, prio; expected"):
        queue.put_many([{"request_id": "r1", "prio": 3}])


def test_many_are_put_at_once(queue: RequestQueue) -> None:
    """Only new ones count; an error names the number of the request, and may be mended."""
    many: list[Any] = [QueueRequest(f"r{n}", URL, BODY) for n in range(2_500)]
    wrong = [*many, {"request_id": "last", "endpoint": URL, "body": {}}]

    with pytest.raises(RequestRefusedError, match="'last', number 2501 of the call"):
        queue.put_many(iter(wrong))

    assert queue.statistics().queued == 2_000
    assert queue.put_many(many) == 500


def test_writers_that_put_the_same_put_it_once(url: str) -> None:
    """Eight writers with the same ids: each request is there once, nobody fails."""
    many = [QueueRequest(f"r{n}", URL, BODY) for n in range(300)]

    def put(number: int) -> int:
        turned = many[number * 30 :] + many[: number * 30]
        return RequestQueue(sa.create_engine(url, poolclass=sa.NullPool)).put_many(turned)

    with ThreadPoolExecutor(8) as pool:
        new = sum(pool.map(put, range(8)))

    assert new == 300
    assert RequestQueue(url).statistics().queued == 300


def test_only_what_waits_can_be_cancelled(queue: RequestQueue) -> None:
    """A cancelled request has ended; one that a run has taken goes its way."""
    queue.put_many([QueueRequest("r1", URL, BODY), QueueRequest("r2", URL, BODY)])
    end(queue, "r2", state="processing")

    assert [queue.cancel("r1"), queue.cancel("r1"), queue.cancel("r2")] == [True, True, False]

    assert queue.result("r1").has_ended
    assert (queue.state("r1"), queue.state("r2")) == ("cancelled", "processing")


def test_an_unknown_id_is_said(queue: RequestQueue) -> None:
    """State, result, cancel and wait all say so."""
    for ask in (queue.state, queue.result, queue.cancel, lambda name: queue.wait(name, 1)):
        with pytest.raises(UnknownRequestError, match="no request 'r9'"):
            ask("r9")


def test_waiting_ends_with_the_request(queue: RequestQueue) -> None:
    """However it ended; a request that has not ended by then is a TimeoutError."""
    queue.put("r1", endpoint=URL, body=BODY)
    with pytest.raises(TimeoutError, match=r"'r1' is queued after 0\.01 s"):
        queue.wait("r1", 0.01, poll=0.001)
    end(queue, "r1", state="failed", reason="refusal", ended_at=datetime.now(UTC))

    found = queue.wait("r1", 5)

    assert (found.state, found.reason) == (RequestState.FAILED, "refusal")


def test_an_answer_may_be_json(queue: RequestQueue) -> None:
    """`json()` reads the answer; a text that is no JSON raises ValueError."""
    queue.put("r1", endpoint=URL, body=BODY)
    end(queue, "r1", state="completed", answer='{"topic": "late"}')

    assert queue.result("r1").json() == {"topic": "late"}
    end(queue, "r1", answer="late")
    with pytest.raises(ValueError, match="Expecting value"):
        queue.result("r1").json()


def test_statistics_count_by_state(queue: RequestQueue) -> None:
    """Every state is there, those without requests too, and the age of the oldest that waits."""
    queue.put_many(QueueRequest(f"r{n}", URL, BODY) for n in range(6))
    for number, state in enumerate(("processing", "completed", "completed", "failed")):
        end(queue, f"r{number}", state=state)
    queue.cancel("r4")
    old = datetime(2026, 11, 1, 8, tzinfo=UTC)
    end(queue, "r5", queued_at=old)

    found = queue.statistics()

    assert (found.queued, found.processing, found.completed) == (1, 1, 2)
    assert (found.failed, found.cancelled, found.total) == (1, 1, 6)
    assert found.oldest_queued_at == old


def test_finished_requests_are_deleted_by_age(
    queue: RequestQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what ended before the given time goes; what waits or is at work stays for ever."""
    monkeypatch.setattr("include.request_queue.DELETED_AT_ONCE", 2)
    queue.put_many(QueueRequest(f"r{n}", URL, BODY) for n in range(8))
    old, new = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 3, 1, tzinfo=UTC)
    for number in range(5):
        end(queue, f"r{number}", state="completed", ended_at=old)
    end(queue, "r5", state="failed", ended_at=new)

    assert queue.delete_finished(datetime(2026, 2, 1, tzinfo=UTC)) == 5

    assert queue.statistics().total == 3
    assert queue.state("r5") == "failed"


def test_plain_sql_puts_a_request(queue: RequestQueue) -> None:
    """An INSERT of the documented columns is all that an application without Python needs."""
    with queue.engine.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO llm_batch_queue (request_id, endpoint, body, priority) "
                "VALUES ('r1', '/v1/responses', :body, 5)"
            ),
            {"body": json.dumps(BODY)},
        )

    assert queue.state("r1") == "queued"
    assert queue.put("r1", endpoint=URL, body=BODY) is False


def test_a_state_that_is_none_is_refused_by_the_database(queue: RequestQueue) -> None:
    """Whoever writes the table by SQL cannot invent a state."""
    queue.put("r1", endpoint=URL, body=BODY)
    with pytest.raises(sa.exc.IntegrityError):
        end(queue, "r1", state="done")


def test_an_application_without_job_folders_leaves_rows_to_the_drain(url: str) -> None:
    """With `jobs_root=None` a row is only checked to be an object."""
    queue = RequestQueue(url, jobs_root=None)

    assert queue.put("r1", job="somewhere_else", row={"a": 1})
    with pytest.raises(RequestRefusedError, match="row is a text"):
        queue.put("r2", job="somewhere_else", row="a")  # type: ignore[arg-type]


def test_a_database_without_a_queue_says_what_to_do(tmp_path: Path) -> None:
    """The message names the command that makes the tables, and the command makes them."""
    url = f"sqlite:///{tmp_path}/empty.db"
    with pytest.raises(ConfigurationError, match=r"no such table.*request_queue --url URL create"):
        RequestQueue(url).put("r1", endpoint=URL, body=BODY)

    assert main(["--url", url, "create"]) == 0

    assert RequestQueue(url).put("r1", endpoint=URL, body=BODY)


def test_the_command_prints_statistics(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line for each count."""
    RequestQueue(url).put("r1", endpoint=URL, body=BODY)

    assert main(["--url", url, "statistics"]) == 0

    assert re.search(r"^queued +1$", capsys.readouterr().out, re.MULTILINE)


def test_a_database_that_is_away_is_transient() -> None:
    """The application may call again; nothing of the request is in the message."""
    queue = RequestQueue("postgresql+psycopg://nobody@127.0.0.1:1/none")

    with pytest.raises(TransientError, match="did not answer") as caught:
        queue.put("r1", endpoint=URL, body=BODY)

    assert "canary" not in str(caught.value)


def test_another_database_is_refused() -> None:
    """The guarantees rest on what PostgreSQL and SQLite do."""
    with pytest.raises(ConfigurationError, match="not on mssql"):
        RequestQueue("mssql+pyodbc://host/database")

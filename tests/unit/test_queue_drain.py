"""A drain takes what waits, each request into one run, whoever dies or gets in between."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from include import ledger_tables as tables
from include import queue_drain
from include.errors import TransientError
from include.job_spec import JOBS_ROOT
from include.ledger import Ledger
from include.ledger_records import Run
from include.queue_drain import drain, waiting
from include.queue_request import QueueRequest
from include.queue_spec import QueueSpec
from include.request_queue import RequestQueue

URL = "/v1/responses"
TICKET = {"subject": "Late", "body": "text", "channel": "mail", "customer_tier": "pro"}
SPEC = QueueSpec.model_validate({"name": "q", "source": {"queue": {"min_requests": 1}}})


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def ledger(request: pytest.FixtureRequest, empty_ledger: Path, tmp_path: Path) -> Iterator[Ledger]:
    if request.param == "sqlite":
        url = f"sqlite:///{shutil.copy(empty_ledger, tmp_path / 'ledger.db')}"
    else:
        url = request.getfixturevalue("empty_postgres_url")
    ledger = Ledger(sa.create_engine(url))
    yield ledger
    ledger.engine.dispose()


@pytest.fixture
def queue(ledger: Ledger) -> RequestQueue:
    return RequestQueue(ledger.engine)


def ask(request_id: str, model: str = "gpt-5-mini", **more: Any) -> QueueRequest:
    return QueueRequest(request_id, URL, {"model": model, "input": "text"}, **more)


def take(ledger: Ledger, **more: Any) -> list[Run]:
    return drain(ledger, SPEC, dag_id="q", **more)


def insert(ledger: Ledger, **values: Any) -> None:
    """What an application does by plain SQL."""
    names = ", ".join(values)
    marks = ", ".join(f":{name}" for name in values)
    statement = f"INSERT INTO llm_batch_queue ({names}) VALUES ({marks})"  # noqa: S608 - ours
    with ledger.engine.begin() as connection:
        connection.execute(sa.text(statement), values)


def runs_of(ledger: Ledger) -> dict[str, str | None]:
    """The run that has each request."""
    query = sa.select(tables.queue.c.request_id, tables.queue.c.run_id)
    with ledger.engine.connect() as connection:
        return dict(iter(connection.execute(query)))


def test_each_group_is_a_run(ledger: Ledger, queue: RequestQueue) -> None:
    """Requests of one endpoint and model go together; a job's rows go by themselves."""
    queue.put_many([ask("a"), ask("b", "gpt-4o"), ask("c")])
    queue.put("d", job="ticket_triage", row=TICKET)
    body = {"model": "gpt-4o", "messages": []}
    queue.put("e", endpoint="/v1/chat/completions", body=body)

    runs = take(ledger)

    found = runs_of(ledger)
    assert len(runs) == 4
    assert found["a"] == found["c"]
    assert {one.run_id for one in runs} == set(found.values())
    assert queue.statistics().processing == 5
    assert len({one.dag_run_id for one in runs}) == 4


def test_it_must_be_time(ledger: Ledger, queue: RequestQueue) -> None:
    """Before `min_requests` wait nothing is taken, unless everything is asked for."""
    spec = QueueSpec.model_validate({"name": "q", "source": {"queue": {"min_requests": 3}}})
    queue.put_many([ask("a"), ask("b")])

    early = drain(ledger, spec, dag_id="q")
    asked = drain(ledger, spec, dag_id="q", everything=True)

    assert early == []
    assert len(asked) == 1
    assert queue.statistics().processing == 2


def test_the_age_is_that_of_the_oldest(ledger: Ledger, queue: RequestQueue) -> None:
    """A cancelled one is not waiting."""
    spec = QueueSpec.model_validate({"name": "q", "source": {"queue": {"max_age_minutes": 30}}})
    queue.put_many([ask("a"), ask("b")])
    later = datetime.now(UTC) + timedelta(minutes=31)

    assert drain(ledger, spec, dag_id="q") == []
    assert len(drain(ledger, spec, dag_id="q", moment=later)) == 1


def test_an_empty_queue_makes_no_run(ledger: Ledger) -> None:
    """Not even when everything is asked for."""
    assert take(ledger, everything=True) == []
    assert ledger.runs("q") == []


def test_waiting_is_counted_no_further_than_needed(ledger: Ledger, queue: RequestQueue) -> None:
    """A look at a long queue reads a few lines of an index."""
    queue.put_many(ask(f"r{n}") for n in range(9))

    assert waiting(ledger, 4).requests == 4
    assert waiting(ledger, 99).requests == 9


def test_a_drain_that_died_after_the_claim_is_picked_up(
    ledger: Ledger, queue: RequestQueue
) -> None:
    """The run that nobody has extracted is returned again, and takes no other request."""
    queue.put("a", endpoint=URL, body={"model": "m", "input": "x"})
    (first,) = take(ledger)
    queue.put("b", endpoint=URL, body={"model": "m", "input": "x"})

    runs = take(ledger)

    assert first in runs
    assert len(runs) == 2
    assert runs_of(ledger)["a"] == first.run_id


def test_a_run_that_has_its_snapshot_is_left_to_airflow(
    ledger: Ledger, queue: RequestQueue
) -> None:
    """Whoever extracted it is at work, or a person clears it."""
    queue.put("a", endpoint=URL, body={"model": "m", "input": "x"})
    (run,) = take(ledger)
    ledger.keep_snapshot(run.run_id, "{}", 1, instead_of=None)

    assert take(ledger) == []


def test_a_claim_that_fails_changes_nothing(
    ledger: Ledger, queue: RequestQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run and the requests are one transaction: neither is there when it is undone."""
    queue.put("a", endpoint=URL, body={"model": "m", "input": "x"})

    def dies(*arguments: Any) -> None:
        take_now(*arguments)
        raise TransientError("the process ends here")

    take_now = queue_drain._take
    monkeypatch.setattr(queue_drain, "_take", dies)
    with pytest.raises(TransientError):
        take(ledger)
    monkeypatch.undo()

    assert ledger.runs("q") == []
    assert queue.state("a") == "queued"
    assert len(take(ledger)) == 1


def test_drains_at_once_take_each_request_once(ledger: Ledger, queue: RequestQueue) -> None:
    """Eight drains and a writer: every request has one run, and no run is empty."""
    url = ledger.engine.url.render_as_string(hide_password=False)
    queue.put_many(ask(f"a{n}", f"m{n % 3}") for n in range(90))

    def drains(number: int) -> None:
        own = Ledger(sa.create_engine(url, poolclass=sa.NullPool))
        RequestQueue(own.engine).put_many(ask(f"b{number}-{n}", f"m{n % 3}") for n in range(9))
        drain(own, SPEC, dag_id="q")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(drains, range(8)))
    take(ledger)

    found = runs_of(ledger)
    assert len(found) == 90 + 72
    assert None not in found.values()
    assert set(found.values()) == {one.run_id for one in ledger.runs("q")}


def test_what_is_cancelled_is_not_taken(ledger: Ledger, queue: RequestQueue) -> None:
    """Nor is a run made of a group in which nobody waits any more."""
    queue.put_many([ask("a"), ask("b", "gpt-4o")])
    queue.cancel("b")

    (run,) = take(ledger)

    assert runs_of(ledger) == {"a": run.run_id, "b": None}
    assert queue.cancel("a") is False


@pytest.mark.parametrize(
    "ledger", [pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True
)
def test_a_row_that_is_being_cancelled_is_left_to_its_application(
    ledger: Ledger, queue: RequestQueue
) -> None:
    """The drain does not wait for a lock that an application holds, and takes the others."""
    queue.put_many([ask("a"), ask("b")])
    queue_drain.sort(ledger, queue._check)
    with ledger.engine.connect() as application, application.begin():
        application.execute(
            sa.update(tables.queue)
            .where(tables.queue.c.request_id == "a")
            .values(state="cancelled", ended_at=datetime.now(UTC))
        )

        (run,) = take(ledger)

    assert runs_of(ledger) == {"a": None, "b": run.run_id}
    assert queue.state("a") == "cancelled"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"endpoint": "/v1/response", "body": '{"model": "m"}'}, "unknown endpoint"),
        ({"endpoint": URL, "body": "not json canary"}, "body is not valid JSON"),
        ({"endpoint": URL, "body": '{"model": NaN}'}, "body is not valid JSON"),
        ({"endpoint": URL, "body": '"canary"'}, "body is a text; expected an object"),
        ({"endpoint": URL, "body": "null"}, "body is null"),
        ({"endpoint": URL, "body": '{"input": "canary"}'}, "body.model is missing"),
        ({"endpoint": URL, "body": '{"model": "m", "stream": true}'}, "body sets stream"),
        ({"endpoint": URL}, "endpoint given; expected either"),
        ({"job": "no_such_job", "job_row": "{}"}, "there is no job 'no_such_job'"),
        ({"job": "ticket_triage", "job_row": '{"subject": "canary"}'}, "row lacks"),
        ({"job": "ticket_triage", "job_row": "[]"}, "row is a list"),
        ({"job": "ticket_triage"}, "job given; expected either"),
    ],
)
def test_a_wrong_row_of_plain_sql_fails_alone(
    ledger: Ledger,
    queue: RequestQueue,
    caplog: pytest.LogCaptureFixture,
    values: dict[str, Any],
    message: str,
) -> None:
    """It has failed with the reason; the others go on, and no text of it is told."""
    insert(ledger, request_id="bad", **values)
    queue.put_many([ask("good")])

    (run,) = take(ledger)

    found = queue.result("bad")
    assert (found.state, found.reason) == ("failed", "bad_request")
    assert message in str(found.error_message)
    assert found.ended_at is not None
    assert runs_of(ledger) == {"bad": None, "good": run.run_id}
    assert "canary" not in f"{found.error_message} {caplog.text}"


def test_a_request_without_an_id_fails_as_well(ledger: Ledger, queue: RequestQueue) -> None:
    """An empty text is no id, whoever wrote it: it does not wait for ever."""
    insert(ledger, request_id="", endpoint=URL, body='{"model": "gpt-5-mini", "input": "x"}')

    take(ledger)

    assert (queue.result("").state, queue.result("").reason) == ("failed", "bad_request")
    assert queue.statistics().queued == 0


def test_requests_of_a_broken_job_wait_until_it_is_mended(
    ledger: Ledger, queue: RequestQueue, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A bad deployment must not fail what applications have asked; it is told as an error."""
    jobs = tmp_path / "jobs"
    shutil.copytree(JOBS_ROOT, jobs)
    queue.put("a", job="ticket_triage", row=TICKET)
    queue.put_many([ask("b")])
    (jobs / "ticket_triage" / "prompt.md").unlink()

    (run,) = take(ledger, jobs_root=jobs)

    assert runs_of(ledger) == {"a": None, "b": run.run_id}
    assert queue.state("a") == "queued"
    assert "1 request goes on waiting until the job is mended" in caplog.text
    shutil.copy(JOBS_ROOT / "ticket_triage" / "prompt.md", jobs / "ticket_triage")
    assert len(take(ledger, jobs_root=jobs)) == 2


def test_a_job_that_breaks_after_sorting_waits_as_well(
    ledger: Ledger, queue: RequestQueue, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its group is not claimed; the others are."""
    queue.put("a", job="ticket_triage", row=TICKET)
    queue.put_many([ask("b")])
    queue_drain.sort(ledger, queue._check)

    (run,) = take(ledger, jobs_root=tmp_path)

    assert runs_of(ledger) == {"a": None, "b": run.run_id}
    assert [one.levelno for one in caplog.records if "on waiting" in one.message] == [logging.ERROR]


def test_many_are_sorted_in_pieces(
    ledger: Ledger, queue: RequestQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No transaction holds more than a few rows, and none is left out."""
    monkeypatch.setattr(queue_drain, "SORTED_AT_ONCE", 7)
    queue.put_many(ask(f"r{n}") for n in range(23))

    take(ledger)

    assert queue.statistics().processing == 23


def test_the_history_tells_of_the_claim(ledger: Ledger, queue: RequestQueue) -> None:
    """Who looks at night finds how many requests a run began with."""
    queue.put_many([ask("a"), ask("b")])

    (run,) = take(ledger)

    assert "2 requests claimed" in [event["detail"] for event in ledger.history(run.run_id)]

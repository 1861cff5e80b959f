"""The promise under test: one batch per request file, by the simulator's own count."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import sqlalchemy as sa

from include.artifacts import Artifacts
from include.batch_api import BatchApi
from include.batch_view import BatchView
from include.duplicate_batches import find_duplicates
from include.errors import (
    ConfigurationError,
    TransientError,
    UnknownOutcomeError,
)
from include.ledger import Ledger
from include.ledger_records import Batch, BatchState, NewBatch, Partition
from include.local_stack.rest import wait_until
from include.simulator.process import Simulator
from include.submission import Submission, SubmissionPolicy, SubmitLaterError
from include.waiting import Verdict, WaitPolicy, look

QUICK = SubmissionPolicy(grace=0.05, lease=0.0, busy_pause=0.1, file_pause=0.05)
PATIENCE = 120.0  # seconds
CREATE = {"method": "POST", "path": "/batches$"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    with Simulator.start(tmp_path_factory.mktemp("simulator"), instant=True) as simulator:
        yield simulator


@pytest.fixture(autouse=True)
def _no_faults(service: Simulator) -> Iterator[None]:
    yield
    service.clear_faults()


class Desk:
    """One request file in a ledger, and what is needed to submit it."""

    def __init__(self, service: Simulator, folder: Path, lines: int = 3) -> None:
        self.service = service
        self.ledger = Ledger(sa.create_engine(f"sqlite:///{folder}/ledger.db"))
        self.artifacts = Artifacts(folder)
        content = b"".join(_line(number, folder.name) for number in range(lines))
        with self.artifacts.create("requests.jsonl") as stream:
            stream.write(content)
        day = datetime(2026, 11, 1, tzinfo=UTC)
        run = self.ledger.open_run(
            Partition("job", day, day + timedelta(days=1)),
            spec_digest=hashlib.sha256(str(folder).encode()).hexdigest(),
            spec="{}",
            mode="normal",
            dag_id="job",
            dag_run_id="one",
        )
        new = NewBatch(
            run_id=run.run_id,
            job="job",
            round=1,
            shard=0,
            conn_id="openai_default",
            endpoint="/v1/chat/completions",
            model="gpt-4o-mini",
            request_file="requests.jsonl",
            index_file=None,
            content_digest=hashlib.sha256(content).hexdigest(),
            requests=lines,
            bytes=len(content),
            input_tokens=100,
        )
        (self.row,) = self.ledger.build_round(run.run_id, 1, [new])

    def api(self, key: str = "sk-test", url: str | None = None, patience: float = 60.0) -> BatchApi:
        """An API whose answers count as lost after `patience` seconds."""
        client = openai.OpenAI(api_key=key, base_url=url or self.service.base_url)
        return BatchApi(client, create_timeout=patience)

    def submit(
        self,
        policy: SubmissionPolicy = QUICK,
        *,
        api: BatchApi | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> Batch:
        submission = Submission(self.ledger, api or self.api(), self.artifacts, policy, sleep)
        return submission.submit(self.row.submission_id)

    def upload(self) -> str:
        """Upload the file as a worker would that dies before it can record anything."""
        with self.artifacts.local("requests.jsonl") as path:
            return self.api().upload(path, "requests.jsonl", keep_seconds=None)

    def post(self, file_id: str) -> BatchView:
        """Create a batch with this file's id, likewise."""
        return self.api().create(
            file_id=file_id,
            endpoint=self.row.endpoint,
            metadata={"submission_id": self.row.submission_id},
            keep_seconds=None,
        )

    def at_the_api(self) -> list[dict[str, Any]]:
        """The batches that carry this file's id, as the simulator counts them."""
        return [
            one
            for one in self.service.batches()["batches"]
            if (one.get("metadata") or {}).get("submission_id") == self.row.submission_id
        ]


def _line(number: int, salt: str) -> bytes:
    return (
        b'{"custom_id":"%s-%d","method":"POST","url":"/v1/chat/completions","body":{"model":'
        b'"gpt-4o-mini","messages":[{"role":"user","content":"hello"}]}}\n'
    ) % (salt.encode(), number)


@pytest.fixture
def desk(service: Simulator, tmp_path: Path) -> Desk:
    return Desk(service, tmp_path)


def test_submitting_twice_makes_one_batch(desk: Desk) -> None:
    """A second call finds the first one's batch."""
    first = desk.submit()
    second = desk.submit()

    assert first.state == BatchState.SUBMITTED
    assert second.batch_id == first.batch_id
    assert [one["id"] for one in desk.at_the_api()] == [first.batch_id]


@pytest.mark.parametrize("fault", ["fail_after", "reset_after", "stall_after"])
def test_a_lost_answer_is_adopted_not_repeated(desk: Desk, fault: str) -> None:
    """The API made the batch and its answer was lost: it is found by its metadata."""
    is_stalled = fault == "stall_after"
    extra = {"seconds": 20.0} if is_stalled else {}
    (rule,) = desk.service.add_faults({"fault": fault, **CREATE, "nth": 1, **extra})

    row = desk.submit(api=desk.api(patience=1.0 if is_stalled else 60.0))

    assert desk.service.fired(rule["id"]) == 1
    assert [one["id"] for one in desk.at_the_api()] == [row.batch_id]


@pytest.mark.parametrize("fault", ["fail_before", "reset_before"])
def test_a_lost_request_is_sent_again_after_looking(desk: Desk, fault: str) -> None:
    """The API never saw the call: after two looks that find nothing, one batch is made."""
    (rule,) = desk.service.add_faults({"fault": fault, **CREATE, "nth": 1})

    row = desk.submit()

    assert desk.service.fired(rule["id"]) == 1
    assert [one["id"] for one in desk.at_the_api()] == [row.batch_id]


class Passing:
    """To sleep, until the faults of the API have passed; they are kept as they were then."""

    def __init__(self, service: Simulator) -> None:
        self._service = service
        self.faults: list[dict[str, Any]] = []

    def __call__(self, _seconds: float) -> None:
        self.faults = self.faults or self._service.faults()
        self._service.clear_faults()

    def fired(self, rule: dict[str, Any]) -> int:
        """How often a rule has fired until then."""
        return next(int(one["fired"]) for one in self.faults if one["id"] == rule["id"])


def test_a_batch_that_is_listed_late_is_still_adopted(desk: Desk) -> None:
    """The grace period covers a listing that lags behind."""
    (lag,) = desk.service.add_faults({"fault": "hide_new_batches", "seconds": 3_600})
    (lost,) = desk.service.add_faults({"fault": "reset_after", **CREATE, "nth": 1})
    grace = Passing(desk.service)

    row = desk.submit(sleep=grace)

    assert grace.fired(lag) == 1
    assert grace.fired(lost) == 1
    assert [one["id"] for one in desk.at_the_api()] == [row.batch_id]


def test_a_batch_that_is_listed_too_late_is_found_and_cancelled(desk: Desk) -> None:
    """Beyond the grace period a second batch is made: the older stays, it is recorded, one alert.

    This is the residual risk of `docs/promises.md`.
    """
    desk.service.add_faults({"fault": "hide_new_batches", "seconds": 3_600})
    (lost,) = desk.service.add_faults({"fault": "reset_after", **CREATE, "nth": 1})
    row = desk.submit()
    fired = desk.service.fired(lost["id"])
    desk.service.clear_faults()

    found = find_duplicates([row], desk.ledger, desk.api(), QUICK)

    assert fired == 1
    assert len(desk.at_the_api()) == 2
    assert found == 1
    (extra,) = desk.ledger.duplicates([row.submission_id])
    assert {extra["batch_id"], row.batch_id} == {one["id"] for one in desk.at_the_api()}
    assert find_duplicates([row], desk.ledger, desk.api(), QUICK) == 0


def test_a_crash_after_the_intent_looks_first(desk: Desk) -> None:
    """A worker died between its intent and the answer: the next one adopts what it made."""
    claim = desk.ledger.claim(
        desk.row.submission_id, owner="dead", lease=timedelta(0), enqueued_tokens=None
    )
    assert claim is not None
    made = desk.post(desk.upload())

    row = desk.submit()

    assert row.batch_id == made.batch_id
    assert len(desk.at_the_api()) == 1


def test_a_batch_in_doubt_is_nobodys_duplicate(desk: Desk) -> None:
    """Looking for duplicates leaves a batch alone whose answer was lost: it will be adopted."""
    claim = desk.ledger.claim(
        desk.row.submission_id, owner="dead", lease=timedelta(0), enqueued_tokens=None
    )
    assert claim is not None
    api = desk.api()
    made = desk.post(desk.upload())
    in_doubt = desk.ledger.batch(desk.row.submission_id)

    found = find_duplicates([in_doubt], desk.ledger, api, QUICK)

    assert found == 0
    assert api.retrieve(made.batch_id).status == "completed"
    assert desk.submit().batch_id == made.batch_id


def test_a_late_post_of_a_dead_worker_is_fenced(desk: Desk) -> None:
    """Before a takeover posts, it deletes the former file: a POST still on its way is refused."""
    claim = desk.ledger.claim(
        desk.row.submission_id, owner="slow", lease=timedelta(0), enqueued_tokens=None
    )
    assert claim is not None
    api = desk.api()
    file_id = desk.upload()
    desk.ledger.still_ours(claim.batch, file_id=file_id)
    row = desk.submit()

    late = desk.post(file_id)

    assert api.retrieve(late.batch_id).status == "failed"
    billed = {one["batch_id"]: one["requests"] for one in desk.service.bill()["by_batch"]}
    assert billed.get(late.batch_id, 0) == 0
    assert billed[row.batch_id] == row.requests


def test_a_batch_that_could_not_be_recorded_is_adopted(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The API answered and the ledger did not: the claim is not given back as if nothing was."""

    def away(*_: Any) -> bool:
        raise TransientError("The ledger database did not answer.")

    with monkeypatch.context() as broken:
        broken.setattr(desk.ledger, "submitted", away)
        with pytest.raises(TransientError):
            desk.submit()
    in_doubt = desk.ledger.batch(desk.row.submission_id)

    row = desk.submit()

    assert in_doubt.state == BatchState.SUBMITTING
    assert [one["id"] for one in desk.at_the_api()] == [row.batch_id]


class Slow(httpx2.BaseTransport):
    """Gives the first `POST /batches` up at once; it arrives after so many other calls."""

    def __init__(self, overtaken_by: int) -> None:
        self._left = overtaken_by
        self._late: httpx2.Request | None = None
        self._inner = httpx2.HTTPTransport()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        if self._late is None and request.method == "POST" and request.url.path == "/v1/batches":
            content = request.read()
            self._late = httpx2.Request(
                request.method, request.url, headers=request.headers, content=content
            )
            raise httpx2.ReadTimeout("no answer in time", request=request)
        response = self._inner.handle_request(request)
        if self._late is not None:
            response.read()
            self._left -= 1
            if self._left == 0:
                self._inner.handle_request(self._late).read()
        return response


@pytest.mark.parametrize("overtaken_by", [1, 2])
def test_a_post_that_arrives_during_the_second_look_is_adopted(
    desk: Desk, overtaken_by: int
) -> None:
    """Neither look saw it, and its file was still there: the look after the fence finds it."""
    client = openai.OpenAI(
        api_key="sk-test",
        base_url=desk.service.base_url,
        http_client=httpx2.Client(transport=Slow(overtaken_by)),
    )

    row = desk.submit(api=BatchApi(client))

    assert [one["id"] for one in desk.at_the_api()] == [row.batch_id]


def test_a_post_that_arrives_after_the_fence_costs_nothing(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    """Its file is gone: it fails and is recorded without alarm; the batch that works is kept."""
    client = openai.OpenAI(
        api_key="sk-test",
        base_url=desk.service.base_url,
        http_client=httpx2.Client(transport=Slow(3)),
    )

    row = desk.submit(api=BatchApi(client))

    status = {one["id"]: one["status"] for one in desk.at_the_api()}
    assert len(status) == 2
    assert status.pop(str(row.batch_id)) != "failed"
    assert list(status.values()) == ["failed"]
    assert find_duplicates([row], desk.ledger, desk.api(), QUICK) == 1
    assert [one.levelname for one in caplog.records if "refused" in one.getMessage()] == ["WARNING"]


class SlowThenDeaf(Slow):
    """Besides, the answer to the second `POST /batches` is lost, and lists lack what it made."""

    def __init__(self, overtaken_by: int) -> None:
        super().__init__(overtaken_by)
        self.hidden = ""  # the batch that is not listed yet
        self.hid = 0  # times

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        is_second = self._late is not None
        response = super().handle_request(request)
        if request.url.path != "/v1/batches":
            return response
        body = json.loads(response.read())
        if request.method == "POST" and is_second:
            self.hidden = body["id"]
            raise httpx2.ReadTimeout("no answer in time", request=request)
        listed = [one for one in body["data"] if one["id"] != self.hidden]
        self.hid += len(body["data"]) - len(listed)
        return httpx2.Response(200, json=body | {"data": listed}, request=request)

    def list_all(self, _seconds: float) -> None:
        """What the grace period is for: the list has the batch in the end."""
        self.hidden = ""


def test_a_refused_late_post_is_not_taken_for_a_batch_that_is_listed_late(desk: Desk) -> None:
    """The fence has refused the first POST; the second one works and is not in the list yet."""
    network = SlowThenDeaf(3)
    client = openai.OpenAI(
        api_key="sk-test",
        base_url=desk.service.base_url,
        http_client=httpx2.Client(transport=network),
    )

    row = desk.submit(api=BatchApi(client), sleep=network.list_all)

    status = {one["id"]: one["status"] for one in desk.at_the_api()}
    assert network.hid == 1
    assert status.pop(str(row.batch_id)) != "failed"
    assert list(status.values()) == ["failed"]


def test_two_workers_on_one_file_make_one_batch(desk: Desk) -> None:
    """Eight workers at once: one creates the batch, the others come back later and find it."""
    patient = replace(QUICK, lease=600.0)
    start = threading.Barrier(8)

    def attempt() -> str | None:
        try:
            return desk.submit(patient).batch_id
        except (SubmitLaterError, TransientError):
            return None

    def work(_: int) -> str:
        start.wait()
        return wait_until("the batch", PATIENCE, attempt, interval=0.05)

    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(work, range(8)))

    assert ids == {one["id"] for one in desk.at_the_api()}
    assert len(ids) == 1


def test_a_file_that_is_not_known_yet_is_waited_for(desk: Desk) -> None:
    """'File not found' right after the upload passes; the file is not uploaded again."""
    (rule,) = desk.service.add_faults({"fault": "file_not_found", "seconds": 3_600})
    uploads = desk.service.batches()["uploads"]
    pause = Passing(desk.service)

    row = desk.submit(sleep=pause)

    assert pause.fired(rule) == 1
    assert desk.service.batches()["uploads"] == uploads + 1
    assert [one["id"] for one in desk.at_the_api()] == [row.batch_id]


def test_the_token_limit_is_waited_out_with_the_same_file(desk: Desk) -> None:
    """`token_limit_exceeded` costs no retry: the caller is told when to come back."""
    (rule,) = desk.service.add_faults(
        {"fault": "token_limit", "enqueued_tokens": 0, "mode": "at_create", "times": 1}
    )
    uploads_before = desk.service.batches()

    with pytest.raises(SubmitLaterError) as later:
        desk.submit()
    file_id = desk.ledger.batch(desk.row.submission_id).file_id
    row = desk.submit()

    assert desk.service.fired(rule["id"]) == 1
    assert later.value.retry_after is not None
    assert later.value.retry_after > 0
    assert row.file_id == file_id
    uploads = desk.service.batches()["uploads"] - uploads_before["uploads"]
    assert uploads == 1


def test_a_rate_limit_is_waited_out(desk: Desk) -> None:
    """HTTP 429 on create: come back after Retry-After."""
    (rule,) = desk.service.add_faults(
        {"fault": "fail_before", **CREATE, "status": 429, "retry_after": 7.0, "times": 1}
    )

    with pytest.raises(SubmitLaterError) as later:
        desk.submit()

    assert desk.service.fired(rule["id"]) == 1
    assert later.value.retry_after is not None
    assert later.value.retry_after >= 7.0
    assert desk.submit().state == BatchState.SUBMITTED


def test_a_token_limit_that_comes_later_costs_no_round(desk: Desk) -> None:
    """The batch is created, then fails for the limit: the same file is submitted again."""
    (rule,) = desk.service.add_faults(
        {"fault": "token_limit", "enqueued_tokens": 0, "mode": "later", "times": 1}
    )
    refused = desk.submit()

    verdict = look(refused, desk.ledger, desk.api(), WaitPolicy())
    row = desk.submit()

    assert desk.service.fired(rule["id"]) == 1
    assert verdict is Verdict.RESUBMIT
    assert row.batch_id != refused.batch_id
    assert row.file_id == refused.file_id
    assert row.round == 1


def test_a_refused_key_names_the_way_out_and_keeps_the_secret(desk: Desk) -> None:
    """HTTP 401: nothing was sent, the message does not show the key, a good key goes on."""
    key = "wrong-canary-4711"

    with pytest.raises(ConfigurationError, match="API key") as refused:
        desk.submit(api=desk.api(key=key))

    assert "4711" not in str(refused.value)
    assert desk.ledger.batch(desk.row.submission_id).state == BatchState.PREPARED
    assert desk.submit().state == BatchState.SUBMITTED
    assert len(desk.at_the_api()) == 1


def test_a_server_that_is_not_there_is_transient(desk: Desk, monkeypatch: Any) -> None:
    """No server: nothing was created, the next try begins at once and without doubt."""
    monkeypatch.setattr("include.batch_api.FIRST_PAUSE", 0.01)

    with pytest.raises(TransientError, match="no answer"):
        desk.submit(api=desk.api(url="http://127.0.0.1:9/v1"))

    assert desk.ledger.batch(desk.row.submission_id).state == BatchState.PREPARED


def test_doubt_survives_an_api_that_goes_away(desk: Desk, monkeypatch: Any) -> None:
    """The answer was lost and the listing fails too: the next try still looks before it posts."""
    monkeypatch.setattr("include.batch_api.FIRST_PAUSE", 0.01)
    desk.service.add_faults({"fault": "reset_after", **CREATE, "nth": 1})
    (away,) = desk.service.add_faults(
        {"fault": "fail_before", "method": "GET", "path": "/batches$", "status": 500}
    )
    with pytest.raises((TransientError, UnknownOutcomeError)):
        desk.submit()
    in_doubt = desk.ledger.batch(desk.row.submission_id)
    desk.service.clear_faults()

    row = desk.submit()

    assert away["id"]
    assert in_doubt.state == BatchState.SUBMITTING
    assert [one["id"] for one in desk.at_the_api()] == [row.batch_id]


def test_a_damaged_request_file_is_never_sent(desk: Desk) -> None:
    """A file that is not as long as recorded is named, and nothing is created."""
    with desk.artifacts.create("requests.jsonl") as stream:
        stream.write(_line(0, "short"))

    with pytest.raises(TransientError, match=r"requests\.jsonl has \d+ bytes"):
        desk.submit()

    assert desk.at_the_api() == []

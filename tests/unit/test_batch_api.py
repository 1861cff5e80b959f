"""What each answer of the API means, and which calls are repeated."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from include.batch_api import BatchApi
from include.errors import (
    ConfigurationError,
    LLMBatchError,
    NotOfferedError,
    NotThereError,
    PermanentError,
    TransientError,
    UnknownOutcomeError,
)
from include.provider import AZURE, COMPATIBLE, OPENAI, ProviderProfile

CANARY = "canary row text, sk-canary"
Handler = Callable[[httpx2.Request], httpx2.Response]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("include.batch_api.FIRST_PAUSE", 0.0)


class Api:
    """A `BatchApi` whose every call is answered by `handler`, and counted."""

    def __init__(self, handler: Handler, profile: ProviderProfile = OPENAI) -> None:
        self.calls: list[httpx2.Request] = []

        def counted(request: httpx2.Request) -> httpx2.Response:
            self.calls.append(request)
            return handler(request)

        client = httpx2.Client(transport=httpx2.MockTransport(counted))
        self.api = BatchApi(
            openai.OpenAI(api_key="sk-test", base_url="http://api.test/v1", http_client=client),
            profile=profile,
        )

    def create(self) -> Any:
        return self.api.create(
            file_id="file-1",
            endpoint="/v1/responses",
            metadata={"submission_id": "s"},
            keep_seconds=None,
        )


def _refused(status: int, code: str | None = None, **headers: str) -> Handler:
    error = {"message": CANARY, "type": "invalid_request_error", "code": code, "param": None}

    def handler(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(status, json={"error": error}, headers=headers)

    handler.__name__ = f"{status} {code or ''}".strip()
    return handler


def _broken(error: type[Exception]) -> Handler:
    def handler(request: httpx2.Request) -> httpx2.Response:
        raise error(CANARY)

    handler.__name__ = error.__name__
    return handler


def _batch(number: int, created_at: int = 1_000) -> dict[str, Any]:
    return {
        "id": f"batch_{number}",
        "object": "batch",
        "endpoint": "/v1/responses",
        "input_file_id": "file-1",
        "completion_window": "24h",
        "status": "in_progress",
        "created_at": created_at,
    }


@pytest.mark.parametrize(
    ("handler", "expected"),
    [
        (_refused(500), UnknownOutcomeError),
        (_refused(503), UnknownOutcomeError),
        (_refused(408), UnknownOutcomeError),
        (_refused(409), UnknownOutcomeError),
        (_broken(httpx2.ReadTimeout), UnknownOutcomeError),
        (_broken(httpx2.ReadError), UnknownOutcomeError),
        (_broken(httpx2.RemoteProtocolError), UnknownOutcomeError),
        (_broken(httpx2.ConnectError), TransientError),
        (_broken(httpx2.ConnectTimeout), TransientError),
        (_refused(429), TransientError),
        (_refused(400, "token_limit_exceeded"), TransientError),
        (_refused(400, "file_not_found"), TransientError),
        (_refused(429, "insufficient_quota"), PermanentError),
        (_refused(400), PermanentError),
        (_refused(401), ConfigurationError),
        (_refused(403), ConfigurationError),
    ],
)
def test_creating_is_tried_once(handler: Handler, expected: type[LLMBatchError]) -> None:
    """One POST whatever comes back; a doubt is never taken for a refusal, nor the reverse."""
    api = Api(handler)

    with pytest.raises(expected) as raised:
        api.create()

    assert type(raised.value).__mro__.index(expected) <= 1
    assert len(api.calls) == 1
    assert "canary" not in str(raised.value)
    assert raised.value.__cause__ is None


@pytest.mark.parametrize(
    ("handler", "expected", "calls"),
    [
        (_refused(500), TransientError, 5),
        (_refused(429), TransientError, 5),
        (_broken(httpx2.ReadTimeout), TransientError, 5),
        (_broken(httpx2.ConnectError), TransientError, 5),
        (_refused(404), NotThereError, 1),
        (_refused(401), ConfigurationError, 1),
        (_refused(400), PermanentError, 1),
    ],
)
def test_reading_is_repeated_while_it_may_help(
    handler: Handler, expected: type[LLMBatchError], calls: int
) -> None:
    """Passing errors are tried five times, final ones once; no message is passed on."""
    api = Api(handler)

    with pytest.raises(expected) as raised:
        api.api.retrieve("batch_1")

    assert len(api.calls) == calls
    assert "canary" not in str(raised.value)


def test_retry_after_is_passed_on() -> None:
    """The caller learns when the API wants to be asked again."""
    with pytest.raises(TransientError) as raised:
        Api(_refused(429, **{"retry-after": "7"})).create()

    assert raised.value.retry_after == 7.0


def test_the_list_is_read_back_to_a_moment() -> None:
    """Pages follow one another by the last id, and end at the first batch that is too old."""
    batches = [_batch(number, created_at=10_000 - number) for number in range(350)]

    def handler(request: httpx2.Request) -> httpx2.Response:
        after = request.url.params.get("after")
        start = int(after.removeprefix("batch_")) + 1 if after else 0
        page = batches[start : start + 100]
        return httpx2.Response(200, json={"object": "list", "data": page, "has_more": True})

    api = Api(handler)

    found = list(api.api.newest(datetime.fromtimestamp(10_000 - 149, UTC)))

    assert [one.batch_id for one in found] == [f"batch_{number}" for number in range(150)]
    assert len(api.calls) == 2


def test_what_a_server_leaves_out_is_absent() -> None:
    """A batch without counts, errors, metadata and file ids can be read; "" is no id."""
    bare = {"id": "batch_1", "object": "batch", "status": "Canceled", "output_file_id": ""}

    seen = Api(lambda _: httpx2.Response(200, json=bare)).api.retrieve("batch_1")

    assert (seen.status, seen.is_final) == ("cancelled", True)
    assert (seen.output_file_id, seen.done, seen.problems, seen.submission_id) == (
        None,
        0,
        (),
        None,
    )


@pytest.mark.parametrize("status", [400, 409])
def test_cancelling_what_is_final_is_fine(status: int) -> None:
    """The API refuses to cancel a batch that has ended: its view is returned."""

    def handler(request: httpx2.Request) -> httpx2.Response:
        if request.method == "POST":
            return _refused(status)(request)
        return httpx2.Response(200, json={**_batch(1), "status": "completed"})

    assert Api(handler).api.cancel("batch_1").status == "completed"


def test_deleting_what_is_gone_is_fine() -> None:
    """The fence may be drawn twice."""
    api = Api(_refused(404))

    api.api.delete_file("file-1")

    assert len(api.calls) == 1


def _file(sizes: list[int], announced: int) -> Handler:
    """A file of `announced` bytes whose downloads have these sizes, one after another."""
    left = list(sizes)

    def handler(request: httpx2.Request) -> httpx2.Response:
        if request.url.path.endswith("/content"):
            return httpx2.Response(200, content=iter([b"x" * left.pop(0)]))
        described = {
            "id": "file-1",
            "object": "file",
            "bytes": announced,
            "created_at": 1,
            "filename": "f",
            "purpose": "batch_output",
        }
        return httpx2.Response(200, json=described)

    return handler


def test_a_short_download_is_repeated(tmp_path: Path) -> None:
    """A body that ends early and looks whole is recognised by the size of the file."""
    size = Api(_file([10, 0, 50], 50)).api.download("file-1", tmp_path / "file")

    assert size == 50
    assert (tmp_path / "file").stat().st_size == 50


def test_a_download_that_stays_short_is_an_error(tmp_path: Path) -> None:
    """A prefix is never taken for the whole."""
    with pytest.raises(TransientError, match="cut off at 10 of 50 bytes"):
        Api(_file([10] * 5, 50)).api.download("file-1", tmp_path / "file")


def _listing(order: list[int], *, size: int, **marks: Any) -> Handler:
    """A server that lists `size` batches a page, in its own order."""
    batches = [_batch(number, created_at=10_000 + number) for number in order]

    def handler(request: httpx2.Request) -> httpx2.Response:
        after = request.url.params.get("after")
        at = [one["id"] for one in batches].index(after) + 1 if after else 0
        return httpx2.Response(200, json={"data": batches[at : at + size], **marks})

    return handler


@pytest.mark.parametrize("order", [list(range(30)), [7, 29, 3, *range(8, 29), 0, 1, 2, 4, 5, 6]])
def test_a_list_in_another_order_is_read_to_its_end(order: list[int]) -> None:
    """Short pages without a mark, oldest first or mixed: all that is new enough is found."""
    api = Api(_listing(order, size=7), COMPATIBLE)

    found = list(api.api.newest(datetime.fromtimestamp(10_020, UTC)))

    assert {one.batch_id for one in found} == {f"batch_{number}" for number in range(20, 30)}


def test_a_server_that_ignores_after_is_asked_twice() -> None:
    """The same page again is the end, not the beginning of an endless list."""
    page = [_batch(number) for number in range(5)]
    api = Api(lambda _: httpx2.Response(200, json={"data": page}), COMPATIBLE)

    assert len(list(api.api.newest(datetime.fromtimestamp(0, UTC)))) == 5
    assert len(api.calls) == 2


@pytest.mark.parametrize("status", [405, 501])
def test_a_call_that_is_not_offered_is_no_outage(status: int) -> None:
    """It is not repeated; a file that cannot be deleted stays."""
    api = Api(lambda _: httpx2.Response(status))

    with pytest.raises(NotOfferedError, match="does not offer this call"):
        list(api.api.newest(datetime.fromtimestamp(0, UTC)))
    api.api.delete_file("file-1")

    assert len(api.calls) == 2


def test_a_profile_says_what_is_sent() -> None:
    """Azure's spelling of the endpoint; no expiry and no metadata where they are not taken."""
    api = Api(lambda _: httpx2.Response(200, json=_batch(1)), replace(AZURE, takes_metadata=False))
    api.api.create(
        file_id="f", endpoint="/v1/responses", metadata={"submission_id": "s"}, keep_seconds=9_999
    )
    other = Api(lambda _: httpx2.Response(200, json=_batch(1)), COMPATIBLE)
    other.create()

    sent, plain = (json.loads(one.calls[0].content) for one in (api, other))
    assert sent["endpoint"] == "/responses"
    assert sent["output_expires_after"] == {"anchor": "created_at", "seconds": 9_999}
    assert "metadata" not in sent
    assert plain["metadata"] == {"submission_id": "s"}
    assert "output_expires_after" not in plain


def test_a_file_without_a_size_is_downloaded(tmp_path: Path) -> None:
    """A server may not describe its files, or not say how large they are."""

    def handler(request: httpx2.Request) -> httpx2.Response:
        if request.url.path.endswith("/content"):
            return httpx2.Response(200, content=b"lines")
        return httpx2.Response(405)

    assert Api(handler).api.download("file-1", tmp_path / "out") == 5

"""What a line means: complete, worth another try, or failed for good."""

from __future__ import annotations

import json
from typing import Any

import pytest

from include.classification import Problem, Reason, State, classify
from include.result_file import Answer, ResultParser
from include.result_lines import Line

RESPONSES, CHAT = "/v1/responses", "/v1/chat/completions"


def judge(line: dict[str, Any], endpoint: str = CHAT) -> str | Problem:
    """Parse and classify one line."""
    raw = json.dumps({"custom_id": "a"} | line).encode()
    answer = ResultParser(endpoint).parse(Line(1, 0, raw, len(raw)))
    assert isinstance(answer, Answer)
    return classify(answer)


def body(endpoint_body: object, status: object = 200) -> dict[str, Any]:
    """Return the fields of a line with a response."""
    return {"response": {"status_code": status, "body": endpoint_body}, "error": None}


def http_error(status: int, **error: str) -> dict[str, Any]:
    """Return the fields of a line with an HTTP error."""
    return body({"error": error}, status)


def chat(finish: str | None = "stop", **message: Any) -> dict[str, Any]:
    """Return the fields of a line with a chat completion."""
    return body({"choices": [{"message": message, "finish_reason": finish}]})


def responses(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Return the fields of a line with a response of `/v1/responses`."""
    message = {"type": "message", "content": list(parts)}
    return body({"status": "completed", "error": None, "output": [message]} | fields)


def text(value: str) -> dict[str, Any]:
    """Return an output part."""
    return {"type": "output_text", "text": value, "annotations": []}


COMPLETE = [
    (CHAT, chat(content="hi"), "hi"),
    (CHAT, chat(None, content="hi"), "hi"),
    (CHAT, body({"choices": [{"message": {"content": "hi"}}]}, None), "hi"),
    (CHAT, chat(content=[{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]), "hi"),
    (RESPONSES, responses(text("h"), text("i")), "hi"),
    (RESPONSES, responses(text("hi"), status=None), "hi"),
    (
        RESPONSES,
        responses(output=[
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hmm"}]},
            {"type": "message", "content": [text("hi")]},
        ]),
        "hi",
    ),
    ("/v1/completions", body({"choices": [{"text": "hi", "finish_reason": "stop"}]}), "hi"),
    ("/v1/embeddings", body({"data": [{"index": 0, "embedding": [0.5, 1]}]}), "[0.5, 1]"),
    (
        "/v1/embeddings",
        body({"data": [{"index": 1, "embedding": [2]}, {"index": 0, "embedding": [1]}]}),
        "[[1],[2]]",
    ),
    ("/v1/moderations", body({"results": [{"flagged": False}]}), '{"flagged": false}'),
]  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        responses(status="incomplete", incomplete_details={"reason": "r" * 300}),
        responses(status="s" * 300),
        body({"error": {"code": "c" * 300}}, 400),
    ],
)
def test_a_code_is_short(line: Any) -> None:
    """Whatever a server writes there: the queue has a column of 100 characters for it."""
    problem = judge(line, RESPONSES)

    assert isinstance(problem, Problem)
    assert len(problem.code or "") == 100


@pytest.mark.parametrize(("endpoint", "line", "content"), COMPLETE)
def test_complete_answer_gives_its_content(endpoint: str, line: Any, content: str) -> None:
    """Every endpoint's answer is found where that endpoint puts it."""
    assert judge(line, endpoint) == content


NOT_RUN = {"response": None}
PROBLEMS = [
    (CHAT, http_error(429, code="rate_limit_exceeded"), Reason.RATE_LIMITED),
    (CHAT, http_error(408), Reason.TIMEOUT),
    (CHAT, http_error(409), Reason.CONFLICT),
    (CHAT, http_error(500), Reason.SERVER_ERROR),
    (CHAT, body("<html>Bad Gateway</html>", 502), Reason.SERVER_ERROR),
    (CHAT, http_error(400, code="context_length_exceeded"), Reason.INVALID_REQUEST),
    (CHAT, http_error(404, message="no such model"), Reason.INVALID_REQUEST),
    (CHAT, http_error(400, code="content_filter"), Reason.CONTENT_FILTER),
    (
        CHAT,
        http_error(400, message="We could not parse the JSON body of your request."),
        Reason.BODY_NOT_PARSED,
    ),
    (CHAT, NOT_RUN | {"error": {"code": "batch_expired"}}, Reason.BATCH_EXPIRED),
    (CHAT, NOT_RUN | {"error": {"code": "batch_cancelled"}}, Reason.BATCH_CANCELLED),
    (CHAT, NOT_RUN | {"error": {"code": "never_seen_before"}}, Reason.API_ERROR),
    (CHAT, NOT_RUN | {"error": "boom"}, Reason.API_ERROR),
    (CHAT, NOT_RUN, Reason.API_ERROR),
    (CHAT, {}, Reason.API_ERROR),
    (CHAT, body({}, 0), Reason.API_ERROR),
    (CHAT, chat(content="hi") | {"error": {"code": "server_error"}}, Reason.SERVER_ERROR),
    (CHAT, body({"error": {"message": "overloaded"}}), Reason.API_ERROR),
    (CHAT, chat("length", content='{"a'), Reason.CUT_OFF),
    (CHAT, chat("content_filter", content=""), Reason.CONTENT_FILTER),
    (CHAT, chat(refusal="I cannot", content=None), Reason.REFUSAL),
    (CHAT, chat("tool_calls", content=None), Reason.TOOL_CALL),
    (CHAT, chat(content=None), Reason.EMPTY_ANSWER),
    (CHAT, chat(content=" \n"), Reason.EMPTY_ANSWER),
    (CHAT, body({"choices": []}), Reason.EMPTY_ANSWER),
    (CHAT, body(None), Reason.EMPTY_ANSWER),
    ("/v1/embeddings", body({"data": []}), Reason.EMPTY_ANSWER),
    (RESPONSES, responses(status="incomplete",
                          incomplete_details={"reason": "max_output_tokens"}), Reason.CUT_OFF),
    (RESPONSES, responses(status="incomplete",
                          incomplete_details={"reason": "content_filter"}), Reason.CONTENT_FILTER),
    (RESPONSES, responses(status="incomplete", incomplete_details=None), Reason.INCOMPLETE),
    (RESPONSES, responses(text("half"), status="in_progress"), Reason.INCOMPLETE),
    (RESPONSES, responses(status="failed", error={"code": "server_error"}), Reason.SERVER_ERROR),
    (RESPONSES, responses(status="failed", error={"code": "invalid_prompt"}),
     Reason.INVALID_REQUEST),
    (RESPONSES, responses({"type": "refusal", "refusal": "no"}), Reason.REFUSAL),
    (RESPONSES, responses(output=[{"type": "function_call"}]), Reason.TOOL_CALL),
    (RESPONSES, responses(), Reason.EMPTY_ANSWER),
]  # fmt: skip


@pytest.mark.parametrize(("endpoint", "line", "reason"), PROBLEMS)
def test_problem_has_its_reason(endpoint: str, line: Any, reason: Reason) -> None:
    """Status code, error and body decide together."""
    found = judge(line, endpoint)

    assert isinstance(found, Problem)
    assert found.reason is reason


def test_only_what_cannot_succeed_fails_for_good() -> None:
    """The table of the reasons that end a row."""
    failed = {reason for reason in Reason if reason.state is State.FAILED}

    assert failed == {
        Reason.REFUSAL,
        Reason.CONTENT_FILTER,
        Reason.TOOL_CALL,
        Reason.WRONG_DIMENSIONS,
        Reason.INVALID_REQUEST,
    }


def test_every_reason_has_a_sentence() -> None:
    """People read the sentence, not the name."""
    assert all(reason.sentence.endswith(".") for reason in Reason)


def test_error_is_kept_short_and_storable() -> None:
    """Code and message of the API are kept, at most 500 characters, without NUL."""
    found = judge(http_error(400, code="bad", message="\x00" + "x" * 900))

    assert found == Problem(Reason.INVALID_REQUEST, "bad", "\ufffd" + "x" * 499)

"""The quick way recognises the usual answer, and never says anything that the long way does not."""

from __future__ import annotations

import json
from base64 import b64encode
from copy import deepcopy
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from include.classification import classify
from include.result_file import BODIES, Answer, ResultParser, token_counts
from include.result_lines import Line
from include.usual_answer import UsualAnswers
from include.vector_arrays import packed_numbers

CHAT, RESPONSES, EMBEDDINGS = "/v1/chat/completions", "/v1/responses", "/v1/embeddings"
USAGE = {"prompt_tokens": 10, "completion_tokens": 2}
BODY: dict[str, dict[str, Any]] = {
    CHAT: {
        "choices": [{"message": {"content": "hi", "refusal": None}, "finish_reason": "stop"}],
        "usage": USAGE,
    },
    RESPONSES: {
        "status": "completed",
        "error": None,
        "output": [
            {"type": "reasoning", "id": "r", "summary": []},
            {"type": "message", "content": [{"type": "output_text", "text": "hi"}]},
        ],
        "usage": {"input_tokens": 10, "output_tokens": 2},
    },
    EMBEDDINGS: {"data": [{"index": 0, "embedding": "AACAPqzFJ7c="}], "usage": USAGE},
}
CONTENT = {CHAT: "hi", RESPONSES: "hi", EMBEDDINGS: '"AACAPqzFJ7c="'}


def line_of(endpoint: str) -> dict[str, Any]:
    """Return a good line, free to be changed."""
    line = {"custom_id": "a", "response": {"status_code": 200, "body": BODY[endpoint]}}
    found: dict[str, Any] = json.loads(json.dumps(line | {"error": None}))
    return found


def quick(endpoint: str, data: bytes) -> tuple[str, str, tuple[int, ...]] | None:
    """Return what the quick way makes of a line, None when it leaves it to the long way."""
    usual = UsualAnswers(endpoint)
    try:
        answer = usual.decode(data)
        content = usual.content(answer.response.body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    if not content or content.isspace():
        return None
    if isinstance(content, bytes):
        content = json.dumps(b64encode(content).decode())  # as the long way has it
    return answer.custom_id, content, token_counts(answer.response.body.usage)


def long(endpoint: str, data: bytes) -> tuple[str, Any, tuple[int, ...]] | None:
    """Return what the long way makes of a line."""
    answer = ResultParser(endpoint).parse(Line(1, 0, data, len(data)))
    if not isinstance(answer, Answer):
        return None
    body = answer.response.body if answer.response else None
    content = classify(answer)
    if endpoint == EMBEDDINGS and isinstance(content, str) and content.startswith("["):
        packed = packed_numbers(json.loads(content))  # the quick way has bytes of either form
        content = json.dumps(b64encode(packed).decode())
    return answer.custom_id, content, token_counts(body.usage if body else None)


@pytest.mark.parametrize("endpoint", sorted(BODY))
def test_the_usual_answer_takes_the_quick_way(endpoint: str) -> None:
    """Otherwise it would only be more code."""
    data = json.dumps(line_of(endpoint), separators=(",", ":")).encode()

    assert quick(endpoint, data) == ("a", CONTENT[endpoint], (10, 0, 2, 0))


@pytest.mark.parametrize("endpoint", sorted(BODIES))
def test_an_error_goes_the_long_way(endpoint: str) -> None:
    """Wherever it stands."""
    error = {"message": "no", "code": "server_error"}
    line = line_of(CHAT)
    for place in (line, line["response"]["body"]):
        place["error"] = error
        assert quick(endpoint, json.dumps(line).encode()) is None


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every part of a JSON value but the whole."""
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for name, part in parts:
        found.append((*path, name))
        if isinstance(part, dict | list):
            found += paths(part, (*path, name))
    return found


PARTS = st.sampled_from(
    [None, "", " ", "x", 0, 1, 200, 429, 1.5, True, [], {}, [1], {"message": "no"}, "stop",
     "length", "content_filter", "completed", "incomplete", "refusal", "output_text", "reasoning",
     [{"type": "output_text", "text": "a"}, {"type": "output_text", "text": "b"}],
     [{"type": "refusal", "refusal": "no"}], "x\x00y", "\u2028", "REMOVED", "TWICE"]
)  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(st.data(), st.sampled_from(sorted(BODY)))
def test_both_ways_agree(data: st.DataObject, endpoint: str) -> None:
    """Whatever is changed in a line: what the quick way accepts, the long way says as well."""
    line = line_of(endpoint)
    for _ in range(data.draw(st.integers(0, 3))):
        *way, last = data.draw(st.sampled_from(paths(line)))
        place = line
        for step in way:
            place = place[step]
        part = deepcopy(data.draw(PARTS))
        if part == "REMOVED":
            del place[last]
        elif part == "TWICE" and isinstance(place, list):
            place.append(deepcopy(place[last]))
        else:
            place[last] = part
        if not line:
            break
    raw = json.dumps(line, ensure_ascii=data.draw(st.booleans())).encode()

    found = quick(endpoint, raw)

    assert found is None or found == long(endpoint, raw)

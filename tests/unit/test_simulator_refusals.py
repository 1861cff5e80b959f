"""What an endpoint refuses in one request, the simulator refuses too."""

from __future__ import annotations

from typing import Any

import pytest

from include.simulator.refusals import refusal

EMBEDDINGS = "/v1/embeddings"
SMALL = {"model": "text-embedding-3-small"}
OPEN = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}


def with_schema(schema: Any, *, strict: bool) -> dict[str, Any]:
    """Return a responses body."""
    wanted = {"type": "json_schema", "name": "output", "schema": schema, "strict": strict}
    return {"model": "gpt-5-mini", "input": "x", "text": {"format": wanted}}


def with_image(url: str) -> dict[str, Any]:
    """Return a responses body."""
    part = {"type": "input_image", "image_url": url}
    return {"model": "gpt-5-mini", "input": [{"role": "user", "content": [part]}]}


@pytest.mark.parametrize(
    ("endpoint", "body", "code"),
    [
        (EMBEDDINGS, {**SMALL, "input": ""}, "invalid_value"),
        (EMBEDDINGS, {**SMALL, "input": ["a"] * 2_049}, "array_above_max_length"),
        (EMBEDDINGS, {**SMALL, "input": "x" * 40_000}, "context_length_exceeded"),
        (EMBEDDINGS, {**SMALL, "input": ["x" * 32_000] * 38}, "max_tokens_per_request"),
        (EMBEDDINGS, {**SMALL, "input": "a", "dimensions": 1_537}, "invalid_value"),
        (EMBEDDINGS, {"model": "text-embedding-ada-002", "input": "a", "dimensions": 8},
         "invalid_value"),
        ("/v1/responses", with_schema(OPEN, strict=True), "invalid_json_schema"),
        ("/v1/responses", with_image("fox.png"), "invalid_value"),
    ],
)  # fmt: skip
def test_what_is_refused(endpoint: str, body: dict[str, Any], code: str) -> None:
    """With the code of the API."""
    found = refusal(endpoint, body)

    assert found is not None
    assert found.code == code


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        (EMBEDDINGS, {**SMALL, "input": ["x" * 32_000] * 37}),
        (EMBEDDINGS, {**SMALL, "input": [5, 6], "dimensions": 1_536}),
        ("/v1/responses", with_schema(OPEN, strict=False)),
        ("/v1/responses", with_image("https://i.example/fox.png")),
        ("/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": "x"}]}),
    ],
)
def test_what_is_answered(endpoint: str, body: dict[str, Any]) -> None:
    """Everything within the limits."""
    assert refusal(endpoint, body) is None

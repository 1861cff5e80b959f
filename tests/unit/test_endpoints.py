"""Bodies are what each endpoint of the API expects."""

from __future__ import annotations

from typing import Any

import pytest

from include.endpoints import (
    ENDPOINTS,
    completed_body,
    owned_params,
    request_body,
    with_larger_output,
)
from include.output_columns import Kind, OutputColumn, output_columns
from include.output_schema import schema_problems
from include.strict_schema import is_strict

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 9}, "b": {"type": ["number", "null"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def body(url: str, *, system: str | None = "S", schema: Any = None, **params: Any) -> Any:
    """Return a body with the usual model and texts."""
    return request_body(
        ENDPOINTS[url], model="m", system=system, user="U", schema=schema, params=params
    )


def test_responses() -> None:
    """Responses: instructions, input, and the schema under `text.format` beside other text."""
    made = body("/v1/responses", schema=SCHEMA, text={"verbosity": "low"}, max_output_tokens=5)

    assert made == {
        "model": "m",
        "instructions": "S",
        "input": "U",
        "max_output_tokens": 5,
        "text": {
            "verbosity": "low",
            "format": {"type": "json_schema", "name": "output", "schema": SCHEMA, "strict": True},
        },
    }


def test_chat() -> None:
    """Chat completions: messages, and the schema under `response_format.json_schema`."""
    loose = {"type": "object", "properties": {"a": {"type": "string"}}}

    made = body("/v1/chat/completions", schema=loose)

    assert made["messages"] == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
    ]
    assert made["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "output", "schema": loose, "strict": False},
    }


@pytest.mark.parametrize(
    ("url", "field"),
    [("/v1/embeddings", "input"), ("/v1/moderations", "input"), ("/v1/completions", "prompt")],
)
def test_plain_text_endpoints(url: str, field: str) -> None:
    """The other endpoints take the text alone, and no system part or schema."""
    assert body(url, system=None) == {"model": "m", field: "U"}
    with pytest.raises(ValueError, match="no system part"):
        body(url)
    with pytest.raises(ValueError, match="no output schema"):
        body(url, system=None, schema=SCHEMA)


def test_without_system_part() -> None:
    """No system part means no instructions and no system message."""
    assert body("/v1/responses", system=None) == {"model": "m", "input": "U"}
    assert body("/v1/chat/completions", system=None)["messages"] == [
        {"role": "user", "content": "U"}
    ]


@pytest.mark.parametrize(
    ("url", "before", "after"),
    [
        ("/v1/responses", {"max_output_tokens": 5}, {"max_output_tokens": 20}),
        ("/v1/chat/completions", {"max_completion_tokens": 5}, {"max_completion_tokens": 20}),
        ("/v1/chat/completions", {"max_tokens": 5, "x": 1}, {"max_tokens": 20, "x": 1}),
        ("/v1/completions", {"max_tokens": 5}, {"max_tokens": 20}),
        ("/v1/responses", {"x": 1}, {"x": 1}),
    ],
)
def test_larger_output(url: str, before: dict[str, int], after: dict[str, int]) -> None:
    """A larger output multiplies the endpoint's token limit and nothing else."""
    assert with_larger_output(ENDPOINTS[url], before, 4) == after


def test_built_body_is_completed_but_not_overruled() -> None:
    """`request.py` gives the rest of a body; what job.yaml sets it must not set."""
    endpoint = ENDPOINTS["/v1/responses"]
    more: dict[str, Any] = {"model": "m", "schema": SCHEMA, "params": {"temperature": 0}}

    made = completed_body(endpoint, {"input": [1]}, **more)

    assert set(made) == {"model", "temperature", "text", "input"}
    with pytest.raises(ValueError, match="sets model, temperature"):
        completed_body(endpoint, {"temperature": 1, "model": "x"}, **more)


def test_owned_params() -> None:
    """What the product sets is not for params; other text settings are."""
    endpoint = ENDPOINTS["/v1/responses"]

    assert owned_params(endpoint, {"text": {"verbosity": "low"}, "temperature": 1}) == []
    assert owned_params(endpoint, {"text": {"format": {}}, "model": 1}) == ["model", "text.format"]


NULL = {"type": "null"}


@pytest.mark.parametrize(
    ("change", "strict"),
    [
        ({}, True),
        ({"required": ["a"]}, False),
        ({"additionalProperties": True}, False),
        ({"allOf": []}, False),
        ({"properties": {"a": {"type": "object"}, "b": NULL}}, False),
        (
            {"properties": {"a": {"type": "array", "items": {"oneOf": []}}, "b": NULL}},
            False,
        ),
        ({"properties": {"a": {"anyOf": [{"type": "null"}, SCHEMA]}, "b": NULL}}, True),
        (
            {
                "properties": {"a": {"$ref": "#/$defs/x"}, "b": NULL},
                "$defs": {"x": SCHEMA},
            },
            True,
        ),
        ({"$defs": {"x": {"type": "object"}}}, False),
        ({"properties": {"a": True, "b": NULL}}, False),
    ],
)
def test_strict(change: dict[str, Any], *, strict: bool) -> None:
    """Strict is asked for when the API can enforce the schema, at every depth."""
    assert is_strict({**SCHEMA, **change}) is strict


def test_fine_tuned_models_know_fewer_keywords() -> None:
    """A limit on a string cannot be strict for a fine-tuned model."""
    assert not is_strict(SCHEMA, "ft:gpt-5-mini:us")


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ([], "must be an object"),
        ({"type": "object", "properties": {}}, "at least one"),
        ({"type": "object", "properties": {"_a": {}}}, "`_a` cannot be a column"),
        ({"type": "object", "properties": {"a": {}, "A": {}}}, "`a` is there twice"),
        ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, "names `b`"),
        ({"type": "object", "properties": {"a": {"type": "text"}}}, "unknown type 'text'"),
        ({"type": "object", "properties": {"a": 1}}, "`a` must be an object"),
    ],
)
def test_schema_problems(schema: Any, expected: str) -> None:
    """A schema that is no row of columns is refused with the property's name."""
    assert expected in "; ".join(schema_problems(schema))


def test_output_columns() -> None:
    """A schema's properties are the columns; without a schema there is `content`."""
    assert output_columns(SCHEMA) == (OutputColumn("a", Kind.TEXT), OutputColumn("b", Kind.REAL))
    assert output_columns(None) == (OutputColumn("content", Kind.TEXT),)

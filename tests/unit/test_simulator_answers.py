"""What the simulator answers: right shapes, the asked-for schema, the same for the same request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from include.simulator.answers import Answer, Answers
from include.simulator.schema_values import SchemaValues, Source

SPEC = json.loads((Path(__file__).parents[1] / "spec/openai-batch-api.json").read_text("utf-8"))
LABELS = {
    "type": "object",
    "properties": {
        "kind": {"type": "string", "enum": ["feature", "fix", "docs", "other"]},
        "breaking": {"type": "boolean"},
        "summary": {"type": "string", "maxLength": 40},
        "score": {"type": "integer", "minimum": 1, "maximum": 5},
    },
    "required": ["kind", "breaking", "summary", "score"],
    "additionalProperties": False,
}
IMAGE = {"type": "image_url", "image_url": {"url": "https://i.example/a.png"}}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "/v1/responses": ("Response", {"model": "gpt-5-mini", "input": "Say something."}),
    "/v1/chat/completions": (
        "CreateChatCompletionResponse",
        {"model": "gpt-4.1-mini", "messages": [{"role": "user", "content": "Say something."}]},
    ),
    "/v1/completions": (
        "CreateCompletionResponse",
        {"model": "gpt-4.1-mini", "prompt": "Say something."},
    ),
    "/v1/embeddings": (
        "CreateEmbeddingResponse",
        {"model": "text-embedding-3-small", "input": ["one", "two"]},
    ),
    "/v1/moderations": (
        "CreateModerationResponse",
        {"model": "omni-moderation-latest", "input": "one"},
    ),
}


def answer(endpoint: str, body: dict[str, Any], **options: Any) -> Answer:
    """One answer of a fresh `Answers`."""
    return Answers(endpoint, created=1_700_000_000).answer(body, "unique", **options)


def decoded(answered: Answer) -> Any:
    """The body as a reader of the line sees it."""
    return orjson.loads(orjson.dumps(answered.body))


def conforms(name: str, value: Any) -> None:
    """Validate against a published schema."""
    jsonschema.validate(value, {**SPEC, "$ref": f"#/components/schemas/{name}"})


def labelled(text: str, **extra: Any) -> dict[str, Any]:
    """A request that asks for `LABELS`."""
    wanted = {"type": "json_schema", "name": "labels", "strict": True, "schema": LABELS}
    return {"model": "gpt-4.1-mini", "input": text, "text": {"format": wanted}, **extra}


def written(answered: Answer) -> str:
    """The text of a response."""
    return str(answered.body["output"][-1]["content"][0]["text"])


@pytest.mark.parametrize("endpoint", BODIES)
def test_every_endpoint_answers_in_its_published_shape(endpoint: str) -> None:
    """Bodies validate against the published schema of their endpoint."""
    name, body = BODIES[endpoint]

    conforms(name, decoded(answer(endpoint, body)))


@pytest.mark.parametrize("ending", ["length", "refusal", "content_filter"])
@pytest.mark.parametrize("endpoint", ["/v1/responses", "/v1/chat/completions"])
def test_unhappy_endings_keep_the_published_shape(endpoint: str, ending: str) -> None:
    """Cut-off, refused and filtered answers validate too."""
    name, body = BODIES[endpoint]

    conforms(name, decoded(answer(endpoint, body, ending=ending)))


def test_equal_bodies_get_equal_answers_and_others_differ() -> None:
    """The answer depends on the request's content alone."""
    endpoint = "/v1/responses"

    first, again = (answer(endpoint, labelled("Fix a crash.")) for _ in range(2))
    other = answer(endpoint, labelled("Fix a crash and another thing that is broken too."))

    assert first == again
    assert written(first) != written(other)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Fix the crash when the list is empty", "fix"),
        ("Add support for new regions", "feature"),
        ("Correct a typo in the README and the documentation", "docs"),
    ],
)
def test_choices_follow_the_words_of_the_text(text: str, kind: str) -> None:
    """An enum value is chosen whose own or related words are in the text."""
    assert json.loads(written(answer("/v1/responses", labelled(text))))["kind"] == kind


def test_the_schema_is_kept_for_chat_completions_too() -> None:
    """`response_format.json_schema` is obeyed as `text.format` is."""
    wanted = {"type": "json_schema", "json_schema": {"name": "labels", "schema": LABELS}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "Fix it."}]}]
    body = {"model": "gpt-4.1-mini", "messages": messages, "response_format": wanted}

    message = answer("/v1/chat/completions", body).body["choices"][0]["message"]

    jsonschema.validate(json.loads(message["content"]), LABELS)


def test_an_answer_over_the_token_limit_is_cut_off() -> None:
    """`max_output_tokens` is kept and the answer says that it is incomplete."""
    cut = answer("/v1/responses", labelled("Fix a crash.", max_output_tokens=5))

    assert cut.body["status"] == "incomplete"
    assert cut.body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert cut.usage.output <= 5


def test_input_tokens_are_a_quarter_of_the_prompt_bytes() -> None:
    """Tokens are counted on UTF-8 bytes of instructions and input, not on characters."""
    body = {"model": "gpt-4.1-mini", "instructions": "abcd", "input": "漢字漢字"}

    assert answer("/v1/responses", body).usage.input == 1 + 3


def test_long_shared_instructions_are_partly_cached() -> None:
    """From the cache threshold on, whole blocks of the instructions count as cached."""
    body = {"model": "gpt-4.1-mini", "instructions": "word " * 1000, "input": "hello"}

    usage = answer("/v1/responses", body).usage

    assert usage.cached == 1250 // 128 * 128
    assert usage.cached < usage.input


def test_embeddings_have_the_asked_size_and_depend_on_the_text() -> None:
    """One vector for each input, `dimensions` long; equal texts have equal vectors."""
    body = {"model": "text-embedding-3-small", "input": ["a", "b", "a"], "dimensions": 8}

    first, second, third = (
        one["embedding"] for one in decoded(answer("/v1/embeddings", body))["data"]
    )

    assert len(first) == 8
    assert first == third != second


@pytest.mark.parametrize(
    ("text", "flagged"),
    [
        ("A fine lamp.", []),
        ("You idiots.", ["harassment"]),
        ([{"type": "text", "text": "I will kill"}, IMAGE], ["violence"]),
    ],
)
def test_moderations_follow_the_words(text: Any, flagged: list[str]) -> None:
    """A text is flagged for its words; text and image are one input."""
    body = {"model": "omni-moderation-latest", "input": text}

    (result,) = answer("/v1/moderations", body).body["results"]

    assert [name for name, is_so in result["categories"].items() if is_so] == flagged
    assert result["flagged"] is bool(flagged)
    conforms("CreateModerationResponse", decoded(answer("/v1/moderations", body)))


def test_pictures_are_billed_by_quality_and_number() -> None:
    """As many pictures as asked for, and the tokens of each."""
    body = {"model": "gpt-image-1", "prompt": "a red fox", "n": 2, "quality": "low"}

    made = answer("/v1/images/generations", body)

    assert len(made.body["data"]) == 2
    assert made.usage.output == made.body["usage"]["output_tokens"] == 2 * 272


def test_images_in_prompts_have_tokens() -> None:
    """An image adds the tokens of one tile to either endpoint."""
    url = {"type": "input_image", "image_url": "https://i.example/a.png"}
    parts = [{"type": "input_text", "text": "abcd"}, url]
    body = {"model": "gpt-4.1-mini", "input": [{"role": "user", "content": parts}]}
    chat = {"model": "gpt-4.1-mini", "messages": [{"role": "user", "content": [IMAGE]}]}

    assert answer("/v1/responses", body).usage.input == 1 + 255
    assert answer("/v1/chat/completions", chat).usage.input > 255


SCALARS = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda low, width: {"type": "integer", "minimum": low, "maximum": low + width},
        st.integers(-50, 50),
        st.integers(0, 9),
    ),
    st.builds(
        lambda low, width: {"type": "number", "minimum": low, "maximum": low + width},
        st.integers(-50, 50),
        st.integers(1, 9),
    ),
    st.builds(
        lambda least, more: {"type": "string", "minLength": least, "maxLength": least + more},
        st.integers(0, 30),
        st.integers(0, 30),
    ),
    st.builds(
        lambda values: {"enum": values}, st.lists(st.text(max_size=5), min_size=1, unique=True)
    ),
    st.sampled_from(["date", "date-time", "email", "uuid", "ipv4"]).map(
        lambda name: {"type": "string", "format": name}
    ),
)


def nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Schemas made of other schemas."""
    return st.one_of(
        st.dictionaries(st.text(max_size=6), inner, max_size=4).map(
            lambda parts: {
                "type": "object",
                "properties": parts,
                "required": list(parts),
                "additionalProperties": False,
            }
        ),
        st.builds(
            lambda item, least, more: {
                "type": "array",
                "items": item,
                "minItems": least,
                "maxItems": least + more,
            },
            inner,
            st.integers(0, 2),
            st.integers(0, 2),
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts}),
    )


@given(st.recursive(SCALARS, nested, max_leaves=8), st.text(max_size=80), st.integers(0, 1 << 63))
@settings(max_examples=200, deadline=None)
def test_every_value_satisfies_its_schema(schema: dict[str, Any], text: str, seed: int) -> None:
    """Whatever structured outputs may ask for, the made value validates."""
    value = SchemaValues(schema).value(Source(text), seed)

    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.validate(value, schema, jsonschema.Draft202012Validator, format_checker=checker)


def test_a_schema_that_contains_itself_ends() -> None:
    """Recursive references are followed to a bounded depth."""
    schema = {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["name", "children", "next"],
                "additionalProperties": False,
            }
        },
    }

    for seed in range(20):
        jsonschema.validate(SchemaValues(schema).value(Source("some words"), seed), schema)

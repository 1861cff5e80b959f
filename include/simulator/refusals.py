"""What an endpoint refuses in a single request (400), although the batch is valid.

Source: API reference, "Create embeddings", guides "Structured Outputs" and "Images and vision".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from include.simulator.prompts import image_urls, input_texts, tokens_of

MOST_INPUTS = 2_048
MOST_TOKENS = 300_000  # of all inputs of an embeddings request
MOST_INPUT_TOKENS = 8_192  # of each of them
DIMENSIONS = {"text-embedding-3-small": 1_536, "text-embedding-3-large": 3_072}


class Refusal(NamedTuple):
    """The error of the body."""

    code: str
    message: str
    param: str | None = None


def refusal(endpoint: str, body: dict[str, Any]) -> Refusal | None:
    """Why the endpoint refuses this body, None when it answers."""
    if endpoint == "/v1/embeddings":
        return _inputs_refusal(body) or _dimensions_refusal(body)
    if endpoint in ("/v1/responses", "/v1/chat/completions", "/v1/moderations"):
        return _image_refusal(body) or _schema_refusal(body)
    return None


def _inputs_refusal(body: dict[str, Any]) -> Refusal | None:
    texts = input_texts(body.get("input"))
    if not texts or "" in texts:
        return Refusal(
            "invalid_value", "Invalid 'input': input cannot be an empty string.", "input"
        )
    if len(texts) > MOST_INPUTS:
        message = f"Invalid 'input': maximum array length is {MOST_INPUTS}, got {len(texts)}."
        return Refusal("array_above_max_length", message, "input")
    sizes = [tokens_of(text) for text in texts]
    if max(sizes) > MOST_INPUT_TOKENS:
        message = f"This model's maximum context length is {MOST_INPUT_TOKENS} tokens, however you "
        return Refusal("context_length_exceeded", f"{message}requested {max(sizes)} tokens.")
    if sum(sizes) > MOST_TOKENS:
        message = f"Requested {sum(sizes)} tokens, max {MOST_TOKENS} tokens per request"
        return Refusal("max_tokens_per_request", message)
    return None


def _dimensions_refusal(body: dict[str, Any]) -> Refusal | None:
    size, most = body.get("dimensions"), DIMENSIONS.get(str(body.get("model")))
    if size is None:
        return None
    if body.get("model") == "text-embedding-ada-002":
        return Refusal("invalid_value", "This model does not support specifying dimensions.")
    if not isinstance(size, int) or size < 1 or (most and size > most):
        message = f"Invalid value for 'dimensions' = {size}. Must be from 1 to {most}."
        return Refusal("invalid_value", message, "dimensions")
    return None


def _image_refusal(body: dict[str, Any]) -> Refusal | None:
    for url in image_urls(body):
        if not str(url).startswith(("https://", "http://", "data:image/")):
            message = "Invalid 'image_url'. Expected a valid URL."
            return Refusal("invalid_value", message, "image_url")
    return None


def _schema_refusal(body: dict[str, Any]) -> Refusal | None:
    text = body.get("text")
    wanted = text.get("format") if isinstance(text, dict) else body.get("response_format")
    if not isinstance(wanted, dict) or wanted.get("type") != "json_schema":
        return None
    details = wanted.get("json_schema", wanted)
    if details.get("strict") is not True:
        return None
    for context, rule in _open_objects(details.get("schema"), ()):
        message = f"Invalid schema for response_format '{details.get('name')}': In context="
        return Refusal("invalid_json_schema", f"{message}{context}, {rule}", "text.format.schema")
    return None


def _open_objects(schema: Any, context: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    if not isinstance(schema, dict):
        return
    if schema.get("type") == "object" and schema.get("additionalProperties") is not False:
        yield context, "'additionalProperties' is required to be supplied and to be false."
    properties = schema.get("properties", {})
    if set(properties) - set(schema.get("required", ())):
        yield context, "'required' is required to include every key in properties."
    for name, part in properties.items():
        yield from _open_objects(part, (*context, "properties", name))
    for name, part in schema.get("$defs", {}).items():
        yield from _open_objects(part, (*context, "$defs", name))
    yield from _open_objects(schema.get("items"), (*context, "items"))
    for at, part in enumerate(schema.get("anyOf", ())):
        yield from _open_objects(part, (*context, "anyOf", str(at)))

"""How a request body is made for each endpoint of the Batch API.

Source: the API reference of `/v1/responses`, `/v1/chat/completions`, `/v1/embeddings`,
`/v1/moderations`, `/v1/completions`, `/v1/images` and `/v1/videos`. Reading answers is another
module's work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from include.output_columns import AnswerShape
from include.strict_schema import is_strict

OUTPUT_NAME = "output"  # the API wants a name for a schema and shows it to the model
MAX_REQUESTS = 50_000  # per batch, API reference "Create batch"
MAX_BYTES = 200_000_000  # per request file, the same page (200 MB)
MAX_INPUTS = 50_000  # embedding inputs over all requests of a batch, the same page
MAX_REQUEST_INPUTS = 2_048  # embedding inputs of one request, API reference "Create embeddings"
MAX_REQUEST_TOKENS = 300_000  # of all embedding inputs of one request, the same page
BYTES_PER_TOKEN = 4  # before anything is known
EMBEDDINGS = "/v1/embeddings"


@dataclass(frozen=True)
class Endpoint:
    """One endpoint: which field carries the text, and what the product sets by itself.

    `text_field` holds the user text; `system` says where a system part goes: a field of its own,
    a message, or nowhere. `token_limits` are the names of the output token limit, the usual first.
    """

    url: str
    text_field: str
    system: str | None  # "field:<name>", "message" or None
    schema_field: str | None
    token_limits: tuple[str, ...]
    owned: frozenset[str]  # params that a job must not set
    answer: AnswerShape


def _endpoint(
    url: str,
    text_field: str,
    *,
    system: str | None = None,
    schema_field: str | None = None,
    token_limits: tuple[str, ...] = (),
    owned: tuple[str, ...] = (),
    answer: AnswerShape = AnswerShape.TEXT,
) -> Endpoint:
    never = {"model", "stream", "stream_options", "background", text_field}
    return Endpoint(
        url, text_field, system, schema_field, token_limits, frozenset(never.union(owned)), answer
    )


ENDPOINTS: Mapping[str, Endpoint] = {
    endpoint.url: endpoint
    for endpoint in (
        _endpoint(
            "/v1/responses",
            "input",
            system="field:instructions",
            schema_field="text",
            token_limits=("max_output_tokens",),
            owned=("instructions",),
        ),
        _endpoint(
            "/v1/chat/completions",
            "messages",
            system="message",
            schema_field="response_format",
            token_limits=("max_completion_tokens", "max_tokens"),
            owned=("response_format", "n"),
        ),
        _endpoint(EMBEDDINGS, "input", answer=AnswerShape.VECTOR),
        _endpoint("/v1/moderations", "input", answer=AnswerShape.MODERATION),
        _endpoint("/v1/completions", "prompt", token_limits=("max_tokens",), owned=("n",)),
        _endpoint("/v1/images/generations", "prompt", answer=AnswerShape.RAW),
        _endpoint("/v1/images/edits", "prompt", answer=AnswerShape.RAW),
        _endpoint("/v1/videos", "prompt", answer=AnswerShape.RAW),
    )
}


def endpoint_of(url: str) -> Endpoint:
    """Return the facts about an endpoint; of one that is not known, that a body passes as it is."""
    return ENDPOINTS.get(url) or _endpoint(url, "", answer=AnswerShape.RAW)


def request_body(
    endpoint: Endpoint,
    *,
    model: str,
    system: str | None,
    user: str,
    schema: Mapping[str, Any] | None,
    params: Mapping[str, Any],
    strict: bool = True,
    images: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the body of one request. The varying text comes last, then the URLs of `images`.

    Raises `ValueError` when the endpoint takes no system part or no schema; `load_job` has
    refused such a job before.
    """
    fixed = _fixed_fields(endpoint, model=model, schema=schema, params=params, strict=strict)
    text = _user_text(endpoint, user, images)
    if system is None:
        return fixed | {endpoint.text_field: text}
    if endpoint.system is None:
        raise ValueError(f"{endpoint.url} takes no system part")
    if endpoint.system == "message":
        return fixed | {endpoint.text_field: [_message("system", system), *text]}
    return fixed | {endpoint.system.removeprefix("field:"): system, endpoint.text_field: text}


def completed_body(
    endpoint: Endpoint,
    body: Mapping[str, Any],
    *,
    model: str,
    schema: Mapping[str, Any] | None,
    params: Mapping[str, Any],
    strict: bool = True,
) -> dict[str, Any]:
    """Return a body that `request.py` built, with model, schema and params added.

    Raises `ValueError` naming the field when the body sets one of them itself.
    """
    fixed = _fixed_fields(endpoint, model=model, schema=schema, params=params, strict=strict)
    both = sorted(set(fixed) & set(body))
    if both:
        raise ValueError(f"sets {', '.join(both)}, which job.yaml sets")
    return fixed | dict(body)


def inputs_of(body: Mapping[str, Any]) -> int:
    """Return how many inputs a request for vectors or moderation holds, each with its result.

    A list of tokens is one text, and a list of parts (text and images) one input of a moderation.
    """
    found = body.get("input")
    if not isinstance(found, list) or all(isinstance(item, int | dict) for item in found):
        return 1
    return len(found)


def input_tokens_of(body: Mapping[str, Any]) -> int:
    """Return the input tokens of an embeddings request; those of texts are estimated."""
    found = body.get("input")
    items = found if isinstance(found, list) else [found]
    texts = sum(len(item.encode("utf-8", "replace")) for item in items if isinstance(item, str))
    tokens = sum(len(item) if isinstance(item, list) else isinstance(item, int) for item in items)
    return tokens + -(-texts // BYTES_PER_TOKEN)


def with_larger_output(endpoint: Endpoint, body: Mapping[str, Any], factor: int) -> dict[str, Any]:
    """Return `body` with its output token limit times `factor`; unchanged when it has none."""
    larger = {name: body[name] * factor for name in endpoint.token_limits if name in body}
    return {name: larger.get(name, value) for name, value in body.items()}


def owned_params(endpoint: Endpoint, params: Mapping[str, Any]) -> list[str]:
    """Return the names in `params` that the product sets itself, and a job must not."""
    names = [name for name in params if name in endpoint.owned]
    text = params.get("text")
    if endpoint.schema_field == "text" and (
        not isinstance(text, dict | None) or "format" in (text or {})
    ):
        names.append("text.format")
    return names


def schema_format(schema: Mapping[str, Any], model: str, *, strict: bool) -> dict[str, Any]:
    """Return what both endpoints call a JSON schema format, without its `type`."""
    strict = strict and is_strict(schema, model)
    return {"name": OUTPUT_NAME, "schema": schema, "strict": strict}


def _fixed_fields(
    endpoint: Endpoint,
    *,
    model: str,
    schema: Mapping[str, Any] | None,
    params: Mapping[str, Any],
    strict: bool,
) -> dict[str, Any]:
    fields = {"model": model, **params}
    if schema is None:
        return fields
    if endpoint.schema_field is None:
        raise ValueError(f"{endpoint.url} takes no output schema")
    details = schema_format(schema, model, strict=strict)
    if endpoint.schema_field == "text":
        return fields | {
            "text": {**params.get("text", {}), "format": {"type": "json_schema", **details}}
        }
    return fields | {endpoint.schema_field: {"type": "json_schema", "json_schema": details}}


def _user_text(endpoint: Endpoint, user: str, images: Sequence[str]) -> Any:
    """Return what goes into the text field; with images a list of parts, the text first.

    Source: API reference, `input_image` of responses, `image_url` of chat and moderations.
    """
    if endpoint.text_field == "messages":
        return [_message("user", _parts(user, images) if images else user)]
    if not images:
        return user
    if endpoint.answer is AnswerShape.MODERATION:
        return _parts(user, images)
    pictures = [{"type": "input_image", "image_url": url} for url in images]
    return [_message("user", [{"type": "input_text", "text": user}, *pictures])]


def _parts(user: str, images: Sequence[str]) -> list[dict[str, Any]]:
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return [{"type": "text", "text": user}, *pictures]


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}

"""How a request body is made for each endpoint of the Batch API.

Source: the API reference of `/v1/responses`, `/v1/chat/completions`, `/v1/embeddings`,
`/v1/moderations` and `/v1/completions`. Reading answers is another module's work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from include.output_schema import is_strict

OUTPUT_NAME = "output"  # the API wants a name for a schema and shows it to the model
MAX_REQUESTS = 50_000  # per batch, API reference "Create batch"
MAX_BYTES = 200_000_000  # per request file, the same page (200 MB)
MAX_INPUTS = 50_000  # embedding inputs over all requests of a batch, the same page
MAX_REQUEST_INPUTS = 2_048  # embedding inputs of one request, API reference "Create embeddings"
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


def _endpoint(
    url: str,
    text_field: str,
    *,
    system: str | None = None,
    schema_field: str | None = None,
    token_limits: tuple[str, ...] = (),
    owned: tuple[str, ...] = (),
) -> Endpoint:
    never = {"model", "stream", "stream_options", "background", text_field}
    return Endpoint(
        url, text_field, system, schema_field, token_limits, frozenset(never.union(owned))
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
        _endpoint(EMBEDDINGS, "input"),
        _endpoint("/v1/moderations", "input"),
        _endpoint("/v1/completions", "prompt", token_limits=("max_tokens",), owned=("n",)),
    )
}


def request_body(
    endpoint: Endpoint,
    *,
    model: str,
    system: str | None,
    user: str,
    schema: Mapping[str, Any] | None,
    params: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the body of one request. The varying text comes last.

    Raises `ValueError` when the endpoint takes no system part or no schema; `load_job` has
    refused such a job before.
    """
    fixed = _fixed_fields(endpoint, model=model, schema=schema, params=params)
    if system is None:
        return fixed | {endpoint.text_field: _user_text(endpoint, user)}
    if endpoint.system is None:
        raise ValueError(f"{endpoint.url} takes no system part")
    if endpoint.system == "message":
        messages = [_message("system", system), _message("user", user)]
        return fixed | {endpoint.text_field: messages}
    return fixed | {endpoint.system.removeprefix("field:"): system, endpoint.text_field: user}


def completed_body(
    endpoint: Endpoint,
    body: Mapping[str, Any],
    *,
    model: str,
    schema: Mapping[str, Any] | None,
    params: Mapping[str, Any],
) -> dict[str, Any]:
    """Return a body that `request.py` built, with model, schema and params added.

    Raises `ValueError` naming the field when the body sets one of them itself.
    """
    fixed = _fixed_fields(endpoint, model=model, schema=schema, params=params)
    both = sorted(set(fixed) & set(body))
    if both:
        raise ValueError(f"sets {', '.join(both)}, which job.yaml sets")
    return fixed | dict(body)


def inputs_of(body: Mapping[str, Any]) -> int:
    """Return how many texts an embeddings request holds; a list of tokens is one text."""
    found = body.get("input")
    is_list = isinstance(found, list) and not all(isinstance(item, int) for item in found)
    return len(found) if is_list and found is not None else 1


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


def schema_format(schema: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Return what both endpoints call a JSON schema format, without its `type`."""
    return {"name": OUTPUT_NAME, "schema": schema, "strict": is_strict(schema, model)}


def _fixed_fields(
    endpoint: Endpoint,
    *,
    model: str,
    schema: Mapping[str, Any] | None,
    params: Mapping[str, Any],
) -> dict[str, Any]:
    fields = {"model": model, **params}
    if schema is None:
        return fields
    if endpoint.schema_field is None:
        raise ValueError(f"{endpoint.url} takes no output schema")
    details = schema_format(schema, model)
    if endpoint.schema_field == "text":
        return fields | {
            "text": {**params.get("text", {}), "format": {"type": "json_schema", **details}}
        }
    return fields | {endpoint.schema_field: {"type": "json_schema", "json_schema": details}}


def _user_text(endpoint: Endpoint, user: str) -> Any:
    return [_message("user", user)] if endpoint.text_field == "messages" else user


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}

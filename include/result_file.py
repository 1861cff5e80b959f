r"""Reads the lines of the output and error files of a batch: a line becomes an answer.

A line is never lost: every one is an `Answer` or `Quarantined`. Nothing in a file can make the
reader raise. The rules:

- A line that is no JSON (cut off, NaN, raw control characters), no UTF-8 where it matters, no
  object, or has no `custom_id` is quarantined. Parts that nobody reads are not judged.
- A lone surrogate escape (`\ud800`) becomes U+FFFD, so that a paid answer is kept.
- Of duplicate keys the last one counts. A part of an unexpected type counts as absent.

Source: `BatchRequestOutput` of the OpenAI OpenAPI description, and lines seen in the wild (a body
that is a JSON string, a `response` of null, an `error` that is a string).
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any, Generic, TypeVar

import msgspec

from include.result_lines import Line

MAX_TOKENS = 1 << 53  # a larger token count is nonsense and counts as absent
REPLACEMENT = "\ufffd"

_ESCAPE = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # a surrogate pair: kept
    r"|(?P<bad>u[dD][89a-fA-F][0-9a-fA-F]{2}|u0000)"
    r"|.)",
    re.DOTALL,
)
_CUSTOM_ID = re.compile(rb'"custom_id"\s*:\s*"([^"\\\x00-\x1f]{1,512})"')

Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]


def mend_escapes(text: str) -> str:
    """Replace the escapes of NUL and of lone surrogates in JSON `text` by the one of U+FFFD.

    Neither can be stored: PostgreSQL refuses NUL, UTF-8 has no surrogates.
    """
    if not ("\\u0000" in text or "\\ud" in text or "\\uD" in text):
        return text
    return _ESCAPE.sub(lambda m: r"\ufffd" if m["bad"] else m[0], text)


class Damage(StrEnum):
    """Why a line cannot be used; the raw file is kept as an artifact."""

    NOT_JSON = "not_json"  #: The line is no JSON: cut off, torn, or not from this API.
    NOT_UTF8 = "not_utf8"  #: The line has bytes that are no UTF-8.
    NOT_AN_OBJECT = "not_an_object"  #: The line is JSON, but no object.
    NO_CUSTOM_ID = "no_custom_id"  #: The line does not say which request it answers.
    TOO_LONG = "too_long"  #: The line is longer than any answer can be.
    FOREIGN = "foreign_custom_id"  #: The line answers a request that is not in this batch.
    DUPLICATE = "duplicate"  #: Another line for the same request is used.


class Quarantined(msgspec.Struct, frozen=True):
    """A line that is no answer, and why."""

    reason: Damage
    custom_id: str | None


class ApiError(msgspec.Struct, gc=False):
    """An error of the line or of the body."""

    code: str | int | None = None
    message: str | None = None
    type: str | None = None


class _Cached(msgspec.Struct, gc=False):
    cached_tokens: Count | None = 0


class _Reasoning(msgspec.Struct, gc=False):
    reasoning_tokens: Count | None = 0


class TokenUsage(msgspec.Struct, gc=False):
    """Tokens as `/v1/responses` counts them."""

    input_tokens: Count | None = 0
    input_tokens_details: _Cached | None = None
    output_tokens: Count | None = 0
    output_tokens_details: _Reasoning | None = None


class CompletionUsage(msgspec.Struct, gc=False):
    """Tokens as every other endpoint counts them."""

    input_tokens: Count | None = msgspec.field(default=0, name="prompt_tokens")
    output_tokens: Count | None = msgspec.field(default=0, name="completion_tokens")
    input_tokens_details: _Cached | None = msgspec.field(default=None, name="prompt_tokens_details")
    output_tokens_details: _Reasoning | None = msgspec.field(
        default=None, name="completion_tokens_details"
    )


def token_counts(usage: TokenUsage | CompletionUsage | None) -> tuple[int, int, int, int]:
    """Return input, cached, output and reasoning tokens; what is not said counts as 0."""
    if usage is None:
        return (0, 0, 0, 0)
    cached, reasoning = usage.input_tokens_details, usage.output_tokens_details
    return (
        usage.input_tokens or 0,
        (cached.cached_tokens or 0) if cached else 0,
        usage.output_tokens or 0,
        (reasoning.reasoning_tokens or 0) if reasoning else 0,
    )


class Part(msgspec.Struct, gc=False):
    """A piece of an answer."""

    type: str | None = None
    text: str | None = None
    refusal: str | None = None


class OutputItem(msgspec.Struct, gc=False):
    """An item of `output`: a message, a reasoning summary, a tool call."""

    type: str | None = None
    content: list[Part] | None = None


class IncompleteDetails(msgspec.Struct, gc=False):
    """Why an answer of `/v1/responses` is not complete."""

    reason: str | None = None


class ResponsesBody(msgspec.Struct, gc=False):
    """The read part of a `/v1/responses` body."""

    status: str | None = None
    error: ApiError | None = None
    incomplete_details: IncompleteDetails | None = None
    output: list[OutputItem] | None = None
    usage: TokenUsage | None = None


class Message(msgspec.Struct, gc=False):
    """The answer of a chat completion; some servers send its text in parts."""

    content: str | list[Part] | None = None
    refusal: str | None = None


class Choice(msgspec.Struct, gc=False):
    """One choice of a chat completion (`message`) or a completion (`text`)."""

    message: Message | None = None
    text: str | None = None
    finish_reason: str | None = None


class CompletionBody(msgspec.Struct, gc=False):
    """The read part of a `/v1/chat/completions` or `/v1/completions` body."""

    choices: list[Choice] | None = None
    usage: CompletionUsage | None = None
    error: ApiError | None = None


class Vector(msgspec.Struct, gc=False):
    """One embedding, its numbers as they were sent."""

    embedding: msgspec.Raw
    index: int = 0


class EmbeddingBody(msgspec.Struct, gc=False):
    """The read part of a `/v1/embeddings` body."""

    data: list[Vector] | None = None
    usage: CompletionUsage | None = None
    error: ApiError | None = None


class ModerationBody(msgspec.Struct, gc=False):
    """The read part of a `/v1/moderations` body."""

    results: list[msgspec.Raw] | None = None
    usage: CompletionUsage | None = None
    error: ApiError | None = None


class RawBody(msgspec.Struct, gc=False):
    """A body of any shape, as JSON text."""

    text: str
    usage: TokenUsage | None = None
    error: ApiError | None = None


Body = ResponsesBody | CompletionBody | EmbeddingBody | ModerationBody | RawBody
B = TypeVar("B", bound=Body)

BODIES: dict[str, type[Body]] = {
    "/v1/responses": ResponsesBody,
    "/v1/chat/completions": CompletionBody,
    "/v1/completions": CompletionBody,
    "/v1/embeddings": EmbeddingBody,
    "/v1/moderations": ModerationBody,
}


class Response(msgspec.Struct, Generic[B], gc=False):
    """What the endpoint answered to one request."""

    status_code: int | None = None
    body: B | None = None


class Answer(msgspec.Struct, Generic[B], gc=False):
    """What a line says of one request."""

    custom_id: str
    response: Response[B] | None = None
    error: ApiError | None = None


class ResultParser:
    """Parses the lines of one endpoint's batches; a body of any other endpoint stays as it is."""

    def __init__(self, endpoint: str) -> None:
        self._body = BODIES.get(endpoint, RawBody)
        shape = Answer[self._body]  # type: ignore[name-defined]
        self._decode = msgspec.json.Decoder(shape).decode

    def parse(self, line: Line) -> Answer[Any] | Quarantined:
        """Return the answer of `line`, or why there is none. Never raises."""
        if len(line.data) < line.size:
            return _quarantined(Damage.TOO_LONG, line)
        if self._body is RawBody:
            return self._parse_slowly(line)
        try:
            answer: Answer[Any] = self._decode(line.data)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return self._parse_slowly(line)
        return answer if answer.custom_id else _quarantined(Damage.NO_CUSTOM_ID, line)

    def _parse_slowly(self, line: Line) -> Answer[Any] | Quarantined:
        try:
            value = msgspec.json.decode(mend_escapes(line.data.decode("utf-8")))
        except UnicodeDecodeError:
            return _quarantined(Damage.NOT_UTF8, line)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return _quarantined(Damage.NOT_JSON, line)
        if not isinstance(value, dict):
            return _quarantined(Damage.NOT_AN_OBJECT, line)
        custom_id = value.get("custom_id")
        if not isinstance(custom_id, str) or not custom_id:
            return _quarantined(Damage.NO_CUSTOM_ID, line)
        return Answer(custom_id, self._response(value.get("response")), _error(value.get("error")))

    def _response(self, value: object) -> Response[Any] | None:
        if not isinstance(value, dict):
            return None
        body = value.get("body")
        if isinstance(body, str):
            body = _decoded(body)
        return Response(_status(value.get("status_code")), self._readable(body))

    def _readable(self, value: object) -> Body | None:
        """Return the body with the fields that have the expected type; the others are absent."""
        if not isinstance(value, dict):
            return None
        if self._body is RawBody:
            text = msgspec.json.encode(value).decode()
            return RawBody(text, _any_usage(value.get("usage")), _error(value.get("error")))
        found: dict[str, Any] = {}
        for field in msgspec.structs.fields(self._body):
            part = value.get(field.encode_name)
            if field.name == "error":
                found["error"] = _error(part)
                continue
            try:
                found[field.name] = msgspec.convert(part, field.type)
            except (msgspec.MsgspecError, ValueError, RecursionError):
                continue
        return self._body(**found)


def _any_usage(value: object) -> TokenUsage | None:
    """Read the tokens of an endpoint that counts them in either way."""
    try:
        if not isinstance(value, dict) or "prompt_tokens" not in value:
            return msgspec.convert(value, TokenUsage)
        found = msgspec.convert(value, CompletionUsage)
    except (msgspec.MsgspecError, ValueError):
        return None
    return TokenUsage(
        found.input_tokens,
        found.input_tokens_details,
        found.output_tokens,
        found.output_tokens_details,
    )


def _decoded(text: str) -> object:
    try:
        return msgspec.json.decode(mend_escapes(text))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def _status(value: object) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value[:9])
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _error(value: object) -> ApiError | None:
    """Read an error of any shape."""
    if isinstance(value, str):
        return ApiError(message=value)
    if not isinstance(value, dict):
        return None
    return ApiError(*(_text(value.get(name)) for name in ("code", "message", "type")))


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _quarantined(reason: Damage, line: Line) -> Quarantined:
    found = _CUSTOM_ID.search(line.data)
    return Quarantined(reason, found[1].decode("utf-8", "replace") if found else None)

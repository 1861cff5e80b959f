"""What became of one request: complete, worth another try, or failed for good.

Output and error files are judged by the same code, on status code, error and body together:
servers disagree about which file a line belongs in and where its error stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Any, Self

import msgspec

from include.result_file import (
    Answer,
    ApiError,
    CompletionBody,
    EmbeddingBody,
    ModerationBody,
    Part,
    RawBody,
    ResponsesBody,
)

MAX_MESSAGE = 500  # characters kept of an error message


class State(StrEnum):
    """Where a request stands after a round."""

    SUCCEEDED = "succeeded"  #: The answer is complete and valid.
    RETRY = "retry"  #: Another try may succeed.
    FAILED = "failed"  #: Another try would fail again.


class Reason(StrEnum):
    """Why a request has no result, with the sentence that people read and what happens next."""

    sentence: str
    state: State

    def __new__(cls, value: str, state: State, sentence: str) -> Self:
        """Hold the sentence and the state beside the value."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.state = state
        member.sentence = sentence
        return member

    RATE_LIMITED = "rate_limited", State.RETRY, "The API was too busy for this request (429)."
    TIMEOUT = "timeout", State.RETRY, "The API gave up on this request in time (408)."
    CONFLICT = "conflict", State.RETRY, "The API met a conflict with another request (409)."
    SERVER_ERROR = "server_error", State.RETRY, "The API failed on its side (5xx)."
    API_ERROR = "api_error", State.RETRY, "The API reported an error without an answer."
    BODY_NOT_PARSED = (
        "body_not_parsed",
        State.RETRY,
        "The API said that it could not parse the request, which it says of valid ones at times.",
    )
    BATCH_EXPIRED = "batch_expired", State.RETRY, "The batch expired before this request ran."
    BATCH_CANCELLED = "batch_cancelled", State.RETRY, "The batch was cancelled before it ran."
    BATCH_FAILED = "batch_failed", State.RETRY, "The batch was refused for another request's sake."
    LOST = "lost", State.RETRY, "The API no longer has the batch or its files."
    MISSING = "missing", State.RETRY, "The batch ended without a line for this request."
    CUT_OFF = "cut_off", State.RETRY, "The answer reached the token limit before its end."
    INCOMPLETE = "incomplete", State.RETRY, "The answer is not complete."
    EMPTY_ANSWER = "empty_answer", State.RETRY, "The API reported success without an answer."
    INVALID_ANSWER = "invalid_answer", State.RETRY, "The answer does not satisfy the schema."
    REFUSAL = "refusal", State.FAILED, "The model refused to answer."
    CONTENT_FILTER = "content_filter", State.FAILED, "A content filter stopped the answer."
    TOOL_CALL = "tool_call", State.FAILED, "The model asked for a tool instead of answering."
    WRONG_DIMENSIONS = (
        "wrong_dimensions",
        State.FAILED,
        "The vector has another number of dimensions than the job expects.",
    )
    INVALID_REQUEST = "invalid_request", State.FAILED, "The API refused the request (4xx)."


# The model was not asked: nothing is billed for such a request.
NEVER_RAN = frozenset(
    {
        Reason.RATE_LIMITED,
        Reason.TIMEOUT,
        Reason.CONFLICT,
        Reason.SERVER_ERROR,
        Reason.API_ERROR,
        Reason.BODY_NOT_PARSED,
        Reason.BATCH_EXPIRED,
        Reason.BATCH_CANCELLED,
        Reason.BATCH_FAILED,
        Reason.LOST,
        Reason.MISSING,
        Reason.INVALID_REQUEST,
    }
)
HAS_RAN = frozenset(Reason) - NEVER_RAN


class Problem(msgspec.Struct, frozen=True):
    """Why a request has no result."""

    reason: Reason
    code: str | None = None
    message: str | None = None


STATUS_REASONS = {
    408: Reason.TIMEOUT,
    409: Reason.CONFLICT,
    429: Reason.RATE_LIMITED,
}
CODE_REASONS = {
    "batch_expired": Reason.BATCH_EXPIRED,
    "batch_cancelled": Reason.BATCH_CANCELLED,
    "request_timeout": Reason.TIMEOUT,
    "rate_limit_exceeded": Reason.RATE_LIMITED,
    "server_error": Reason.SERVER_ERROR,
    "content_filter": Reason.CONTENT_FILTER,
    "content_policy_violation": Reason.CONTENT_FILTER,
    "invalid_prompt": Reason.INVALID_REQUEST,
    "invalid_request": Reason.INVALID_REQUEST,
    "invalid_request_error": Reason.INVALID_REQUEST,
}
INCOMPLETE_REASONS = {
    "max_output_tokens": Reason.CUT_OFF,
    "length": Reason.CUT_OFF,
    "content_filter": Reason.CONTENT_FILTER,
}
UNPARSED = "could not parse the json body"


def classify(answer: Answer[Any]) -> str | Problem:
    """Return the content of a complete answer, or the problem. Never raises.

    The content is the answer's text; for embeddings, moderations and raw bodies it is JSON text.
    Whether it satisfies the job's schema is not judged here.
    """
    response = answer.response
    if response is None:
        return _problem(answer)
    body, status = response.body, response.status_code
    if status is None and (body is None or isinstance(body, RawBody)):
        return _problem(answer)
    # An answer that is there has been paid for, whether or not the server says its status.
    has_failed = status is not None and not 200 <= status < 300
    if has_failed or (answer.error and _says(answer.error)):
        return _problem(answer)
    if body is None:
        return Problem(Reason.EMPTY_ANSWER)
    if body.error and _says(body.error):
        return _problem(answer)
    content = CONTENTS[type(body)](body)
    if not content or (isinstance(content, str) and content.isspace()):
        return Problem(Reason.EMPTY_ANSWER)
    return content


def _says(error: ApiError | None) -> bool:
    return error is not None and bool(error.code or error.message or error.type)


def _problem(answer: Answer[Any]) -> Problem:
    """Judge an answer that carries an error, or has no response."""
    response = answer.response
    status = response.status_code if response else None
    errors = [answer.error, response.body.error if response and response.body else None]
    error = next((found for found in errors if _says(found)), None)
    code = _code(error, status)
    message = clipped(error.message) if error else None
    return Problem(_reason(status or _http_code(error), code, error), code, message)


def _http_code(error: ApiError | None) -> int | None:
    """Return the HTTP status that some servers give as the code of an error."""
    found = str(error.code) if error else ""
    return int(found) if len(found) == 3 and found.isascii() and found.isdigit() else None


def _code(error: ApiError | None, status: int | None) -> str | None:
    found = (error.code or error.type) if error else None
    if found is not None:
        return clipped(str(found), 100)
    return None if status is None or 200 <= status < 300 else f"http_{status}"


def _reason(status: int | None, code: str | None, error: ApiError | None) -> Reason:
    if status is not None and status >= 400:
        return _http_reason(status, code, error)
    by_type = CODE_REASONS.get((error.type if error else None) or "", Reason.API_ERROR)
    return CODE_REASONS.get(code or "", by_type)


def _http_reason(status: int, code: str | None, error: ApiError | None) -> Reason:
    if status in STATUS_REASONS:
        return STATUS_REASONS[status]
    if status >= 500:
        return Reason.SERVER_ERROR
    if CODE_REASONS.get(code or "") is Reason.CONTENT_FILTER:
        return Reason.CONTENT_FILTER
    if error and error.message and UNPARSED in error.message.lower():
        return Reason.BODY_NOT_PARSED
    return Reason.INVALID_REQUEST


def clipped(value: str | None, limit: int = MAX_MESSAGE) -> str | None:
    """Return at most `limit` characters that can be stored, or None for nothing."""
    if not value:
        return None
    storable = value[:limit].encode("utf-8", "replace").decode("utf-8")
    return storable.replace("\x00", "\ufffd")


def _of_responses(body: ResponsesBody) -> str | Problem:
    parts = [part for item in body.output or () for part in item.content or ()]
    if body.status == "incomplete":
        reason = body.incomplete_details.reason if body.incomplete_details else None
        return Problem(
            INCOMPLETE_REASONS.get(reason or "", Reason.INCOMPLETE), clipped(reason, 100)
        )
    refusal = _joined(part.refusal for part in parts)
    if refusal:
        return Problem(Reason.REFUSAL, message=clipped(refusal))
    if body.status not in (None, "completed"):
        return Problem(Reason.INCOMPLETE, clipped(body.status, 100))
    content = _text_of(parts)
    if not content and any((item.type or "").endswith("_call") for item in body.output or ()):
        return Problem(Reason.TOOL_CALL)
    return content


def _text_of(parts: list[Part]) -> str:
    """Join the answer's own text; a reasoning item's text is no part of it."""
    return _joined(part.text for part in parts if part.type in (None, "output_text", "text"))


def _joined(pieces: Iterable[str | None]) -> str:
    return "".join(piece for piece in pieces if piece)


def _of_completion(body: CompletionBody) -> str | Problem:
    if not body.choices:
        return Problem(Reason.EMPTY_ANSWER)
    choice = body.choices[0]
    message = choice.message
    if message is not None and message.refusal:
        return Problem(Reason.REFUSAL, message=clipped(message.refusal))
    finish = choice.finish_reason
    if finish != "stop" and finish in INCOMPLETE_REASONS:
        return Problem(INCOMPLETE_REASONS[finish], finish)
    content = choice.text if message is None else message.content
    if isinstance(content, list):
        content = _text_of(content)
    if not content and finish in ("tool_calls", "function_call"):
        return Problem(Reason.TOOL_CALL, finish)
    return content or ""


def _of_embedding(body: EmbeddingBody) -> str:
    """Return one vector as a JSON array, several as an array of arrays in input order."""
    vectors = sorted(body.data or (), key=lambda vector: vector.index)
    return _json_text([bytes(vector.embedding) for vector in vectors])


def _of_moderation(body: ModerationBody) -> str:
    return _json_text([bytes(result) for result in body.results or ()])


def _of_raw(body: RawBody) -> str:
    return body.text


def _json_text(items: list[bytes]) -> str:
    if len(items) == 1:
        return items[0].decode("utf-8", "replace")
    return f"[{b','.join(items).decode('utf-8', 'replace')}]" if items else ""


CONTENTS: dict[type, Callable[[Any], str | Problem]] = {
    ResponsesBody: _of_responses,
    CompletionBody: _of_completion,
    EmbeddingBody: _of_embedding,
    ModerationBody: _of_moderation,
    RawBody: _of_raw,
}

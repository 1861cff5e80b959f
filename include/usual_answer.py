"""The usual line: one complete answer and no word of an error, recognised while it is parsed.

A type that accepts nothing else stands for all the questions of `include.classification`, so nine
lines of ten cost one call. Whatever it refuses is read again by `ResultParser` and judged by
`classify`; what it accepts, `classify` would have called the same content.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec

from include.result_file import CompletionUsage, TokenUsage
from include.vector_arrays import packed_numbers


class _Text(msgspec.Struct, gc=False):
    type: Literal["output_text"]
    text: str
    refusal: None = None


class _Reasoning(msgspec.Struct, gc=False, tag_field="type", tag="reasoning"):
    content: None = None


class _Answered(msgspec.Struct, gc=False, tag_field="type", tag="message"):
    content: list[_Text]


class _ResponsesBody(msgspec.Struct, gc=False):
    status: Literal["completed"]
    output: list[_Answered | _Reasoning]
    usage: TokenUsage | None = None
    error: None = None


class _Message(msgspec.Struct, gc=False):
    content: str
    refusal: None = None


class _Choice(msgspec.Struct, gc=False):
    message: _Message
    finish_reason: Literal["stop"]


class _ChatBody(msgspec.Struct, gc=False):
    choices: list[_Choice]
    usage: CompletionUsage | None = None
    error: None = None


class _Vector(msgspec.Struct, gc=False):
    embedding: bytes | list[float]  # msgspec reads base64 into bytes
    index: int = 0


class _EmbeddingBody(msgspec.Struct, gc=False):
    data: list[_Vector]
    usage: CompletionUsage | None = None
    error: None = None


B = TypeVar("B")


class _Response(msgspec.Struct, Generic[B], gc=False):
    status_code: Literal[200]
    body: B


class _Answer(msgspec.Struct, Generic[B], gc=False):
    custom_id: Annotated[str, msgspec.Meta(min_length=1)]
    response: _Response[B]
    error: None = None


def _of_responses(body: _ResponsesBody) -> str:
    texts = [part.text for item in body.output if item.content for part in item.content]
    return texts[0] if len(texts) == 1 else "".join(texts)


def _of_chat(body: _ChatBody) -> str:
    return body.choices[0].message.content if body.choices else ""


def _of_embedding(body: _EmbeddingBody) -> bytes:
    if len(body.data) != 1:
        return b""  # several vectors are no usual answer
    found = body.data[0].embedding
    return found if isinstance(found, bytes) else packed_numbers(found)


class Unknown(msgspec.Struct, gc=False):
    """A body that no endpoint has: it is never the usual one."""

    usage: None
    never: Literal["never"]


_KINDS: dict[str, tuple[type, Callable[[Any], str | bytes]]] = {
    "/v1/responses": (_ResponsesBody, _of_responses),
    "/v1/chat/completions": (_ChatBody, _of_chat),
    "/v1/embeddings": (_EmbeddingBody, _of_embedding),
}


class UsualAnswers:
    """Reads the usual line of one endpoint.

    `decode` raises a `msgspec.MsgspecError`, `ValueError` or `RecursionError` for any other line;
    `content` returns nothing ("" or b"") for an answer that is not the usual one after all; for
    `/v1/embeddings` it is the bytes of the vector.
    """

    def __init__(self, endpoint: str) -> None:
        body, self.content = _KINDS.get(endpoint, (Unknown, str))
        shape: Any = _Answer[body]  # type: ignore[valid-type]
        self.decode: Callable[[bytes], Any] = msgspec.json.Decoder(shape).decode

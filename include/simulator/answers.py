"""Answers in the shapes of the published API, the same for the same request body."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable
from hashlib import blake2b
from typing import Any, NamedTuple

import orjson

from include.simulator.moderations import moderated
from include.simulator.pictures import picture, video
from include.simulator.prompts import Prompt, input_texts, read_prompt, text_number, tokens_of
from include.simulator.schema_values import SchemaValues, Source

REASONING_MODELS = ("gpt-5", "o1", "o3", "o4")
VECTORS = 64

# "" for a natural end, else "length", "refusal", "content_filter", "invalid" or "separators"
Ending = str


class Usage(NamedTuple):
    """Tokens of one answer; `output` includes `reasoning`, `input` includes `cached`."""

    input: int
    cached: int
    output: int
    reasoning: int


class Answer(NamedTuple):
    """A body for `response.body` and the tokens that it is billed for."""

    body: dict[str, Any]
    usage: Usage


class Text(NamedTuple):
    """What a model wrote, and why it stopped: "stop", "length", "refusal" or "content_filter"."""

    content: str
    finish: str
    usage: Usage


class Answers:
    """Answers the requests of one endpoint; keeps compiled schemas and vectors between calls."""

    def __init__(self, endpoint: str, *, created: int, cache_from_tokens: int = 1024) -> None:
        self._endpoint = endpoint
        self._created = created
        self._cache_from = cache_from_tokens
        self._schemas: dict[bytes, SchemaValues] = {}
        self._vectors: dict[tuple[int, bool], list[orjson.Fragment]] = {}
        shapes: dict[str, Callable[[dict[str, Any], Prompt, int, str, Ending], Answer]] = {
            "/v1/responses": self._response,
            "/v1/chat/completions": self._chat,
            "/v1/completions": self._completion,
            "/v1/embeddings": self._embeddings,
            "/v1/moderations": self._moderation,
            "/v1/images/generations": self._picture,
            "/v1/images/edits": self._picture,
            "/v1/videos": self._video,
        }
        self._shape = shapes.get(endpoint, self._response)

    def answer(self, body: dict[str, Any], unique: str, *, ending: Ending = "") -> Answer:
        """Answer one request body; `unique` goes into the ids.

        `ending` forces how the answer ends; "separators" puts raw U+2028 between its words.
        """
        digest = blake2b(orjson.dumps(body), digest_size=8).digest()
        prompt = read_prompt(self._endpoint, body)
        return self._shape(body, prompt, int.from_bytes(digest), unique, ending)

    def _write(self, body: dict[str, Any], prompt: Prompt, seed: int, ending: Ending) -> Text:
        content = self._content(body, prompt, seed)
        reasoning = self._reasoning(body, seed)
        limit = _limit(body)
        finish = "stop"
        if ending == "refusal":
            content, finish = "I'm sorry, but I can't help with that.", "refusal"
        elif ending == "content_filter":
            content, finish = "", "content_filter"
        elif ending == "invalid":
            content = '{"unexpected": true}'
        elif ending == "separators":
            content = content.replace(" ", "\u2028")
        elif ending == "length" or reasoning + tokens_of(content) > limit:
            keep = min(4 * max(0, limit - reasoning), len(content) // 2)
            content, finish = content[:keep], "length"
        usage = self._usage(prompt, tokens_of(content), min(reasoning, limit))
        return Text(content, finish, usage)

    def _content(self, body: dict[str, Any], prompt: Prompt, seed: int) -> str:
        schema = _schema(body)
        source = Source(prompt.text)
        if schema is None:
            words = source.words
            start = seed % max(1, len(words) - 23)
            return " ".join(words[start : start + 24])
        key = orjson.dumps(schema)
        if key not in self._schemas:
            self._schemas[key] = SchemaValues(schema)
        return orjson.dumps(self._schemas[key].value(source, seed)).decode()

    def _reasoning(self, body: dict[str, Any], seed: int) -> int:
        model = body.get("model")
        thinks = isinstance(model, str) and model.startswith(REASONING_MODELS)
        return 64 * (seed >> 8 & 1) if thinks else 0

    def _usage(self, prompt: Prompt, written: int, reasoning: int) -> Usage:
        cached = 0
        if prompt.tokens >= self._cache_from:
            cached = prompt.shared_tokens // 128 * 128
        return Usage(prompt.tokens, cached, max(1, written) + reasoning, reasoning)

    def _chat(
        self, body: dict[str, Any], prompt: Prompt, seed: int, unique: str, ending: Ending
    ) -> Answer:
        text = self._write(body, prompt, seed, ending)
        refused = text.finish == "refusal"
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if refused else text.content,
            "refusal": text.content if refused else None,
            "annotations": [],
        }
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": "stop" if refused else text.finish,
        }
        shape = {
            "id": f"chatcmpl-{unique}",
            "object": "chat.completion",
            "created": self._created,
            "model": body["model"],
            "choices": [choice],
            "usage": _completion_usage(text.usage),
            "service_tier": "default",
            "system_fingerprint": "fp_simulator",
        }
        return Answer(shape, text.usage)

    def _completion(
        self, body: dict[str, Any], prompt: Prompt, seed: int, unique: str, ending: Ending
    ) -> Answer:
        text = self._write(body, prompt, seed, ending)
        finish = text.finish if text.finish in ("length", "content_filter") else "stop"
        choice = {"text": text.content, "index": 0, "logprobs": None, "finish_reason": finish}
        shape = {
            "id": f"cmpl-{unique}",
            "object": "text_completion",
            "created": self._created,
            "model": body["model"],
            "choices": [choice],
            "usage": _completion_usage(text.usage),
        }
        return Answer(shape, text.usage)

    def _response(
        self, body: dict[str, Any], prompt: Prompt, seed: int, unique: str, ending: Ending
    ) -> Answer:
        text = self._write(body, prompt, seed, ending)
        reason = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(
            text.finish
        )
        shape = {
            "id": f"resp_{unique}",
            "object": "response",
            "created_at": self._created,
            "status": "incomplete" if reason else "completed",
            "background": False,
            "completed_at": None if reason else self._created,
            "error": None,
            "incomplete_details": {"reason": reason} if reason else None,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "max_tool_calls": None,
            "model": body["model"],
            "output": _output(text, unique, incomplete=reason is not None),
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": _effort(body), "summary": None},
            "service_tier": "default",
            "temperature": body.get("temperature", 1.0),
            "text": _echoed_text(body),
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": 0,
            "top_p": body.get("top_p", 1.0),
            "truncation": "disabled",
            "usage": _response_usage(text.usage),
            "user": None,
            "metadata": body.get("metadata") or {},
        }
        return Answer(shape, text.usage)

    def _embeddings(
        self, body: dict[str, Any], prompt: Prompt, seed: int, _unique: str, _ending: Ending
    ) -> Answer:
        size = int(body.get("dimensions") or (3072 if "large" in str(body["model"]) else 1536))
        encoded = body.get("encoding_format") == "base64"
        vectors = self._vector_pool(size, encoded=encoded)
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": vectors[text_number(text, seed) % VECTORS],
            }
            for index, text in enumerate(input_texts(body.get("input")))
        ]
        shape = {
            "object": "list",
            "data": data,
            "model": body["model"],
            "usage": {"prompt_tokens": prompt.tokens, "total_tokens": prompt.tokens},
        }
        return Answer(shape, Usage(prompt.tokens, 0, 0, 0))

    def _vector_pool(self, size: int, *, encoded: bool) -> list[orjson.Fragment]:
        key = (size, encoded)
        if key not in self._vectors:
            self._vectors[key] = [
                orjson.Fragment(_vector(size, number, encoded=encoded)) for number in range(VECTORS)
            ]
        return self._vectors[key]

    def _moderation(
        self, body: dict[str, Any], prompt: Prompt, _seed: int, unique: str, _ending: Ending
    ) -> Answer:
        shape = {
            "id": f"modr-{unique}",
            "model": body["model"],
            "results": moderated(body.get("input")),
        }
        return Answer(shape, Usage(prompt.tokens, 0, 0, 0))

    def _picture(
        self, body: dict[str, Any], prompt: Prompt, _seed: int, _unique: str, _ending: Ending
    ) -> Answer:
        shape = picture(body, prompt, self._created)
        return Answer(shape, Usage(prompt.tokens, 0, shape["usage"]["output_tokens"], 0))

    def _video(
        self, body: dict[str, Any], _prompt: Prompt, _seed: int, unique: str, _ending: Ending
    ) -> Answer:
        return Answer(video(body, unique, self._created), Usage(0, 0, 0, 0))


def _limit(body: dict[str, Any]) -> int:
    for name in ("max_output_tokens", "max_completion_tokens", "max_tokens"):
        value = body.get(name)
        if isinstance(value, int):
            return value
    return 1 << 30


def _schema(body: dict[str, Any]) -> dict[str, Any] | None:
    text = body.get("text")
    wanted = text.get("format") if isinstance(text, dict) else body.get("response_format")
    if not isinstance(wanted, dict) or wanted.get("type") not in ("json_schema", "json_object"):
        return None
    if wanted["type"] == "json_object":
        return {"type": "object", "properties": {"answer": {"type": "string"}}}
    schema = wanted.get("json_schema", wanted).get("schema")
    return schema if isinstance(schema, dict) else None


def _effort(body: dict[str, Any]) -> str | None:
    reasoning = body.get("reasoning")
    return reasoning.get("effort") if isinstance(reasoning, dict) else None


def _echoed_text(body: dict[str, Any]) -> dict[str, Any]:
    text = body.get("text")
    return text if isinstance(text, dict) else {"format": {"type": "text"}}


def _output(text: Text, unique: str, *, incomplete: bool) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    if text.usage.reasoning:
        items.append({"id": f"rs_{unique}", "type": "reasoning", "summary": []})
    if incomplete and not text.content:
        return items
    if text.finish == "refusal":
        part: dict[str, Any] = {"type": "refusal", "refusal": text.content}
    else:
        part = {"type": "output_text", "annotations": [], "logprobs": [], "text": text.content}
    status = "incomplete" if incomplete else "completed"
    message = {"id": f"msg_{unique}", "type": "message", "status": status}
    items.append({**message, "content": [part], "role": "assistant"})
    return items


def _response_usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.input,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.output,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.input + usage.output,
    }


def _completion_usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.input,
        "completion_tokens": usage.output,
        "total_tokens": usage.input + usage.output,
        "prompt_tokens_details": {"cached_tokens": usage.cached, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def _vector(size: int, number: int, *, encoded: bool) -> bytes:
    state = number + 1
    values: list[float] = []
    for _ in range(size):
        state = (state * 6364136223846793005 + 1442695040888963407) & ((1 << 64) - 1)
        values.append(round(((state >> 33) / (1 << 31) - 0.5) / 16, 8))
    if not encoded:
        return orjson.dumps(values)
    return orjson.dumps(base64.b64encode(struct.pack(f"<{size}f", *values)).decode())

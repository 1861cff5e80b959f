"""What a request asks: its user text and how many tokens its prompt has."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, NamedTuple

BYTES_PER_TOKEN = 4
TOKENS_OF_IMAGE = 255  # a small image of the older models: a tile of 170 and 85 for each image
IMAGES = frozenset({"image_url", "input_image"})
WITH_PROMPT = ("/v1/completions", "/v1/images/generations", "/v1/images/edits", "/v1/videos")


class Prompt(NamedTuple):
    """The text that the answer is made from, and its size in tokens."""

    text: str
    tokens: int
    shared_tokens: int


def tokens_of(text: str) -> int:
    """About one token for four UTF-8 bytes."""
    size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
    return (size + BYTES_PER_TOKEN - 1) // BYTES_PER_TOKEN


def read_prompt(endpoint: str, body: dict[str, Any]) -> Prompt:
    """The prompt of a request body of any supported endpoint.

    `shared_tokens` counts the instructions, which is what a prompt cache can serve.
    """
    if endpoint == "/v1/chat/completions":
        return _with_images(_conversation(_turns(body.get("messages")), ""), body)
    if endpoint == "/v1/responses":
        instructions = body.get("instructions")
        first = instructions if isinstance(instructions, str) else ""
        return _with_images(_conversation(_turns(body.get("input")), first), body)
    texts = input_texts(body.get("prompt" if endpoint in WITH_PROMPT else "input"))
    return Prompt(texts[-1] if texts else "", max(1, sum(map(tokens_of, texts))), 0)


def _with_images(prompt: Prompt, body: dict[str, Any]) -> Prompt:
    images = TOKENS_OF_IMAGE * sum(1 for _ in image_urls(body))
    return prompt._replace(tokens=prompt.tokens + images)


def input_texts(value: Any) -> list[str]:
    """The texts of an `input` that may be one text, several, or token lists."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        return []
    if value and all(isinstance(item, int) for item in value):
        return [" " * (BYTES_PER_TOKEN * len(value))]
    return [text for item in value for text in _item_texts(item)]


def _item_texts(item: Any) -> list[str]:
    if isinstance(item, dict):
        text = item.get("text")
        return [text if isinstance(text, str) else ""]
    return input_texts(item)


def image_urls(body: dict[str, Any]) -> Iterator[Any]:
    """The URLs of all images of a request, whatever they are."""
    turns = body.get("messages") or body.get("input")
    for turn in turns if isinstance(turns, list) else ():
        content = turn.get("content", turn) if isinstance(turn, dict) else None
        for part in content if isinstance(content, list) else [content]:
            if isinstance(part, dict) and part.get("type") in IMAGES and "image_url" in part:
                url = part["image_url"]
                yield url.get("url") if isinstance(url, dict) else url


def text_number(text: str, seed: int) -> int:
    """A number that depends on a text alone; `seed` for no text."""
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(data, digest_size=4).digest()) if data else seed


def _turns(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield "user", value
    elif isinstance(value, list):
        for turn in value:
            if isinstance(turn, dict):
                content = turn.get("content")
                text = content if isinstance(content, str) else "".join(input_texts(content))
                yield str(turn.get("role", "user")), text


def _conversation(turns: Iterator[tuple[str, str]], instructions: str) -> Prompt:
    shared = tokens_of(instructions)
    total = shared
    user = ""
    for role, text in turns:
        size = tokens_of(text)
        total += size
        if role == "user":
            user = text
        else:
            shared += size
    return Prompt(user, max(1, total), shared)

"""Seeded text: rows, answers and vectors that are the same on every machine."""

from __future__ import annotations

import json
import random
import string
from base64 import b64encode
from collections.abc import Iterator
from hashlib import sha256

import numpy as np
import orjson

PIECES = 5_000
PIECES_PER_TEXT = 7
CJK = "漢字仮名交じり文章を書く人々🙂🚀"
WIDTH = 1_536  # numbers of a vector
CATEGORIES = ("billing", "bug", "feature", "account", "shipping", "other")
VECTOR_TAIL = (
    b'}], "model": "text-embedding-3-small", "usage": {"prompt_tokens": 96, '
    b'"total_tokens": 96}}}, "error": null}\n'
)


def custom_id(number: int) -> str:
    """Return the id of request `number`, as the product's look."""
    return sha256(b"%d" % number).hexdigest()[:32]


def tickets(count: int, seed: int) -> Iterator[str]:
    """Yield texts of about 400 bytes; every tenth has CJK and emoji."""
    source = random.Random(seed)  # noqa: S311 - repeatable, no secret
    pieces = [_piece(source) for _ in range(PIECES)]
    for number in range(count):
        text = " ".join(source.choices(pieces, k=PIECES_PER_TEXT))
        if number % 10 == 0:
            text = text[:190] + source.choice(CJK) * 66
        yield text


def _piece(source: random.Random) -> str:
    words = ("".join(source.choices(string.ascii_lowercase, k=source.randint(2, 11)))
             for _ in range(7))  # fmt: skip
    return " ".join(words)


def answer_lines(first: int, count: int, seed: int) -> tuple[list[bytes], list[bytes]]:
    """Return the lines of one shard's output and error file, shuffled and ASCII-escaped.

    Of 100 requests 2 are errors; of 1,000 one is missing. 5 lines are torn, 8 come twice.
    """
    source = random.Random(f"{seed}-{first}")  # noqa: S311 - repeatable, no secret
    contents = [_content(source) for _ in range(500)]
    output, errors = [], []
    for number in range(first, first + count):
        if number % 1_000 == 999:
            continue
        if number % 50 == 7:
            errors.append(_error_line(number))
        else:
            output.append(_answer_line(number, source.choice(contents), source.randint(90, 400)))
    source.shuffle(output)
    spoiled = min(8, len(output) // 10)
    output += output[:spoiled]
    output += [line[: len(line) // 2] + b"\n" for line in output[: min(5, spoiled)]]
    source.shuffle(errors)
    return output, errors


def _content(source: random.Random) -> str:
    text = " ".join(_piece(source) for _ in range(4))[:190]
    answer = {
        "category": source.choice(CATEGORIES),
        "priority": source.randint(1, 5),
        "confidence": round(source.random(), 3),
        "urgent": source.random() < 0.2,
        "summary": text[:150] + source.choice(CJK) * 8 if source.random() < 0.1 else text,
    }
    return json.dumps(json.dumps(answer))


def _answer_line(number: int, content: str, tokens: int) -> bytes:
    name = custom_id(number)
    return (
        f'{{"id": "batch_req_{name}", "custom_id": "{name}", "response": {{"status_code": 200, '
        f'"request_id": "req_{name}", "body": {{"id": "chatcmpl-{name}", "object": '
        '"chat.completion", "created": 1764000000, "model": "gpt-4o-mini-2024-07-18", "choices": '
        f'[{{"index": 0, "message": {{"role": "assistant", "content": {content}, "refusal": null, '
        '"annotations": []}, "logprobs": null, "finish_reason": "stop"}], "usage": '
        f'{{"prompt_tokens": {tokens}, "completion_tokens": 62, "total_tokens": {tokens + 62}, '
        '"prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0}, '
        '"completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0, '
        '"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}}, '
        '"service_tier": "default", "system_fingerprint": "fp_8bda4d3a2c"}}, "error": null}\n'
    ).encode()


def _error_line(number: int) -> bytes:
    name = custom_id(number)
    return (
        f'{{"id": "batch_req_{name}", "custom_id": "{name}", "response": {{"status_code": 429, '
        f'"request_id": "req_{name}", "body": {{"error": {{"message": "Rate limit reached.", '
        '"type": "requests", "param": null, "code": "rate_limit_exceeded"}}}, "error": null}\n'
    ).encode()


def vector_lines(
    count: int, seed: int, first: int = 0, *, as_numbers: bool = False
) -> Iterator[bytes]:
    """Yield output lines of an embeddings batch, each with 1,536 numbers, in a shuffled order.

    The numbers are base64 of their float32, as the product asks for them, or a JSON list.
    """
    source = np.random.default_rng(seed)
    order = source.permutation(count)
    for number in order.tolist():
        name = custom_id(first + number)
        vector = source.standard_normal(WIDTH, dtype=np.float32) / np.float32(39.2)
        numbers = b'"' + b64encode(vector.tobytes()) + b'"'
        if as_numbers:
            numbers = orjson.dumps(vector.astype(np.float64), option=orjson.OPT_SERIALIZE_NUMPY)
        head = (
            f'{{"id": "batch_req_{name}", "custom_id": "{name}", "response": {{"status_code": 200, '
            f'"request_id": "req_{name}", "body": {{"object": "list", "data": [{{"object": '
            '"embedding", "index": 0, "embedding": '
        ).encode()
        yield head + numbers + VECTOR_TAIL

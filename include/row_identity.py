"""Who a row is: its values as text, its key, its `custom_id`.

The text of a value does not depend on the type of the column that it was stored in, so a column
that is integer in one partition and text in the next gives the same keys and the same requests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Any

import orjson

CUSTOM_ID_CHARACTERS = 32
KEY_DIGEST_BYTES = 16


def as_text(value: Any) -> str:
    r"""Return the text of one value that is not None, for keys and prompts.

    Text as it is, true and false for booleans, ISO 8601 for dates and times (aware times in UTC
    with Z), JSON for lists and mappings, UTF-8 for bytes (hex after `\x` when they are not), and
    `str` for numbers and all else.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime):
        return _time_text(value)
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, list | tuple | dict):
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=as_text)
    if isinstance(value, bytes | bytearray | memoryview):
        return _bytes_text(bytes(value))
    return format(value, "f") if isinstance(value, Decimal) else str(value)


def _time_text(value: datetime) -> str:
    if value.tzinfo is None:
        return value.isoformat()
    return value.astimezone(UTC).replace(tzinfo=None).isoformat() + "Z"


def _bytes_text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return f"\\x{value.hex()}"


def key_json(values: Sequence[str | None]) -> bytes:
    """Return the canonical JSON of a row's key, given the texts of its key columns."""
    return orjson.dumps(values)


def key_digest(key: bytes) -> bytes:
    """Return 16 bytes for a key's canonical JSON: they choose the sample and find duplicates."""
    return hashlib.sha256(key).digest()[:KEY_DIGEST_BYTES]


def rejected_id(key: bytes, reason: str) -> str:
    """Return the `custom_id` (32 hex) of a row that never became a request."""
    digest = hashlib.sha256(b"rejected\0" + reason.encode() + b"\0" + key)
    return digest.hexdigest()[:CUSTOM_ID_CHARACTERS]

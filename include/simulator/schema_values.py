"""Values that satisfy a JSON Schema, made from the words of a prompt.

The part of JSON Schema that structured outputs allow is understood.
Equal prompts give equal values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

RELATED: dict[str, list[str]] = orjson.loads(
    Path(__file__).with_name("related_words.json").read_bytes()
)
PUNCTUATION = {mark: " " for mark in range(128) if not chr(mark).isalnum()}
TAIL = 700
DEEP = 6
MASK = (1 << 64) - 1
FORMATS = {
    "date": "2026-03-{day:02d}",
    "date-time": "2026-03-{day:02d}T09:30:00Z",
    "time": "09:30:{day:02d}Z",
    "duration": "P{day}D",
    "email": "person{day}@example.com",
    "hostname": "host{day}.example.com",
    "ipv4": "192.0.2.{day}",
    "ipv6": "2001:db8::{day}",
    "uuid": "00000000-0000-4000-8000-0000000000{day:02d}",
    "uri": "https://example.com/{day}",
}

Maker = Callable[["Source", int, int], Any]


class Source:
    """The end of a prompt, split into words once, when they are first needed."""

    __slots__ = ("_lower", "_words", "text")

    def __init__(self, text: str) -> None:
        self.text = text[-TAIL:]
        self._words: list[str] | None = None
        self._lower: list[str] | None = None

    @property
    def words(self) -> list[str]:
        """The words as written, with their punctuation."""
        if self._words is None:
            self._words = self.text.split() or ["nothing"]
        return self._words

    @property
    def lower(self) -> list[str]:
        """The bare words in lower case."""
        if self._lower is None:
            self._lower = words_in(self.text)
        return self._lower


def words_in(text: str) -> list[str]:
    """The bare words of a text in lower case."""
    return text.lower().translate(PUNCTUATION).split()


class SchemaValues:
    """Makes values for one schema; compiled once, used for every request that carries it."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._root = schema
        self._references: dict[str, Maker] = {}
        self._make = self._compile(schema, "")

    def value(self, source: Source, seed: int) -> Any:
        """One value that satisfies the schema."""
        return self._make(source, seed, 0)

    def _compile(self, schema: Any, name: str) -> Maker:
        if not isinstance(schema, dict):
            return _text_maker({}, name)
        if "$ref" in schema:
            return self._reference(str(schema["$ref"]), name)
        if "const" in schema:
            constant = schema["const"]
            return lambda _source, _seed, _depth: constant
        if "enum" in schema:
            return _choice_maker(schema["enum"])
        for word in ("anyOf", "oneOf"):
            if word in schema:
                return self._one_of(schema[word], name)
        if "allOf" in schema:
            return self._compile(_merged(schema), name)
        return self._typed(schema, name)

    def _typed(self, schema: dict[str, Any], name: str) -> Maker:
        kind = schema.get("type", "object" if "properties" in schema else "string")
        if isinstance(kind, list):
            return self._one_of([{**schema, "type": one} for one in kind], name)
        if kind == "object":
            return self._object(schema)
        if kind == "array":
            return self._array(schema, name)
        if kind in ("integer", "number"):
            return _number_maker(schema, whole=kind == "integer")
        if kind == "boolean":
            return _boolean_maker(name)
        if kind == "null":
            return lambda _source, _seed, _depth: None
        return _text_maker(schema, name)

    def _reference(self, pointer: str, name: str) -> Maker:
        def make(source: Source, seed: int, depth: int) -> Any:
            if pointer not in self._references:
                self._references[pointer] = self._compile(_pointed(self._root, pointer), name)
            return self._references[pointer](source, seed, depth + 1)

        return make

    def _one_of(self, schemas: list[Any], name: str) -> Maker:
        simple = [s for s in schemas if isinstance(s, dict) and s.get("type") == "null"]
        rich = [s for s in schemas if s not in simple]
        makers = [self._compile(s, name) for s in rich] or [self._compile(simple[0], name)]
        null = bool(simple) and bool(rich)
        shallow = self._compile(min(schemas, key=_size), name)

        def make(source: Source, seed: int, depth: int) -> Any:
            if null and (depth > DEEP or _mixed(seed, 7) % 8 == 0):
                return None
            if depth > DEEP:
                return shallow(source, seed, depth)
            return makers[_mixed(seed, 3) % len(makers)](source, seed, depth)

        return make

    def _object(self, schema: dict[str, Any]) -> Maker:
        required = set(schema.get("required", ()))
        parts = [
            (name, self._compile(part, name), _mixed(index, 11), name in required)
            for index, (name, part) in enumerate(schema.get("properties", {}).items())
        ]

        def make(source: Source, seed: int, depth: int) -> dict[str, Any]:
            return {
                name: maker(source, seed ^ salt, depth + 1)
                for name, maker, salt, needed in parts
                if needed or depth < DEEP
            }

        return make

    def _array(self, schema: dict[str, Any], name: str) -> Maker:
        item = self._compile(schema.get("items", {}), name)
        least = int(schema.get("minItems", 0))
        most = int(schema.get("maxItems", max(least, 3)))
        unique = bool(schema.get("uniqueItems"))

        def make(source: Source, seed: int, depth: int) -> list[Any]:
            length = least if depth > DEEP else least + _mixed(seed, 5) % (most - least + 1)
            made: list[Any] = []
            for attempt in range(length * (20 if unique else 1)):
                value = item(source, _mixed(seed, attempt + 17), depth + 1)
                if not unique or value not in made:
                    made.append(value)
                if len(made) == length:
                    break
            return made

        return make


def _mixed(seed: int, salt: int) -> int:
    """Another well-spread number from a seed."""
    mixed = ((seed ^ salt) * 0x9E3779B97F4A7C15 + salt) & MASK
    return mixed ^ (mixed >> 29)


def _size(schema: Any) -> int:
    return len(orjson.dumps(schema))


def _pointed(root: dict[str, Any], pointer: str) -> Any:
    here: Any = root
    for step in pointer.removeprefix("#").split("/")[1:]:
        here = here[step.replace("~1", "/").replace("~0", "~")]
    return here


def _merged(schema: dict[str, Any]) -> dict[str, Any]:
    merged: dict[str, Any] = {key: value for key, value in schema.items() if key != "allOf"}
    for part in schema["allOf"]:
        for key, value in part.items():
            if key == "properties":
                merged["properties"] = {**merged.get("properties", {}), **value}
            elif key == "required":
                merged["required"] = [*merged.get("required", ()), *value]
            else:
                merged.setdefault(key, value)
    return merged


def _choice_maker(values: list[Any]) -> Maker:
    """The value whose words, or words related to it, are met most often in the text."""
    table: dict[str, list[int]] = {}
    for index, value in enumerate(values):
        for word in _words_of(value):
            table.setdefault(word, []).append(index)
    size = len(values)

    def make(source: Source, seed: int, _depth: int) -> Any:
        scores = [0] * size
        words = source.lower
        for word in table.keys() & words:
            times = words.count(word)
            for index in table[word]:
                scores[index] += times
        best = max(scores)
        leaders = [index for index in range(size) if scores[index] == best]
        return values[leaders[_mixed(seed, 13) % len(leaders)]]

    return make


def _words_of(value: Any) -> set[str]:
    if not isinstance(value, str):
        return set()
    own = words_in(value)
    return {*own, *(word for part in own for word in RELATED.get(part, ()))}


def _boolean_maker(name: str) -> Maker:
    words = _words_of(name) - {"is", "has", "needs", "should", "the", "a"}

    def make(source: Source, seed: int, _depth: int) -> bool:
        return not words.isdisjoint(source.lower) or _mixed(seed, 19) % 12 == 0

    return make


def _number_maker(schema: dict[str, Any], *, whole: bool) -> Maker:
    step = schema.get("multipleOf") or (1 if whole else 0.01)
    low, high = _bounds(schema, step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)

    def make(_source: Source, seed: int, _depth: int) -> float:
        chosen = first + _mixed(seed, 23) % (max(first, last) - first + 1)
        return int(chosen * step) if whole else round(chosen * step, 6)

    return make


def _bounds(schema: dict[str, Any], step: float) -> tuple[float, float]:
    low = schema.get("minimum")
    if "exclusiveMinimum" in schema:
        low = schema["exclusiveMinimum"] + step
    high = schema.get("maximum")
    if "exclusiveMaximum" in schema:
        high = schema["exclusiveMaximum"] - step
    if low is None:
        low = 0 if high is None or high >= 0 else high - 100 * step
    return low, low + 100 * step if high is None else high


def _text_maker(schema: dict[str, Any], _name: str) -> Maker:
    least = int(schema.get("minLength", 0))
    most = int(schema.get("maxLength", max(160, least)))
    pattern = FORMATS.get(schema.get("format", ""))
    if pattern is not None:
        return lambda _source, seed, _depth: pattern.format(day=1 + _mixed(seed, 29) % 28)

    def make(source: Source, seed: int, _depth: int) -> str:
        words = source.words
        start = _mixed(seed, 31) % max(1, len(words) - 11)
        text = " ".join(words[start : start + 12])
        if len(text) > most:
            text = text[:most].rpartition(" ")[0] or text[:most]
        return text if len(text) >= least else (text + " ").ljust(least, "x")[:least]

    return make

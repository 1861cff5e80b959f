"""Whether the API can enforce a schema (`strict: true`), and where it cannot.

Source: OpenAI's guide "Structured Outputs", section "Supported schemas", and the API's own errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

MAX_DEPTH = 10
MAX_PROPERTIES = 5_000
MAX_CHOICES = 1_000  # enum values over the whole schema
MAX_NAME_CHARACTERS = 120_000  # of property names, definitions, enum and const values together
MAX_PROBLEMS = 5  # that are told at once

_STRUCTURE = {"type", "properties", "required", "additionalProperties", "items", "anyOf"}
_STRUCTURE |= {"enum", "const", "$defs", "definitions", "$ref"}
_NOTES = {"title", "description", "$schema", "$id", "$comment"}
_RULES = {"pattern", "format", "minLength", "maxLength", "minItems", "maxItems", "multipleOf"}
_RULES |= {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid")
_FINE_TUNED_PREFIX = "ft:"


class _Part(NamedTuple):
    """A schema inside of the schema: where it stands, and how deep its values lie."""

    path: str
    schema: Any
    depth: int


def is_strict(schema: Mapping[str, Any], model: str = "") -> bool:
    """Tell whether the API accepts `schema` with `strict: true` for `model`."""
    return not strict_problems(schema, model)


def strict_problems(schema: Mapping[str, Any], model: str = "") -> list[str]:
    """Return "at <path>: <rule>" for what strict mode refuses, at most five of them.

    Fine-tuned models (`ft:...`) do not know the keywords that limit strings, numbers and arrays.
    """
    known = _STRUCTURE | _NOTES
    if not model.startswith(_FINE_TUNED_PREFIX):
        known |= _RULES
    parts = list(_parts(_Part("#", schema, 0)))
    found = [
        *_root_problems(schema),
        *(f"at {part.path}: {rule}" for part in parts for rule in _broken_rules(part, known)),
        *_size_problems([part.schema for part in parts if isinstance(part.schema, dict)]),
    ]
    return found[:MAX_PROBLEMS]


def _root_problems(schema: Mapping[str, Any]) -> list[str]:
    if schema.get("type") == "object" and "anyOf" not in schema:
        return []
    return ["at #: the root must be an object, and no anyOf"]


def _broken_rules(part: _Part, known: set[str]) -> Iterator[str]:
    schema = part.schema
    if not isinstance(schema, dict):
        yield "a schema must be an object"
        return
    unknown = sorted(set(schema) - known)
    if unknown:
        yield f"{', '.join(unknown)} is not supported"
    if part.depth > MAX_DEPTH:
        yield f"values may be nested at most {MAX_DEPTH} deep"
    yield from _object_rules(schema)
    yield from _value_rules(schema)


def _object_rules(schema: Mapping[str, Any]) -> Iterator[str]:
    """Objects must list all their properties as required and allow no others."""
    if "properties" not in schema and "object" not in _type_names(schema):
        return
    if schema.get("additionalProperties") is not False:
        yield "an object must have additionalProperties: false"
    optional = set(schema.get("properties", ())) - set(schema.get("required", ()))
    if optional:
        names = ", ".join(sorted(optional))
        yield f"required must list every property; {names} is missing (let it be null instead)"


def _value_rules(schema: Mapping[str, Any]) -> Iterator[str]:
    if not {"type", "anyOf", "$ref", "enum", "const"} & set(schema):
        yield "a schema must say its type"
    if "$ref" in schema and len(schema) > 1:
        yield "$ref must stand alone"
    if "array" in _type_names(schema) and "items" not in schema:
        yield "an array must have items"
    if "format" in schema and schema["format"] not in FORMATS:
        yield f"format {str(schema['format'])[:40]!r} is not supported; {', '.join(FORMATS)} are"


def _size_problems(schemas: list[dict[str, Any]]) -> Iterator[str]:
    names = [str(name) for one in schemas for name in one.get("properties", ())]
    choices = [value for one in schemas for value in one.get("enum", ())]
    fixed = [one["const"] for one in schemas if "const" in one]
    if len(names) > MAX_PROPERTIES:
        yield f"at #: {len(names):,} properties; at most {MAX_PROPERTIES:,}"
    if len(choices) > MAX_CHOICES:
        yield f"at #: {len(choices):,} enum values; at most {MAX_CHOICES:,}"
    size = sum(len(str(text)) for text in [*names, *choices, *fixed])
    if size > MAX_NAME_CHARACTERS:
        yield f"at #: {size:,} characters of names and values; at most {MAX_NAME_CHARACTERS:,}"


def _parts(part: _Part) -> Iterator[_Part]:
    """Yield every schema inside of `part`, itself first."""
    yield part
    schema = part.schema
    if not isinstance(schema, dict):
        return
    for keyword in ("properties", "$defs", "definitions"):
        deeper = part.depth + (keyword == "properties")
        for name, child in schema.get(keyword, {}).items():
            yield from _parts(_Part(f"{part.path}/{keyword}/{name}", child, deeper))
    if "items" in schema:
        yield from _parts(_Part(f"{part.path}/items", schema["items"], part.depth + 1))
    for at, child in enumerate(schema.get("anyOf", ())):
        yield from _parts(_Part(f"{part.path}/anyOf/{at}", child, part.depth))


def _type_names(schema: Mapping[str, Any]) -> list[Any]:
    declared = schema.get("type", [])
    return declared if isinstance(declared, list) else [declared]

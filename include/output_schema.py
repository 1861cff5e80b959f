"""What may stand in `output.schema.json`, and whether the API can enforce it.

The rules for `strict` are those of OpenAI's guide "Structured Outputs", section "Supported
schemas": every property required, no additional properties, and only the keywords listed there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

TYPES = ("string", "number", "integer", "boolean", "object", "array", "null")
COLUMN = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,62}")
CONTENT_COLUMN = "content"  # the one output column of a job without a schema
MAX_DEPTH = 10
MAX_PROPERTIES = 5_000

_STRUCTURE = {"type", "properties", "required", "additionalProperties", "items", "anyOf"}
_STRUCTURE |= {"enum", "const", "$defs", "definitions", "$ref"}
_NOTES = {"title", "description", "$schema", "$id", "$comment"}
_RULES = {"pattern", "format", "minLength", "maxLength", "minItems", "maxItems", "multipleOf"}
_RULES |= {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
_FINE_TUNED_PREFIX = "ft:"


def output_columns(schema: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return the names of the output columns: the schema's properties, in their order."""
    return (CONTENT_COLUMN,) if schema is None else tuple(schema["properties"])


def schema_problems(schema: Any) -> list[str]:
    """Say what keeps `schema` from describing one row of typed columns; empty when it is fine."""
    if not isinstance(schema, dict) or schema.get("type") != "object":
        return ['the schema must be an object: {"type": "object", "properties": {...}}']
    properties = schema.get("properties")
    if not isinstance(properties, dict) or not properties:
        return ["`properties` must name at least one output column"]
    return [
        *_name_problems(list(properties)),
        *_required_problems(schema),
        *(p for name, part in properties.items() for p in _property_problems(name, part)),
    ]


def is_strict(schema: Mapping[str, Any], model: str = "") -> bool:
    """Tell whether the API accepts `schema` with `strict: true` for `model`.

    Fine-tuned models (`ft:...`) do not know the keywords that limit strings, numbers and arrays.
    """
    if schema.get("type") != "object":
        return False
    known = _STRUCTURE | _NOTES
    if not model.startswith(_FINE_TUNED_PREFIX):
        known |= _RULES
    parts = list(_subschemas(schema, 0))
    properties = sum(len(part.get("properties", ())) for part, _ in parts)
    return properties <= MAX_PROPERTIES and all(
        depth <= MAX_DEPTH and known.issuperset(part) and _is_closed(part) for part, depth in parts
    )


def _is_closed(part: Mapping[str, Any]) -> bool:
    """Objects must list all their properties as required and allow no others."""
    if "properties" not in part and "object" not in _type_names(part):
        return True
    return part.get("additionalProperties") is False and set(part.get("required", ())) == set(
        part.get("properties", ())
    )


def _subschemas(part: Any, depth: int) -> Iterator[tuple[Mapping[str, Any], int]]:
    """Yield every schema inside `part`, itself first; what is no schema counts as unsupported."""
    if not isinstance(part, dict):
        yield {"not": part}, depth
        return
    yield part, depth
    for keyword in ("properties", "$defs", "definitions"):
        for child in part.get(keyword, {}).values():
            yield from _subschemas(child, depth + (keyword == "properties"))
    if "items" in part:
        yield from _subschemas(part["items"], depth + 1)
    for child in part.get("anyOf", ()):
        yield from _subschemas(child, depth)


def _type_names(part: Mapping[str, Any]) -> list[Any]:
    declared = part.get("type", [])
    return declared if isinstance(declared, list) else [declared]


def _name_problems(names: list[str]) -> list[str]:
    problems = [
        f"property `{name}` cannot be a column name: it must begin with a letter and hold only "
        "letters, digits and _ (at most 63); names that begin with _ are the product's own"
        for name in names
        if not COLUMN.fullmatch(name)
    ]
    folded = [name.lower() for name in names]
    twice = sorted({name for name in folded if folded.count(name) > 1})
    return problems + [f"property `{name}` is there twice (case does not count)" for name in twice]


def _required_problems(schema: Mapping[str, Any]) -> list[str]:
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        return ["`required` must be a list of property names"]
    absent = [name for name in required if name not in schema["properties"]]
    return [f"`required` names `{name}`, which is no property" for name in absent]


def _property_problems(name: str, part: Any) -> list[str]:
    if not isinstance(part, dict):
        return [f"property `{name}` must be an object such as {{'type': 'string'}}"]
    wrong = [found for found in _type_names(part) if found not in TYPES]
    return [f"property `{name}` has unknown type {found!r}; allowed: {', '.join(TYPES)}"
            for found in wrong]  # fmt: skip

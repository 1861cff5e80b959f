"""What may stand in `output.schema.json`; whether the API can enforce it, `strict_schema` says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

TYPES = ("string", "number", "integer", "boolean", "object", "array", "null")
COLUMN = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,62}")


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

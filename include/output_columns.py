"""The output columns of a job: what its answers fill, and of which kind each column is.

Text endpoints have the top-level properties of the schema, or `content`. A vector is one column
`embedding`. A moderation has `flagged`, `categories` (JSON, the names of those that were flagged),
and for each category whether it was flagged and its score. `output: raw` keeps the whole body.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from include.job_spec import Request

CONTENT_COLUMN = "content"  # the one output column of a job without a schema
VECTOR_COLUMN = "embedding"
# Source: API reference, "The moderation object"; older models leave some of them out.
CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/instructions",
    "self-harm/intent",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
SCORE_SUFFIX = "_score"

Schema = Mapping[str, Any]


class Kind(StrEnum):
    """The type of an output column."""

    TEXT = "text"  #: A string.
    INTEGER = "integer"  #: A 64-bit integer.
    REAL = "real"  #: A 64-bit float.
    BOOLEAN = "boolean"  #: True or false.
    JSON = "json"  #: JSON text of anything else.
    VECTOR = "vector"  #: 32-bit floats, as many in every row.


class OutputColumn(NamedTuple):
    """A column that the answer fills; `size` is the length of a vector."""

    name: str
    kind: Kind
    size: int = 0


class AnswerShape(StrEnum):
    """What an endpoint's answers are made of."""

    TEXT = "text"
    VECTOR = "vector"
    MODERATION = "moderation"
    RAW = "raw"


SINGLE_KINDS = {
    frozenset({"string"}): Kind.TEXT,
    frozenset({"integer"}): Kind.INTEGER,
    frozenset({"number"}): Kind.REAL,
    frozenset({"integer", "number"}): Kind.REAL,
    frozenset({"boolean"}): Kind.BOOLEAN,
}


def request_columns(request: Request) -> tuple[OutputColumn, ...]:
    """Return the output columns of a job, in the order of its target."""
    if request.shape is AnswerShape.VECTOR:
        return (OutputColumn(VECTOR_COLUMN, Kind.VECTOR, request.vector_length or 0),)
    if request.shape is AnswerShape.MODERATION:
        return moderation_columns()
    if request.shape is AnswerShape.RAW:
        return output_columns({})
    return output_columns(request.output_schema)


def moderation_columns() -> tuple[OutputColumn, ...]:
    """Return the columns of a moderation."""
    return (
        OutputColumn("flagged", Kind.BOOLEAN),
        OutputColumn("categories", Kind.JSON),
        *(OutputColumn(category_column(name), Kind.BOOLEAN) for name in CATEGORIES),
        *(OutputColumn(category_column(name) + SCORE_SUFFIX, Kind.REAL) for name in CATEGORIES),
    )


def category_column(category: str) -> str:
    """Return `self_harm_intent` for `self-harm/intent`."""
    return category.replace("-", "_").replace("/", "_")


def output_columns(schema: Schema | None) -> tuple[OutputColumn, ...]:
    """Return the columns of a text answer in the order of the schema's properties."""
    if schema is None:
        return (OutputColumn(CONTENT_COLUMN, Kind.TEXT),)
    properties = schema.get("properties")
    if not isinstance(properties, Mapping) or not properties:
        return (OutputColumn(CONTENT_COLUMN, Kind.JSON),)
    return tuple(OutputColumn(name, _kind(part, schema)) for name, part in properties.items())


def _kind(part: Any, root: Schema) -> Kind:
    types = _types(part, root, 0) - {"null"}
    return SINGLE_KINDS.get(frozenset(types), Kind.JSON)


def _types(part: Any, root: Schema, depth: int) -> set[str]:
    """Return the JSON types that `part` allows; "any" when it does not say."""
    if not isinstance(part, Mapping) or depth > 8:
        return {"any"}
    if "type" in part:
        found = part["type"]
        return {found} if isinstance(found, str) else set(found)
    if "$ref" in part:
        return _types(_resolved(part["$ref"], root), root, depth + 1)
    for union in ("anyOf", "oneOf"):
        if part.get(union):
            return set().union(*(_types(choice, root, depth + 1) for choice in part[union]))
    values = part.get("enum") or ([part["const"]] if "const" in part else [])
    return {_type_of(value) for value in values} or {"any"}


def _resolved(reference: Any, root: Schema) -> Any:
    found: Any = root
    for step in str(reference).removeprefix("#").strip("/").split("/"):
        found = found.get(step) if isinstance(found, Mapping) else None
    return found


def _type_of(value: object) -> str:
    names = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
    return names.get(type(value), "any")

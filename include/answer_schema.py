"""A job's answer schema: how an answer's text becomes the values of the output columns.

Values are what JSON Schema says they are, with these rules for the table:

- String, integer, number and boolean (also nullable) are typed columns, anything else is JSON text.
- An integer beyond 64 bits and a number that is not finite make the answer invalid.
- U+0000 and lone surrogates become U+FFFD: neither can be stored.

A plain schema is checked while decoding, by a generated msgspec type. What that type does not
accept, and every other schema, is judged by jsonschema_rs, so the verdict never depends on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Annotated, Any, Literal, Union

import jsonschema_rs
import msgspec
import orjson

from include.classification import Problem, Reason, clipped
from include.output_columns import Kind, OutputColumn, output_columns
from include.result_file import REPLACEMENT, mend_escapes

INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1
NUL_ESCAPE = "\\u0000"
EXACT_FLOAT = 1 << 53  # below this every integer is a float of the same value
NOTES = {"title", "description", "default", "examples", "$schema", "$comment"}

Schema = Mapping[str, Any]
Record = msgspec.Struct


class AnswerReader:
    """Turns the text of answers into records: one attribute `f0`, `f1`, ... per output column.

    Records are structs that the garbage collector does not follow, which halves the cost of
    holding many. `fast=False` leaves the generated type out, for comparison.

    `quick` is `read` for a text without `trap` in it, but raises where it would have to look twice.
    """

    read: Callable[[str], Record | Problem]
    quick: Callable[[str], Record | Problem]
    trap: str

    def __init__(self, schema: Schema | None, *, fast: bool = True) -> None:
        self.columns = output_columns(schema)
        names = [f"f{number}" for number in range(len(self.columns))]
        self.getters = [attrgetter(name) for name in names]
        self._record = msgspec.defstruct("Output", [(name, Any) for name in names], gc=False)
        self.nothing: Record = self._record(*(None for _ in names))
        self.trap = "\x00" if schema is None else NUL_ESCAPE
        if schema is None:
            self.read, self.quick = self._read_text, self._record
            return
        self._validator = jsonschema_rs.validator_for(dict(schema), mask="the value")
        self._converters = [(column.name, CONVERTERS[column.kind]) for column in self.columns]
        self._is_object = bool(schema.get("properties"))
        self.read = self.quick = self._read_any
        shape = _struct(schema) if fast else None
        if shape is not None:
            decode = msgspec.json.Decoder(shape).decode
            self.read = self.quick = self._fast_reader(decode)
            if not any(column.kind is Kind.JSON for column in self.columns):
                self.quick = decode

    def _read_text(self, content: str) -> Record:
        return self._record(content.replace("\x00", REPLACEMENT))

    def _fast_reader(self, decode: Callable[[str], Record]) -> Callable[[str], Record | Problem]:
        """Return a reader that leaves to `_read_any` what `decode` does not accept."""
        texts = [name for name, column in self._named() if column.kind is Kind.JSON]

        def read(content: str) -> Record | Problem:
            if NUL_ESCAPE not in content:
                try:
                    record = decode(content)
                except (msgspec.MsgspecError, ValueError, RecursionError):
                    return self._read_any(content)
                return self._with_texts(record, texts) if texts else record
            return self._read_any(content)

        return read

    def _named(self) -> Iterator[tuple[str, OutputColumn]]:
        return ((f"f{number}", column) for number, column in enumerate(self.columns))

    def _with_texts(self, record: Record, texts: list[str]) -> Record:
        """Return a record with JSON text in place of lists; a decoded one refuses other types."""
        found = self._record(*(get(record) for get in self.getters))
        for name in texts:
            setattr(found, name, _json_text(getattr(found, name)))
        return found

    def _read_any(self, content: str) -> Record | Problem:
        try:
            value = orjson.loads(mend_escapes(content))
        except ValueError:
            return _invalid("The answer is no JSON.")
        if not self._validator.is_valid(value):
            return _invalid(_complaint(self._validator, value))
        if not self._is_object:
            return self._record(_json_text(value))
        if not isinstance(value, dict):
            return _invalid("The answer is no JSON object.")
        try:
            return self._record(*(convert(value.get(name)) for name, convert in self._converters))
        except (ValueError, OverflowError, TypeError) as error:
            return _invalid(str(error))


def _invalid(message: str) -> Problem:
    return Problem(Reason.INVALID_ANSWER, message=clipped(message))


def _complaint(validator: Any, value: Any) -> str:
    """Say where the answer is wrong, without its values."""
    error = next(validator.iter_errors(value))
    path = "/".join(str(step) for step in error.instance_path)
    return f"At /{path}: {error.message}"


def _json_text(value: Any) -> str | None:
    return None if value is None else orjson.dumps(value).decode()


def _string(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else _json_text(value)


def _integer(value: Any) -> int | None:
    if value is None:
        return None
    number = int(value)
    if not INT64_MIN <= number <= INT64_MAX:
        raise ValueError("The answer has an integer beyond 64 bits.")
    return number


def _real(value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("The answer has a number that is not finite.")
    return number


def _boolean(value: Any) -> bool | None:
    return value if value is None else bool(value)


CONVERTERS: dict[Kind, Callable[[Any], Any]] = {
    Kind.TEXT: _string,
    Kind.INTEGER: _integer,
    Kind.REAL: _real,
    Kind.BOOLEAN: _boolean,
    Kind.JSON: _json_text,
}


def _struct(schema: Schema) -> type[msgspec.Struct] | None:
    """Return a struct that accepts only what `schema` accepts, or None.

    Unknown properties must be forbidden: msgspec does not judge the fields that it skips.
    """
    allowed = NOTES | {"type", "properties", "required", "additionalProperties"}
    if set(schema) - allowed or schema.get("type") != "object":
        return None
    properties = schema.get("properties") or {}
    required = set(schema.get("required", ()))
    if schema.get("additionalProperties") is not False or not properties:
        return None
    types = {name: _plain_type(part) for name, part in properties.items()}
    if required - set(properties) or None in types.values():
        return None
    fields = [_field(i, types[name], name in required) for i, name in enumerate(properties)]
    # Mandatory fields must come first in a positional struct; keyword-only has no order.
    return msgspec.defstruct(
        "Output",
        fields,
        kw_only=True,
        gc=False,
        forbid_unknown_fields=True,
        rename={f"f{i}": name for i, name in enumerate(properties)},
    )


def _field(number: int, kind: Any, required: bool) -> tuple[Any, ...]:  # noqa: FBT001
    return (f"f{number}", kind) if required else (f"f{number}", kind, None)


def _plain_type(part: Any) -> Any:
    """Return the Python type of a property, or None when msgspec cannot say the same."""
    if not isinstance(part, Mapping):
        return None
    rules = {key: value for key, value in part.items() if key not in NOTES}
    names = rules.pop("type", None)
    names = [names] if isinstance(names, str) else list(names or ())
    plain = [name for name in names if name != "null"]
    if len(plain) != 1 or plain[0] not in PLAIN_TYPES:
        return None
    nullable = "null" in names
    if "enum" in rules:
        return _literal(plain[0], rules, nullable=nullable)
    found = PLAIN_TYPES[plain[0]](rules)
    if found is None:
        return None
    return Union[found, None] if nullable else found  # noqa: UP007 - `|` needs real types


def _literal(name: str, rules: dict[str, Any], *, nullable: bool) -> Any:
    values = rules["enum"]
    plain = [v for v in values if v is not None]
    kind = {"string": str, "integer": int}.get(name)
    if set(rules) != {"enum"} or kind is None or not plain:
        return None
    if any(type(value) is not kind for value in plain):
        return None
    if kind is int and not all(INT64_MIN <= value <= INT64_MAX for value in plain):
        return None
    if None in values and nullable:
        plain.append(None)
    return Literal[tuple(plain)]


def _plain_string(rules: dict[str, Any]) -> Any:
    bounds = _lengths(rules, "minLength", "maxLength")
    if bounds is None:
        return None
    return Annotated[str, msgspec.Meta(**bounds)] if bounds else str


def _lengths(rules: dict[str, Any], low: str, high: str) -> dict[str, Any] | None:
    """Return the bounds for msgspec, or None when `rules` say anything else."""
    if set(rules) - {low, high} or any(type(v) is not int or v < 0 for v in rules.values()):
        return None
    names = {low: "min_length", high: "max_length"}
    return {names[key]: value for key, value in rules.items()}


def _plain_integer(rules: dict[str, Any]) -> Any:
    """Return a 64-bit integer within the bounds."""
    bounds = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
    if set(rules) - bounds or any(type(value) is not int for value in rules.values()):
        return None
    low = max(rules.get("minimum", INT64_MIN), rules.get("exclusiveMinimum", INT64_MIN - 1) + 1)
    high = min(rules.get("maximum", INT64_MAX), rules.get("exclusiveMaximum", INT64_MAX + 1) - 1)
    low, high = max(low, INT64_MIN), min(high, INT64_MAX)
    return Annotated[int, msgspec.Meta(ge=low, le=high)] if low <= high else None


def _plain_number(rules: dict[str, Any]) -> Any:
    names = {"minimum": "ge", "maximum": "le", "exclusiveMinimum": "gt", "exclusiveMaximum": "lt"}
    if set(rules) - set(names) or {"minimum", "exclusiveMinimum"} <= set(rules):
        return None
    if {"maximum", "exclusiveMaximum"} <= set(rules):
        return None
    if any(type(v) not in (int, float) or abs(v) >= EXACT_FLOAT for v in rules.values()):
        return None
    bounds: dict[str, Any] = {names[key]: value for key, value in rules.items()}
    return Annotated[float, msgspec.Meta(**bounds)] if bounds else float


def _plain_boolean(rules: dict[str, Any]) -> Any:
    return None if rules else bool


def _plain_array(rules: dict[str, Any]) -> Any:
    """Return a list of strings, integers or booleans; numbers would lose `1` against `1.0`."""
    items = rules.pop("items", None)
    if not isinstance(items, Mapping) or items.get("type") not in ("string", "integer", "boolean"):
        return None
    found, bounds = _plain_type(items), _lengths(rules, "minItems", "maxItems")
    if found is None or bounds is None:
        return None
    kind = list[found]  # type: ignore[valid-type]
    return Annotated[kind, msgspec.Meta(**bounds)] if bounds else kind


PLAIN_TYPES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "string": _plain_string,
    "integer": _plain_integer,
    "number": _plain_number,
    "boolean": _plain_boolean,
    "array": _plain_array,
}

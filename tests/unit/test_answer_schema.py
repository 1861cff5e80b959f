"""Answers become typed values, and both ways of checking them agree."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from include.answer_schema import AnswerReader
from include.classification import Problem, Reason
from include.output_columns import Kind, OutputColumn, output_columns

STRICT: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["kind", "count", "score", "good", "note", "tags"],
    "properties": {
        "kind": {"type": "string", "enum": ["a", "b", "é"]},
        "count": {"type": "integer", "minimum": -5, "exclusiveMaximum": 1000},
        "score": {"type": ["number", "null"], "minimum": 0},
        "good": {"type": "boolean", "description": "a note"},
        "note": {"type": ["string", "null"], "maxLength": 3},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
        "maybe": {"type": "integer"},
        "level": {"type": ["integer", "null"], "enum": [1, 2, None]},
    },
}
GOOD: dict[str, Any] = {
    "kind": "a", "count": 1, "score": 0.5, "good": True, "note": None, "tags": ["x"],
}  # fmt: skip


def schema_of(**properties: Any) -> dict[str, Any]:
    """Return a strict object schema."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def values(reader: AnswerReader, content: str) -> tuple[Any, ...] | Problem:
    """Read an answer and return its values as a tuple."""
    found = reader.read(content)
    return found if isinstance(found, Problem) else tuple(get(found) for get in reader.getters)


def read(content: str, schema: dict[str, Any] | None) -> tuple[Any, ...] | Problem:
    """Read an answer with a new reader."""
    return values(AnswerReader(schema), content)


def test_kinds_follow_the_schema() -> None:
    """Plain types, also nullable, are typed; anything else is JSON text."""
    schema = schema_of(
        a={"type": "string"}, b={"type": ["integer", "null"]}, c={"type": "number"},
        d={"anyOf": [{"type": "boolean"}, {"type": "null"}]}, e={"enum": ["x", None]},
        f={"type": "array"}, g={"type": ["string", "integer"]}, h={"$ref": "#/$defs/h"}, i={},
    )  # fmt: skip
    schema["$defs"] = {"h": {"type": "integer"}}

    kinds = [column.kind for column in output_columns(schema)]

    assert kinds == [
        Kind.TEXT, Kind.INTEGER, Kind.REAL, Kind.BOOLEAN, Kind.TEXT,
        Kind.JSON, Kind.JSON, Kind.INTEGER, Kind.JSON,
    ]  # fmt: skip


def test_without_schema_the_answer_is_one_text() -> None:
    """Free text goes into the column `content`, NUL replaced."""
    assert output_columns(None) == (OutputColumn("content", Kind.TEXT),)
    assert read("a\x00b", None) == ("a\ufffdb",)


def test_values_are_typed() -> None:
    """Absent and null are None; lists are JSON text."""
    content = json.dumps(GOOD | {"score": 1, "count": 2})

    assert read(content, STRICT) == ("a", 2, 1.0, True, None, '["x"]', None, None)


def test_nul_and_lone_surrogate_are_replaced() -> None:
    """Neither can be stored."""
    content = r'{"a":"x\u0000y\ud83d"}'

    assert read(content, schema_of(a={"type": "string"})) == ("x\ufffdy\ufffd",)


@pytest.mark.parametrize(
    "content",
    [
        "no json", '{"a":1}trailing', '```json\n{"a":1}\n```', '{"a":1', '{"a":NaN}', '{"a":1e999}',
        '{"a":1.5}', '{"a":true}', '{"a":"1"}', "{}", '{"a":1,"b":2}', "[]", "null",
        '{"a":9223372036854775808}', '{"a":1e300}', "[" * 100_000,
    ],
)  # fmt: skip
def test_invalid_answer_is_a_problem(content: str) -> None:
    """Nothing is stripped or guessed, and nothing raises."""
    found = read(content, schema_of(a={"type": "integer"}))

    assert isinstance(found, Problem)
    assert found.reason is Reason.INVALID_ANSWER


def test_integral_float_is_an_integer() -> None:
    """JSON Schema says that 1.0 is an integer."""
    assert read('{"a":1.0}', schema_of(a={"type": "integer"})) == (1,)


def test_complaint_names_the_place_and_not_the_value() -> None:
    """Messages never hold what the model wrote."""
    found = read(json.dumps(GOOD | {"kind": "SECRET"}), STRICT)

    assert isinstance(found, Problem)
    assert "/kind" in str(found.message)
    assert "SECRET" not in str(found.message)


def test_plain_schema_is_checked_while_decoding() -> None:
    """The fast way is really taken; a pattern is beyond it."""
    plain, pattern = (
        schema_of(a={"type": "string"}),
        schema_of(a={"type": "string", "pattern": "x"}),
    )

    assert AnswerReader(plain).read.__name__ == "read"
    assert AnswerReader(pattern).read.__name__ == "_read_any"


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64)
    | st.integers(-6, 1001)
    | st.floats(allow_nan=False)
    | st.sampled_from([1.0, -0.0, 2**53, 2**53 + 1, 1e20, 10**30])
    | st.text(max_size=4)
    | st.sampled_from(["a", "é", "\x00", "\ud83d", "😀😀😀"])
)
ANSWERS = st.dictionaries(
    st.sampled_from([*STRICT["properties"], "other"]), SCALARS | st.lists(SCALARS, max_size=3)
).flatmap(
    lambda odd: st.lists(st.sampled_from(sorted(odd)) if odd else st.nothing(), unique=True).map(
        lambda names: GOOD | {name: odd[name] for name in names}
    )
)


@settings(max_examples=500)
@given(ANSWERS, st.booleans())
def test_both_ways_give_the_same_verdict(answer: dict[str, Any], escaped: bool) -> None:  # noqa: FBT001
    """The generated type accepts nothing that the schema refuses, and gives the same values."""
    content = json.dumps(answer, ensure_ascii=escaped)
    fast = values(AnswerReader(STRICT), content)
    slow = values(AnswerReader(STRICT, fast=False), content)

    assert fast == slow
    assert [type(v) for v in fast] == [type(v) for v in slow] if isinstance(fast, tuple) else True


@given(st.text(alphabet='{}[]":,kinda1.eE+- \\u0é', max_size=30))
def test_both_ways_agree_on_broken_json(content: str) -> None:
    """Text that is no JSON is refused by both."""
    schema = schema_of(a={"type": "number"})

    assert values(AnswerReader(schema), content) == values(
        AnswerReader(schema, fast=False), content
    )


def test_records_are_not_followed_by_the_garbage_collector() -> None:
    """Half a million records must not make every collection slower."""
    record = AnswerReader(STRICT).read(json.dumps(GOOD))

    assert isinstance(record, msgspec.Struct)
    assert type(record).__struct_config__.gc is False

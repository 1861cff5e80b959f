"""Lines of output and error files: none is lost, nothing raises."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from include.result_file import (
    BODIES,
    Answer,
    Damage,
    Quarantined,
    ResultParser,
    mend_escapes,
    token_counts,
)
from include.result_lines import Line, ResultLines, read_lines

CHAT = "/v1/chat/completions"


def lines_of(data: bytes, **options: int) -> list[Line]:
    """Read all lines."""
    return list(ResultLines(io.BytesIO(data), **options))


def parse(data: bytes | str, endpoint: str = CHAT) -> Answer[Any] | Quarantined:
    """Parse one line."""
    raw = data.encode() if isinstance(data, str) else data
    return ResultParser(endpoint).parse(Line(1, 0, raw, len(raw)))


def answer_of(data: bytes | str, endpoint: str = CHAT) -> Answer[Any]:
    """Parse a line that must be an answer."""
    found = parse(data, endpoint)
    assert isinstance(found, Answer)
    return found


def damage_of(data: bytes | str) -> Damage:
    """Parse a line that must be quarantined."""
    found = parse(data)
    assert isinstance(found, Quarantined)
    return found.reason


def chat_line(content: object = "hello", **fields: Any) -> dict[str, Any]:
    """Return a good line with changes."""
    body = {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}
    return {"custom_id": "a", "response": {"status_code": 200, "body": body}} | fields


def test_lines_end_at_newline_only() -> None:
    """U+2028, U+0085, form feeds and lone carriage returns do not end a line."""
    text = "a\u2028b\u0085c\x0cd\re\nsecond"

    found = lines_of(text.encode())

    assert [line.data.decode() for line in found] == ["a\u2028b\u0085c\x0cd\re\n", "second"]


def test_byte_order_mark_carriage_returns_and_missing_last_newline_are_accepted() -> None:
    """The files of other servers and of Windows tools are read as they are."""
    found = lines_of(b'\xef\xbb\xbf{"a":1}\r\n{"b":2}')

    assert [(line.number, line.offset, line.length) for line in found] == [(1, 3, 7), (2, 12, 7)]


def test_blank_lines_are_counted_and_skipped() -> None:
    """A blank line takes a number but is not yielded."""
    source = read_lines(io.BytesIO(b"\n{}\n \t\r\n{}\n\n"))

    numbers = [line.number for line in source]

    assert numbers == [2, 4]
    assert (source.lines, source.blank) == (5, 3)


def test_line_of_sixteen_megabytes_is_read() -> None:
    """Long answers are answers."""
    line = json.dumps(chat_line("x" * (16 << 20)))

    assert len(answer_of(line).response.body.choices[0].message.content) == 16 << 20


def test_overlong_line_is_skipped_in_pieces() -> None:
    """A line over the limit is quarantined with its custom_id, and the next one is read."""
    long = b'{"custom_id":"big"' + b" " * 3_000_000 + b"}\n"
    found = lines_of(long + b"{}\n", max_bytes=1_000_000)

    first = ResultParser(CHAT).parse(found[0])

    assert first == Quarantined(Damage.TOO_LONG, "big")
    assert [line.offset for line in found] == [0, len(long)]
    assert found[0].length == len(long) - 1
    assert len(found[0].data) < 5_000


PIECES = st.sampled_from([b"\n", b"\r\n", b"{}", b"\xef\xbb\xbf", b" ", b"x"])


@given(st.binary(max_size=400) | st.lists(PIECES).map(b"".join), st.integers(1, 20))
def test_every_byte_is_in_one_line(data: bytes, limit: int) -> None:
    """Offsets and sizes cover the file without gap or overlap, whatever its bytes are."""
    source = ResultLines(io.BytesIO(data), limit)
    found = list(source)

    assert source.lines == data.count(b"\n") + (not data.endswith(b"\n") and bool(data))
    assert len(found) + source.blank == source.lines
    for line in found:
        piece = data[line.offset : line.offset + line.size]
        assert piece.startswith(line.data[:-1])
        assert b"\n" not in piece[:-1]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["custom_id", "response", "error", "body", "status_code", "choices",
                         "message", "content", "usage", "code", "output", "data", "x"]),
        inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@given(
    st.binary(max_size=200)
    | JSON_VALUES.map(lambda value: json.dumps(value).encode())
    | st.fixed_dictionaries({"custom_id": st.text(min_size=1)}, optional={
        "response": JSON_VALUES, "error": JSON_VALUES,
    }).map(lambda value: json.dumps(value).encode()),
    st.sampled_from(sorted(BODIES)),
)  # fmt: skip
def test_parser_never_raises(data: bytes, endpoint: str) -> None:
    """Any bytes become an answer or a reason."""
    found = parse(data, endpoint)

    assert isinstance(found, Answer | Quarantined)
    if isinstance(found, Answer):
        assert found.custom_id


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ('{"custom_id":"a","response":{"status_co', Damage.NOT_JSON),
        ('{"custom_id":"a","x":NaN}', Damage.NOT_JSON),
        ('{"custom_id":"a","x":"\t"}', Damage.NOT_JSON),
        (b'{"custom_id":"a","error":{"message":"\xff"}}', Damage.NOT_UTF8),
        (b'{"custom_id":"\xff"}', Damage.NOT_UTF8),
        ("[1]", Damage.NOT_AN_OBJECT),
        ("{}", Damage.NO_CUSTOM_ID),
        ('{"custom_id":""}', Damage.NO_CUSTOM_ID),
        ('{"custom_id":7}', Damage.NO_CUSTOM_ID),
        ("[" * 100_000, Damage.NOT_JSON),
        (b"\x00\x00\x00", Damage.NOT_JSON),
    ],
)
def test_unusable_line_has_a_reason(data: bytes | str, reason: Damage) -> None:
    """What cannot be an answer says why."""
    assert damage_of(data) is reason


def test_damaged_line_keeps_its_custom_id() -> None:
    """A torn line still names its request, for people who look into the quarantine."""
    assert parse('{"id":"x","custom_id":"row-7","resp') == Quarantined(Damage.NOT_JSON, "row-7")


def test_long_custom_id_is_kept_whole() -> None:
    """Ids of 260 characters are met in the wild."""
    line = chat_line(custom_id="é" * 260)

    assert answer_of(json.dumps(line)).custom_id == "é" * 260


@pytest.mark.parametrize("tail", [{}, {"response": None}, {"error": None}])
def test_absent_response_and_error_are_none(tail: dict[str, None]) -> None:
    """A line may leave out what it has not."""
    found = answer_of(json.dumps({"custom_id": "a"} | tail))

    assert (found.response, found.error) == (None, None)


def test_body_as_json_text_is_read() -> None:
    """Some servers send the body as a string of JSON."""
    line = chat_line()
    line["response"]["body"] = json.dumps(line["response"]["body"])

    assert answer_of(json.dumps(line)).response.body.choices[0].message.content == "hello"


def test_parts_of_unexpected_type_are_absent() -> None:
    """A body is read as far as it can be: odd usage does not cost the answer."""
    line = chat_line(error="boom")
    line["response"]["status_code"] = "200"
    line["response"]["body"]["usage"] = {"prompt_tokens": "many"}

    found = answer_of(json.dumps(line))

    assert found.response.status_code == 200
    assert found.response.body.choices[0].message.content == "hello"
    assert token_counts(found.response.body.usage) == (0, 0, 0, 0)
    assert found.error.message == "boom"


def test_of_duplicate_keys_the_last_one_counts() -> None:
    """As every JSON parser in Python has it."""
    assert answer_of('{"custom_id":"a","custom_id":"b"}').custom_id == "b"


def test_lone_surrogate_becomes_the_replacement_character() -> None:
    """A paid answer is not thrown away for half an emoji."""
    line = json.dumps(chat_line("x\ud83dy \U0001f600"))

    content = answer_of(line).response.body.choices[0].message.content

    assert content == "x\ufffdy \U0001f600"


@pytest.mark.parametrize(
    ("text", "mended"),
    [
        (r"\ud83d\ude00", r"\ud83d\ude00"),
        (r"\ud83dx", r"\ufffdx"),
        (r"\ude00\ud83d", r"\ufffd\ufffd"),
        (r"\u0000", r"\ufffd"),
        (r"\\u0000 \\ud83d", r"\\u0000 \\ud83d"),
        (r"\\\u0000", r"\\\ufffd"),
        (r"\u00e9", r"\u00e9"),
    ],
)
def test_only_unstorable_escapes_are_replaced(text: str, mended: str) -> None:
    """Pairs stay, and an escaped backslash before `u0000` begins no escape."""
    assert mend_escapes(text) == mended


def test_usage_of_both_families_is_read() -> None:
    """`/v1/responses` and the others name their tokens differently."""
    chat = {"prompt_tokens": 5, "completion_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 4},
            "completion_tokens_details": {"reasoning_tokens": 2}}  # fmt: skip
    modern = {"input_tokens": 5, "output_tokens": 3, "input_tokens_details": {"cached_tokens": 4},
              "output_tokens_details": {"reasoning_tokens": 2}}  # fmt: skip
    template = '{"custom_id":"a","response":{"status_code":200,"body":{"usage":%s}}}'

    for endpoint, usage in ((CHAT, chat), ("/v1/responses", modern)):
        found = answer_of(template % json.dumps(usage), endpoint)
        assert token_counts(found.response.body.usage) == (5, 4, 3, 2)

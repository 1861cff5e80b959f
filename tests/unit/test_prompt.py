"""A prompt is compiled once into constant parts and columns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from include.prompt import PromptError, Template, compile_prompt


def render(template: Template, row: dict[str, str]) -> str:
    """Fill a template as the builder does."""
    return template.pattern % tuple(row[name] for name in template.columns)


def test_system_and_user_are_split_by_the_first_line_of_dashes() -> None:
    """Before `---` is the system part, after it the user part, without blank space around."""
    prompt = compile_prompt("You help {{ who }}.\n\n---\nA: {{ a }}\n---\nB: {{b}}\n")

    assert prompt.system is not None
    assert render(prompt.system, {"who": "us"}) == "You help us."
    assert render(prompt.user, {"a": "1", "b": "2"}) == "A: 1\n---\nB: 2"


def test_without_dashes_all_is_the_user_part() -> None:
    """There is no system part unless the file has a `---` line."""
    prompt = compile_prompt("a --- b {{ x }}")

    assert prompt.system is None
    assert render(prompt.user, {"x": "%s {{ y }}"}) == "a --- b %s {{ y }}"


def test_lines_of_placeholders_are_those_of_the_file() -> None:
    """A message about a placeholder names its line in prompt.md."""
    prompt = compile_prompt("\n{{ a }}\n---\n\n{{ b }} {{ c }}\n{{ a }}")

    assert [(hole.column, hole.line) for hole in prompt.placeholders] == [
        ("a", 2), ("b", 5), ("c", 5), ("a", 6)
    ]  # fmt: skip


@given(st.text(st.characters(codec="utf-8", exclude_characters="\r")))
def test_any_constant_text_stays_as_it_is(text: str) -> None:
    r"""Percent signs, braces and all else are sent as written; `\{{` is `{{`."""
    constant = "<" + text.replace("\\{{", "").replace("{{", "").replace("---", "") + ">"

    prompt = compile_prompt(constant + "\\{{" + "{{ x }}")

    assert render(prompt.user, {"x": "1"}) == constant + "{{1"


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("a\n{{ x", 2, "not closed"),
        ("{{ x }}\n{{ x.y }}", 2, "no column name"),
        ("{{ }}", 1, "no column name"),
        ("{{ x\n}}", 1, "not closed"),
        ("no column", 1, "no placeholder"),
        ("{{ x }}\n---\n \n", 4, "empty part"),
        ("", 1, "empty part"),
    ],
)
def test_mistakes_name_the_line(text: str, line: int, reason: str) -> None:
    """What cannot be compiled is refused with its line."""
    with pytest.raises(PromptError, match=reason) as caught:
        compile_prompt(text)

    assert caught.value.line == line

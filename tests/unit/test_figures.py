"""Figures as people read them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from include.figures import counted, noun

ROOT = Path(__file__).parents[2]
PLURALS = (
    "batches", "checks", "columns", "days", "files", "jobs", "keys", "lines", "requests",
    "rounds", "rows", "runs", "shards", "tasks", "warnings",
)  # fmt: skip


@pytest.mark.parametrize(
    ("number", "one", "expected"),
    [
        (0, "row", "0 rows"),
        (1, "row", "1 row"),
        (2_000, "row", "2,000 rows"),
        (1, "batch", "1 batch"),
        (3, "duplicate batch", "3 duplicate batches"),
    ],
)
def test_one_thing_is_singular(number: int, one: str, expected: str) -> None:
    """Only one of a thing is singular, and large counts have separators."""
    assert counted(number, one) == expected


def test_dollars_are_formatted_in_one_place() -> None:
    """`figures.money` and `figures.dollars`; what one row costs needs more digits."""
    formatted = re.compile(r"\$\{[^}]*:,?\.")
    found = {
        path.name
        for folder in ("include", "plugins", "dags")
        for path in (ROOT / folder).rglob("*.py")
        if formatted.search(path.read_text(encoding="utf-8"))
    }

    assert found == {"figures.py", "canary.py"}


def test_a_verb_agrees_with_its_count() -> None:
    """What does not take -s names its plural."""
    assert counted(1, "row is", "rows are") == "1 row is"
    assert counted(2, "row is", "rows are") == "2 rows are"
    assert noun(1, "has", "have") == "has"


def test_no_text_puts_a_number_before_a_plural() -> None:
    """A number and what it counts go through `counted`: else somebody reads `1 batches`."""
    sources = [*ROOT.glob("include/**/*.py"), *ROOT.glob("plugins/**/*.py")]
    ours = [one for one in sources if one.parent.name not in {"bench", "simulator"}]

    wrong = [f"{path}:{line}" for path in ours for line in _fixed_plurals(path)]

    assert len(ours) > 100
    assert wrong == []


def _fixed_plurals(path: Path) -> Iterator[int]:
    """Yield the lines of f-strings with `{number} rows` or the like."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.JoinedStr):
            for before, after in pairwise(node.values):
                if isinstance(before, ast.FormattedValue) and _begins_with_plural(after):
                    yield node.lineno


def _begins_with_plural(part: ast.expr) -> bool:
    if not isinstance(part, ast.Constant) or not str(part.value).startswith(" "):
        return False
    word = str(part.value).split(" ")[1].rstrip(".,:;")
    return word in PLURALS

r"""`prompt.md` compiled once into constant parts and columns.

`{{ column }}` stands for the row's value, `\{{` for two literal braces. A line `---` splits the
file: before it is the system part, after it the user part. There are no filters and no logic; what
a template cannot say belongs into the job's `request.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_MARK = re.compile(r"\\\{\{|\{\{([^\n]*?)\}\}|\{\{")
_SPLIT = re.compile(r"^---[ \t]*$", re.MULTILINE)
_COLUMN = re.compile(r"\w+")


class PromptError(ValueError):
    """`prompt.md` cannot be compiled; `line` is 1-based."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


@dataclass(frozen=True)
class Placeholder:
    """One `{{ column }}` and the line of prompt.md (1-based) that it stands in."""

    column: str
    line: int


@dataclass(frozen=True)
class Template:
    """Text with holes: `constants` has one item more than `placeholders`, and they alternate."""

    constants: tuple[str, ...]
    placeholders: tuple[Placeholder, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the column of each hole, in the order of the text; a column may come twice."""
        return tuple(placeholder.column for placeholder in self.placeholders)

    @property
    def pattern(self) -> str:
        """Return the text for the `%` operator: `pattern % values` fills the holes."""
        return "%s".join(constant.replace("%", "%%") for constant in self.constants)


@dataclass(frozen=True)
class Prompt:
    """A compiled prompt; `system` is None when the file has no `---` line."""

    system: Template | None
    user: Template

    @property
    def placeholders(self) -> tuple[Placeholder, ...]:
        """Return all holes in the order of the file."""
        before = self.system.placeholders if self.system else ()
        return before + self.user.placeholders

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the column of each hole, in the order of the file; a column may come twice."""
        return tuple(placeholder.column for placeholder in self.placeholders)


def compile_prompt(text: str) -> Prompt:
    """Compile the text of prompt.md.

    Raises `PromptError` for an unclosed `{{`, for anything but a column name inside of it, for an
    empty part, and for a prompt without any placeholder.
    """
    split = _SPLIT.search(text)
    system = _template(text[: split.start()], 1) if split else None
    start = split.end() if split else 0
    prompt = Prompt(system, _template(text[start:], 1 + text.count("\n", 0, start)))
    if not prompt.placeholders:
        raise PromptError("has no placeholder such as {{ column }}: all rows would be alike", 1)
    return prompt


def _template(text: str, first_line: int) -> Template:
    """Compile one part; blank space around it is not sent."""
    first_line += text[: len(text) - len(text.lstrip())].count("\n")
    text = text.strip()
    if not text:
        raise PromptError("has an empty part", first_line)
    constants, placeholders, end = [""], [], 0
    for mark in _MARK.finditer(text):
        constants[-1] += text[end : mark.start()]
        end = mark.end()
        if mark[0].startswith("\\"):
            constants[-1] += "{{"
            continue
        line = first_line + text.count("\n", 0, mark.start())
        placeholders.append(Placeholder(_column(mark, line), line))
        constants.append("")
    constants[-1] += text[end:]
    return Template(tuple(constants), tuple(placeholders))


def _column(mark: re.Match[str], line: int) -> str:
    if mark[1] is None:
        raise PromptError(r"`{{` is not closed on its line; write `\{{` for two braces", line)
    column = mark[1].strip()
    if not _COLUMN.fullmatch(column):
        raise PromptError(
            f"`{{{{{mark[1]}}}}}` is no column name; only {{{{ column }}}} is known, without "
            "filters (rename or compute the column in the SQL)",
            line,
        )
    return column

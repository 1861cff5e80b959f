"""job.yaml with line numbers, and validation errors in words that lead to the mistake."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

Location = tuple[str | int, ...]
_SHOWN = 40  # longer values are not repeated in a message
_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "tuple_type": "a list",
}


@dataclass
class Problems:
    """What is wrong with a job folder, collected so that all of it is reported at once."""

    found: list[str] = field(default_factory=list)

    def add(self, file: str, line: int | None, message: str) -> None:
        """Note one problem of `file`, at the 1-based `line` if it is known."""
        self.found.append(f"{file}:{line}: {message}" if line else f"{file}: {message}")


@dataclass(frozen=True)
class Document:
    """A parsed YAML file: plain data and the 1-based line of every key."""

    data: dict[str, Any]
    lines: Mapping[Location, int]

    def line(self, location: Location) -> int | None:
        """Return the line of `location`, or of the nearest mapping around it."""
        while location and location not in self.lines:
            location = location[:-1]
        return self.lines.get(location)


def parse_document(text: str, file: str, problems: Problems) -> Document | None:
    """Parse `text`; note syntax errors and repeated keys. None when there is nothing to use."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        problems.add(file, line, f"is not valid YAML: {error.problem}")
        return None
    except yaml.YAMLError as error:
        problems.add(file, None, f"is not valid YAML: {str(error).partition(chr(10))[0]}")
        return None
    if not isinstance(data, dict):
        problems.add(file, 1, "must be a mapping with the keys source, request and target")
        return None
    lines: dict[Location, int] = {}
    _collect_lines(node, (), lines, file, problems)
    return Document(data, lines)


def _collect_lines(
    node: yaml.Node | None, at: Location, lines: dict[Location, int], file: str, problems: Problems
) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        location = (*at, key.value)
        line = key.start_mark.line + 1
        if location in lines:
            first = lines[location]
            problems.add(file, line, f"{dotted(location)}: is there twice (first in line {first})")
            continue
        lines[location] = line
        _collect_lines(value, location, lines, file, problems)


def dotted(location: Location) -> str:
    """Return `request.model` for ("request", "model")."""
    return ".".join(str(part) for part in location)


def unknown_key(location: Location, allowed: list[str]) -> str:
    """Return the message for a key that nobody knows, with the nearest known one."""
    near = difflib.get_close_matches(str(location[-1]), allowed, n=1)
    hint = f"did you mean `{near[0]}`? " if near else ""
    return f"{dotted(location)}: unknown key; {hint}Allowed here: {', '.join(allowed)}"


def allowed_keys(model: type[BaseModel], location: Location, hidden: frozenset[str]) -> list[str]:
    """Return the keys that `model` knows in the mapping that `location` names."""
    for part in location:
        inner = model.model_fields[str(part)].annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return [name for name in model.model_fields if name not in hidden]


def describe(error: ValidationError, model: type[BaseModel], hidden: frozenset[str]) -> list[
    tuple[Location, str]
]:  # fmt: skip
    """Return (location, message) for each thing that `model` refused."""
    return [_described(dict(detail), model, hidden) for detail in error.errors()]


def _described(
    detail: Mapping[str, Any], model: type[BaseModel], hidden: frozenset[str]
) -> tuple[Location, str]:
    location: Location = detail["loc"]
    name = dotted(location)
    if detail["type"] == "extra_forbidden":
        return location, unknown_key(location, allowed_keys(model, location[:-1], hidden))
    if detail["type"] == "missing":
        return location, f"{name}: is missing"
    if detail["type"] == "value_error":
        return location, f"{name}: {detail['ctx']['error']}{_found(detail['input'])}"
    expected = _EXPECTED.get(detail["type"])
    message = f"must be {expected}" if expected else detail["msg"][0].lower() + detail["msg"][1:]
    return location, f"{name}: {message}{_found(detail['input'])}"


def _found(value: Any) -> str:
    """Show what was found when it is short; a long text could be anything."""
    shown = "nothing" if value is None else repr(value)
    return f"; found {shown}" if len(shown) <= _SHOWN else f"; found a {type(value).__name__}"

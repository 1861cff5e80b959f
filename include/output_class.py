"""The schema of a Pydantic model in a job folder, in the form that the API can enforce.

The class is needed when the job is read, and never again: a run pins the schema. What the class
checks beyond its JSON Schema (validators in Python) is therefore not checked.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel

_DROPPED = ("default", "examples", "discriminator")  # strict mode refuses them


class ClassError(ValueError):
    """The class cannot be used; `line` is where, if it is known."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def class_schema(source: str, path: Path, class_name: str) -> dict[str, Any]:
    """Return the JSON Schema of the model `class_name` in the Python file `path`.

    Every object gets `additionalProperties: false` and requires all its properties; defaults are
    left out, because the model always answers. Raises `ClassError`.
    """
    found = _module(source, path).__dict__.get(class_name)
    if not (isinstance(found, type) and issubclass(found, BaseModel)):
        raise ClassError(f"has no Pydantic model {class_name}")
    try:
        schema = found.model_json_schema()
    except Exception as error:
        raise ClassError(f"{class_name} has no JSON Schema: {type(error).__name__}") from error
    closed: dict[str, Any] = _closed(schema, schema)
    return closed


def _module(source: str, path: Path) -> ModuleType:
    """Run the file as a module; Pydantic looks types up in `sys.modules`."""
    name = f"llm_batch_output_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    module = ModuleType(name)
    sys.modules[name] = module
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)  # noqa: S102 (the job's own code)
    except SyntaxError as error:
        raise ClassError(f"is not valid Python: {error.msg}", error.lineno) from error
    except Exception as error:
        raise ClassError(f"cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        del sys.modules[name]
    return module


def _closed(part: Any, root: dict[str, Any]) -> Any:
    """Return a schema with all its objects closed."""
    if isinstance(part, list):
        return [_closed(one, root) for one in part]
    if not isinstance(part, dict):
        return part
    kept = {key: value for key, value in part.items() if key not in _DROPPED}
    if "$ref" in kept and len(kept) > 1:  # a reference must stand alone: put in what it names
        kept = {**_named(kept.pop("$ref"), root), **kept}
        kept = {key: value for key, value in kept.items() if key not in _DROPPED}
    if len(kept.get("allOf", ())) == 1:
        kept = {**kept.pop("allOf")[0], **kept}
    closed = {key: _children(key, value, root) for key, value in kept.items()}
    if closed.get("type") == "object" and "properties" in closed:
        closed.setdefault("additionalProperties", False)
        closed["required"] = list(closed["properties"])
    return closed


def _children(key: str, value: Any, root: dict[str, Any]) -> Any:
    if key in ("properties", "$defs"):  # names of the user's: none of them is a keyword
        return {name: _closed(child, root) for name, child in value.items()}
    return _closed(value, root) if key in ("items", "anyOf", "oneOf", "allOf") else value


def _named(reference: str, root: dict[str, Any]) -> dict[str, Any]:
    found: Any = root
    for step in reference.removeprefix("#/").split("/"):
        found = found[step]
    return dict(found)

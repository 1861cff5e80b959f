"""Python files of a job folder: run as they were when the run was opened, or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from include.errors import ConfigurationError

if TYPE_CHECKING:
    from include.job_spec import Builder


def source_digest(text: str) -> str:
    """Return the sha256 (hex) by which a Python file of a job is pinned."""
    return hashlib.sha256(text.encode()).hexdigest()


def pinned_function(folder: Path, pinned: Builder, name: str) -> Callable[..., Any]:
    """Return the function `name` of a Python file of the job folder.

    Raises `ConfigurationError` when the file is gone, is not the one that the run has pinned, or
    cannot be imported.
    """
    path = folder / pinned.file
    try:
        source = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {type(error).__name__}.") from None
    if source_digest(source) != pinned.digest:
        raise ConfigurationError(
            f"{path} has changed since the run began. Restore it to finish the run, or clear the "
            "run from `extract` to begin again with the new one."
        )
    names: dict[str, Any] = {"__name__": f"{path.stem}_{source_digest(source)}"}
    try:
        exec(compile(source, str(path), "exec"), names)  # noqa: S102 (the job's own code)
    except Exception as error:
        raise ConfigurationError(
            f"{path} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    function: Callable[..., Any] = names[name]
    return function

"""The columns of a source, checked against what the job needs of them."""

from __future__ import annotations

from collections.abc import Iterable

from include.errors import ConfigurationError
from include.job_spec import JobSpec


def needed_columns(spec: JobSpec) -> list[str]:
    """Return the columns that the job names: key, images and placeholders of the prompt."""
    names = [*spec.source.key, *spec.request.images]
    if spec.request.prompt is not None:
        names += [hole.column for hole in spec.compiled_prompt.placeholders]
    return list(dict.fromkeys(names))


def check_columns(spec: JobSpec, columns: Iterable[str], origin: str | None = None) -> None:
    """Check the columns that the source really has against key and placeholders.

    `origin` is where they are from: a file of the source, else the source as the job calls it.
    Raises `ConfigurationError` that lists everything missing, repeated or not allowed, with the
    available columns.
    """
    available = list(columns)
    place = origin or spec.source.origin
    problems = [
        *_column_problems(spec, available, place),
        *_placeholder_problems(spec, available, place),
    ]
    if problems:
        raise ConfigurationError(
            f"{spec.name}: {'; '.join(problems)}. Columns of {place}: "
            f"{', '.join(available) or 'none'}."
        )


def _column_problems(spec: JobSpec, available: list[str], place: str) -> list[str]:
    problems = [
        f"job.yaml: source.key names `{name}`, which {place} does not return"
        for name in spec.source.key
        if name not in available
    ]
    for name in sorted(set(available)):
        if available.count(name) > 1:
            problems.append(f"{place} returns the column `{name}` twice; give one another name")
        if name.startswith("_"):
            problems.append(f"{place} returns `{name}`; names that begin with _ are the product's")
    return problems


def _placeholder_problems(spec: JobSpec, available: list[str], place: str) -> list[str]:
    problems = [
        f"job.yaml: request.images names `{name}`, which {place} does not return"
        for name in spec.request.images
        if name not in available
    ]
    if spec.request.prompt is None:
        return problems
    return problems + [
        f"{spec.request.prompt_file}:{hole.line}: {{{{ {hole.column} }}}} is no column of {place}"
        for hole in spec.compiled_prompt.placeholders
        if hole.column not in available
    ]

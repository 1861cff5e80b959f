"""The kinds of values that a job may hold, each with its check.

DAG files import this module: it needs pydantic and the standard library only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

_CONNECTION = re.compile(r"[\w.\-]{1,200}", re.ASCII)


def _column_name(name: str) -> str:
    if name.startswith("_"):
        raise ValueError("columns that begin with _ are the product's own; rename it in the SQL")
    if not name or len(name) > 63:  # PostgreSQL cuts longer names silently
        raise ValueError("must have 1 to 63 characters")
    return name


def json_mapping(params: dict[str, Any]) -> dict[str, Any]:
    """Return `params` if JSON can say all of it."""
    try:
        json.dumps(params, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError("must hold only what JSON can say (quote dates)") from None
    return params


def connection_id(name: str) -> str:
    """Return `name` if a connection can have it."""
    if not _CONNECTION.fullmatch(name):
        raise ValueError("must be the id of an Airflow connection, such as results_db")
    return name


def unless_empty(check: Callable[[str], str]) -> Callable[[str], str]:
    """Let the empty default through, which a pinned spec holds for the form that it has not."""
    return lambda text: check(text) if text else text


def not_blank(text: str) -> str:
    """Return `text` if it says anything."""
    if not text.strip():
        raise ValueError("must not be empty")
    return text


def _as_tuple(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def as_decimal(value: Any) -> Any:
    """Take 0.1 as it is written, not as the nearest binary fraction."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        raise ValueError("must be a number")  # noqa: TRY004 (pydantic wants ValueError)
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        raise ValueError("must be a number") from None
    if not number.is_finite():
        raise ValueError("must be a finite number")
    return number


ColumnName = Annotated[str, AfterValidator(_column_name)]
ConnectionId = Annotated[str, AfterValidator(connection_id)]
ColumnNames = Annotated[tuple[ColumnName, ...], BeforeValidator(_as_tuple)]
NotBlank = Annotated[str, AfterValidator(not_blank)]
Number = Annotated[Decimal, BeforeValidator(as_decimal)]
Sample = Annotated[Number, Field(gt=0, le=1)]
WholeNumber = Annotated[int, Field(strict=True, ge=1)]


class SpecModel(BaseModel):
    """A part of a job: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

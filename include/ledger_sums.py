"""Sums and days as the ledger's database makes them, the same on SQLite and PostgreSQL.

Money is stored as decimal text, and added up to the last digit: by PostgreSQL as `numeric`. SQLite
knows binary fractions only, so its connection is given a function that adds decimals.
"""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from include.ledger_tables import Money

NAME = "llm_batch_sum"


class _Sum:
    """Adds decimal texts up; nulls are left out, as `sum` does. Nothing at all is null."""

    def __init__(self) -> None:
        self.total: Decimal | None = None

    def step(self, text: str | None) -> None:
        """Take one value."""
        if text is not None:
            self.total = (self.total or Decimal(0)) + Decimal(text)

    def finalize(self) -> str | None:
        """Return the sum as text."""
        return None if self.total is None else format(self.total, "f")


def money_sum(connection: Connection, amount: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    """Return the SQL sum of a money column; a `Decimal` comes out, None for no values."""
    if connection.dialect.name != "sqlite":
        return sa.func.sum(sa.cast(amount, sa.Numeric))
    if NAME not in connection.info:  # once: SQLite changes no function while a statement runs
        driver: Any = connection.connection.driver_connection
        driver.create_aggregate(NAME, 1, _Sum)
        connection.info[NAME] = True
    return sa.func.llm_batch_sum(sa.type_coerce(amount, sa.String), type_=Money)


def day_of(column: sa.ColumnElement[Any], connection: Connection) -> sa.ColumnElement[Any]:
    """Return the UTC day of a time."""
    if connection.dialect.name == "sqlite":
        return sa.func.date(column)
    return sa.cast(sa.func.timezone("UTC", column), sa.Date)


def as_date(value: Any) -> date:
    """Return a date from what `day_of` found."""
    return value if isinstance(value, date) else date.fromisoformat(str(value)[:10])

"""What jobs have cost, from the ledger: by day, run, round and job, exact to the last digit.

A batch counts on the day (UTC) on which it was collected, because its usage is known then. The
database adds up, so a month of any size is one small answer.
`include.cost_table` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from include import ledger_tables as tables
from include.calendar_month import Month
from include.cost import known_total
from include.ledger import Ledger
from include.ledger_database import reading
from include.ledger_records import BatchState
from include.ledger_sums import day_of, money_sum

COUNTS = {  # of a line, and the columns that they are the sums of
    "batches": "",
    "requests": "requests",
    "input_tokens": "used_input_tokens",
    "cached_tokens": "used_cached_tokens",
    "output_tokens": "used_output_tokens",
    "reasoning_tokens": "used_reasoning_tokens",
}


@dataclass(frozen=True)
class CostLine:
    """The sum of some batches. `what` is a day, a run, a round or a job.

    Money in US dollars; None means that one of the batches had no known price. Cached tokens are
    part of the input, reasoning tokens of the output.
    """

    what: str
    model: str
    batches: int
    requests: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int
    cost_usd: Decimal | None
    realtime_usd: Decimal | None

    @property
    def saved_usd(self) -> Decimal | None:
        """What the same tokens would have cost more in real time."""
        if self.cost_usd is None or self.realtime_usd is None:
            return None
        return self.realtime_usd - self.cost_usd


def costs_by_day(ledger: Ledger, job: str, month: str) -> list[CostLine]:
    """Return one line per day (`2026-11-03`) and model of `month` (`2026-11`), oldest first.

    Raises `ConfigurationError` when `month` is no month.
    """
    with reading(ledger.engine) as connection:
        day = day_of(tables.batch.c.collected_at, connection)
        return _lines(connection, day, tables.batch.c.job == job, _within(month))


def costs_by_job(ledger: Ledger, month: str) -> list[CostLine]:
    """Return one line per job and model of `month`, by name."""
    with reading(ledger.engine) as connection:
        return _lines(connection, tables.batch.c.job, _within(month))


def total(lines: list[CostLine]) -> CostLine:
    """Return the sum of lines; its money is unknown when one of theirs is."""
    counts = {name: sum(getattr(line, name) for line in lines) for name in COUNTS}
    return CostLine(
        "total",
        ", ".join(sorted({line.model for line in lines})),
        **counts,
        cost_usd=known_total(line.cost_usd for line in lines),
        realtime_usd=known_total(line.realtime_usd for line in lines),
    )


def _within(month: str) -> sa.ColumnElement[bool]:
    found, at = Month.parse(month), tables.batch.c.collected_at
    return sa.and_(at >= found.start, at < found.end)


def _lines(
    connection: Connection, what: sa.ColumnElement[Any], *which: sa.ColumnElement[bool]
) -> list[CostLine]:
    columns = tables.batch.c
    is_known = sa.func.count(columns.cost_usd) == sa.func.count()
    amounts = (
        sa.case((is_known, money_sum(connection, amount)))
        for amount in (columns.cost_usd, columns.realtime_usd)
    )
    counts = (sa.func.sum(columns[name]) for name in COUNTS.values() if name)
    query = (
        sa.select(what, columns.model, sa.func.count(), *counts, *amounts)
        .where(columns.state == BatchState.COLLECTED, *which)
        .group_by(what, columns.model)
        .order_by(what, columns.model)
    )
    return [_line(*row) for row in connection.execute(query)]


def _line(what: object, model: str, *numbers: Any) -> CostLine:
    name = what.isoformat() if isinstance(what, date) else str(what)
    *counts, cost, realtime = numbers
    named = dict(zip(COUNTS, map(int, counts), strict=True))
    return CostLine(name, model, **named, cost_usd=cost, realtime_usd=realtime)

"""A bound on the money of several runs together, such as those of one backfill.

Runs join a limit by its name. A round is recorded, and so can be sent, only while what its limit's
runs have spent, what they have on its way and the round's own estimate stay below the bound. This
is read under the ledger's lock: two runs at once cannot both take the last of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from include import cost, ledger_database, spending
from include import ledger_tables as tables
from include.errors import BudgetExceededError, ConfigurationError
from include.figures import money
from include.job_spec import JobSpec
from include.ledger import Ledger
from include.ledger_records import Run, now
from include.spending import Spending

PARAM = "spend_limit"  #: the Airflow param that holds a limit: {"name": …, "max_usd": …}


@dataclass(frozen=True)
class SpendLimit:
    """At most `max_usd` dollars for all runs that join it by this name."""

    name: str
    max_usd: Decimal

    @classmethod
    def of(cls, param: Any) -> SpendLimit | None:
        """Read the Airflow param; None when there is none.

        Raises `ConfigurationError` when it is not `{"name": text, "max_usd": dollars}`.
        """
        if param is None:
            return None
        try:
            name, dollars = param["name"], Decimal(str(param["max_usd"]))
        except (TypeError, KeyError, InvalidOperation):
            name, dollars = "", Decimal("NaN")
        if not name or not isinstance(name, str) or not dollars.is_finite() or dollars < 0:
            raise ConfigurationError(
                f'The param {PARAM} must be {{"name": "a name", "max_usd": 50}}: the name that its '
                "runs share, and their dollars together."
            )
        return cls(name[:250], dollars)

    def as_param(self) -> dict[str, str]:
        """Return it as the Airflow param."""
        return {"name": self.name, "max_usd": str(self.max_usd)}


def join(ledger: Ledger, run: Run, limit: SpendLimit) -> None:
    """Put a run under a limit; the bound that was given last is the one that holds.

    What batches of this run have cost before it joined does not count. Raises `ConfigurationError`
    when the run's model has no price: such a limit could not be kept.
    """
    _check_priced(run, limit)
    with ledger_database.writing(ledger.engine) as connection:
        ledger_database.exclusive(connection)
        columns = tables.spend_limit.c
        change = sa.update(tables.spend_limit).where(columns.name == limit.name)
        if not connection.execute(change.values(max_usd=limit.max_usd)).rowcount:
            connection.execute(
                sa.insert(tables.spend_limit).values(
                    name=limit.name, max_usd=limit.max_usd, created_at=now()
                )
            )
        if limit.name not in _names(connection, run):
            connection.execute(
                sa.insert(tables.limited_run).values(
                    name=limit.name, run_id=run.run_id, joined_at=now()
                )
            )


def _check_priced(run: Run, limit: SpendLimit) -> None:
    model = JobSpec.from_json(run.spec).request.priced_model
    if cost.price(model) is None:
        raise ConfigurationError(
            f"{run}: {PARAM} {limit.name} cannot be kept, the price of {model} is unknown. Add it "
            f"to a price file and name that in {cost.OVERRIDE_VARIABLE}."
        )


def _names(connection: Connection, run: Run) -> list[str]:
    columns = tables.limited_run.c
    return list(connection.scalars(sa.select(columns.name).where(columns.run_id == run.run_id)))


def check(connection: Connection, run: Run, planned: Decimal) -> None:
    """Raise `BudgetExceededError` when `planned` more dollars go over a limit of this run.

    Call it inside the transaction that records the round, under the ledger's lock.
    """
    for limit, so_far in exceeded(connection, run, planned):
        raise BudgetExceededError(
            f"{run}: its backfill may spend ${limit.max_usd} ({PARAM} {limit.name}). Spent "
            f"{money(so_far.spent)} + in flight {money(so_far.in_flight)} + this round about "
            f"{money(planned)} = {money(so_far.total + planned)}. Nothing was submitted. Backfill "
            "the days that are left with reprocess=failed and a larger max_usd under the same name."
        )


def exceeded(
    connection: Connection, run: Run, planned: Decimal
) -> Iterator[tuple[SpendLimit, Spending]]:
    """Yield each limit of this run that has no room for `planned` more dollars, and its spending.

    Raises `ConfigurationError` when what its runs have spent is unknown.
    """
    for limit in _limits(connection, run):
        so_far = spending.of_limit(connection, limit.name)
        if so_far.total + planned > limit.max_usd:
            yield limit, so_far


def _limits(connection: Connection, run: Run) -> Iterator[SpendLimit]:
    query = (
        sa.select(tables.spend_limit)
        .join(tables.limited_run)
        .where(tables.limited_run.c.run_id == run.run_id)
        .order_by(tables.spend_limit.c.name)
    )
    for row in connection.execute(query).mappings().all():
        yield SpendLimit(row["name"], row["max_usd"])

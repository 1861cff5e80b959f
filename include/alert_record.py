"""Who has been told what: one row for each alert and channel in the ledger.

A channel is claimed before it is told, so that neither a retry nor a second task tells it again.
One that failed for certain is told again by the next task that looks, `MOST_TRIES` times at most;
one whose teller was killed in between stays untold rather than being told twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from include import ledger_database
from include.alerts import Alert
from include.ledger_records import now
from include.ledger_tables import alert as table

MOST_TRIES = 3


@dataclass(frozen=True)
class AlertRecord:
    """The table `llm_batch_alert` of the ledger on `engine`."""

    engine: Engine

    def claim(self, alert: Alert, channel: str) -> bool:
        """Return whether the caller has to tell `channel` now; nobody else will."""
        with ledger_database.writing(self.engine) as connection:
            ledger_database.exclusive(connection)
            found = connection.execute(
                sa.select(table.c.tries).where(*_is(alert, channel))
            ).scalar_one_or_none()
            if found is None:
                _insert(connection, alert, channel)
                return True
            return bool(
                connection.execute(
                    sa.update(table)
                    .where(*_is(alert, channel))
                    .where(table.c.error.is_not(None), table.c.tries < MOST_TRIES)
                    .values(tries=table.c.tries + 1, error=None)
                ).rowcount
            )

    def delivered(self, alert: Alert, channel: str) -> None:
        """Record that `channel` has been told."""
        self._set(alert, channel, delivered_at=now())

    def failed(self, alert: Alert, channel: str, error: str) -> None:
        """Record that `channel` has certainly not been told."""
        self._set(alert, channel, error=error)

    def _set(self, alert: Alert, channel: str, **values: object) -> None:
        with ledger_database.writing(self.engine) as connection:
            connection.execute(sa.update(table).where(*_is(alert, channel)).values(**values))


def _is(alert: Alert, channel: str) -> tuple[sa.ColumnElement[bool], ...]:
    return table.c.cause == alert.cause, table.c.channel == channel


def _insert(connection: Connection, alert: Alert, channel: str) -> None:
    connection.execute(
        sa.insert(table).values(
            cause=alert.cause,
            channel=channel,
            kind=alert.kind,
            job=alert.job,
            run_id=alert.run_id,
            subject=alert.subject,
            raised_at=now(),
            tries=1,
        )
    )

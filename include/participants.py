"""Who works on a run: the Airflow runs that have opened or joined it.

Two Airflow runs over one partition share one run of the ledger. What it has at the API is cancelled
when the last of them has gone, not when the first one has failed.
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from include import ledger_database
from include import ledger_tables as tables
from include.ledger import Ledger
from include.ledger_records import Batch, BatchState, Run

OURS = tables.participant.c


def leave(ledger: Ledger, dag_id: str, dag_run_id: str) -> list[Batch]:
    """Record that an Airflow run has ended, and return the batches that nobody waits for now.

    Those are the batches at the API of every run that it took part in, and that no other Airflow
    run goes on with. An Airflow run of which a task is cleared goes on with them: `go_on`.
    """
    with ledger_database.writing(ledger.engine) as connection:
        ledger_database.exclusive(connection)
        connection.execute(
            sa.update(tables.participant)
            .where(OURS.dag_id == dag_id, OURS.dag_run_id == dag_run_id)
            .values(has_left=True)
        )
        return _left_alone(connection, dag_id, dag_run_id)


def go_on(ledger: Ledger, run_id: str, dag_id: str, dag_run_id: str) -> None:
    """Record that an Airflow run that had ended works on its run again: a task of it was cleared.

    One that works on it anyway, or never has, costs one look and changes nothing.
    """
    has_left = sa.and_(
        OURS.run_id == run_id,
        OURS.dag_id == dag_id,
        OURS.dag_run_id == dag_run_id,
        OURS.has_left,
    )
    with ledger_database.reading(ledger.engine) as connection:
        if connection.execute(sa.select(OURS.run_id).where(has_left)).first() is None:
            return
    with ledger_database.writing(ledger.engine) as connection:
        connection.execute(sa.update(tables.participant).where(has_left).values(has_left=False))


def _left_alone(connection: Connection, dag_id: str, dag_run_id: str) -> list[Batch]:
    other = tables.participant.alias("other")
    is_shared = sa.exists().where(other.c.run_id == OURS.run_id, sa.not_(other.c.has_left))
    runs = sa.select(OURS.run_id).where(
        OURS.dag_id == dag_id, OURS.dag_run_id == dag_run_id, sa.not_(is_shared)
    )
    query = sa.select(tables.batch).where(
        tables.batch.c.run_id.in_(runs), tables.batch.c.state == BatchState.SUBMITTED
    )
    return [Batch(**row) for row in connection.execute(query).mappings()]


def newest_run(ledger: Ledger, dag_id: str, dag_run_id: str) -> Run | None:
    """Return the run that an Airflow run has worked on last; None when it has opened none."""
    query = (
        sa.select(tables.run)
        .join(tables.participant, OURS.run_id == tables.run.c.run_id)
        .where(OURS.dag_id == dag_id, OURS.dag_run_id == dag_run_id)
        .order_by(tables.run.c.created_at.desc())
        .limit(1)
    )
    with ledger_database.reading(ledger.engine) as connection:
        row = connection.execute(query).mappings().one_or_none()
    return None if row is None else Run(**row)


def everybody(ledger: Ledger, run_id: str) -> set[tuple[str, str]]:
    """Return (DAG id, Airflow run id) of all that have ever worked on a run."""
    own = tables.run.c
    query = sa.select(OURS.dag_id, OURS.dag_run_id).where(OURS.run_id == run_id)
    begun = sa.select(own.dag_id, own.dag_run_id).where(own.run_id == run_id)
    with ledger_database.reading(ledger.engine) as connection:
        return {(row[0], row[1]) for row in connection.execute(sa.union(query, begun))}


def names(ledger: Ledger, run_id: str) -> Sequence[tuple[str, str]]:
    """Return (DAG id, Airflow run id) of everybody who works on a run, in order of their names."""
    query = (
        sa.select(OURS.dag_id, OURS.dag_run_id)
        .where(OURS.run_id == run_id, sa.not_(OURS.has_left))
        .order_by(OURS.dag_id, OURS.dag_run_id)
    )
    with ledger_database.reading(ledger.engine) as connection:
        return [(row[0], row[1]) for row in connection.execute(query)]

"""What the ledger asks of its tables inside a transaction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from include import ledger_tables as tables
from include.errors import ConfigurationError
from include.ledger_records import Batch, BatchState, Partition, Round, Run, RunState, now
from include.run_mode import OWN_FILE


def last_run(
    connection: Connection, partition: Partition, spec_digest: str, mode: str
) -> Run | None:
    """Return the newest generation of a run, if there is one."""
    columns = tables.run.c
    query = (
        sa.select(tables.run)
        .where(
            columns.job == partition.job,
            columns.interval_start == partition.start,
            columns.interval_end == partition.end,
            columns.spec_digest == spec_digest,
            columns.mode == mode,
        )
        .order_by(columns.generation.desc())
        .limit(1)
    )
    row = connection.execute(query).mappings().first()
    return None if row is None else Run(**row)


def run(connection: Connection, run_id: str) -> Run:
    """Return one run; raises `ConfigurationError` when the ledger does not know it."""
    query = sa.select(tables.run).where(tables.run.c.run_id == run_id)
    row = connection.execute(query).mappings().first()
    if row is None:
        raise ConfigurationError(
            f"The ledger knows no run {run_id}. Is llm_batch_db the ledger that this run "
            "began with?"
        )
    return Run(**row)


def count(connection: Connection, run_id: str, values: Mapping[str, Any]) -> None:
    """Set counts and money of a run."""
    connection.execute(sa.update(tables.run).where(tables.run.c.run_id == run_id).values(**values))


def check_not_closed(connection: Connection, run_id: str) -> None:
    """Raise `ConfigurationError` when a person has closed the run: nothing of it is sent."""
    found = run(connection, run_id)
    if found.state == RunState.CLOSED:
        raise ConfigurationError(
            f"{found} is closed: nothing of it is sent or loaded. To go on with it, clear its "
            "Airflow run from extract on, with the job as it was then."
        )


def reopen(connection: Connection, closed: Run) -> None:
    """Open a closed run again; one that is open stays as it is."""
    columns = tables.run.c
    values = {"state": RunState.OPEN, "done_at": None, "cost_usd": None, "realtime_usd": None}
    changed = connection.execute(
        sa.update(tables.run)
        .where(columns.run_id == closed.run_id, columns.state == RunState.CLOSED)
        .values(**values)
    ).rowcount
    if changed:
        note(connection, closed.run_id, None, RunState.CLOSED, RunState.OPEN, "goes on")


def take_part(connection: Connection, run_id: str, dag_id: str, dag_run_id: str) -> None:
    """Record that an Airflow run works on a run, whether it is new, joins or was cleared.

    It has left the other runs of the partition then: it came to them before the job was changed.
    """
    columns = tables.participant.c
    connection.execute(
        sa.update(tables.participant)
        .where(columns.dag_id == dag_id, columns.dag_run_id == dag_run_id)
        .where(columns.run_id.in_(_beside(run_id)))
        .values(has_left=True)
    )
    who = {"run_id": run_id, "dag_id": dag_id, "dag_run_id": dag_run_id}
    is_known = sa.and_(*(columns[name] == value for name, value in who.items()))
    again = sa.update(tables.participant).where(is_known).values(has_left=False)
    if not connection.execute(again).rowcount:
        connection.execute(sa.insert(tables.participant).values(**who))


def _beside(run_id: str) -> sa.Select[tuple[str]]:
    this, other = tables.run.alias("this").c, tables.run.c
    return sa.select(other.run_id).where(
        this.run_id == run_id,
        other.run_id != run_id,
        other.job == this.job,
        other.interval_start == this.interval_start,
        other.interval_end == this.interval_end,
        other.mode != OWN_FILE,  # a mapped task submits several files at once
    )


def round_of(connection: Connection, run_id: str, number: int) -> Round | None:
    """Return one round of a run, if it is recorded."""
    query = sa.select(tables.round_).where(
        tables.round_.c.run_id == run_id, tables.round_.c.round == number
    )
    row = connection.execute(query).mappings().first()
    return None if row is None else Round(**row)


def batch(connection: Connection, submission_id: str) -> Batch:
    """Return one batch; raises `ConfigurationError` when the ledger does not know it."""
    query = sa.select(tables.batch).where(tables.batch.c.submission_id == submission_id)
    row = connection.execute(query).mappings().first()
    if row is None:
        raise ConfigurationError(
            f"The ledger knows no submission {submission_id}. Is llm_batch_db the ledger that "
            "this run began with?"
        )
    return Batch(**row)


def batches(connection: Connection, run_id: str, number: int | None = None) -> list[Batch]:
    """Return the batches of a run, or of one of its rounds, in order."""
    columns = tables.batch.c
    query = sa.select(tables.batch).where(columns.run_id == run_id)
    if number is not None:
        query = query.where(columns.round == number)
    query = query.order_by(columns.round, columns.shard)
    return [Batch(**row) for row in connection.execute(query).mappings()]


def is_admitted(connection: Connection, batch: Batch, enqueued_tokens: int | None) -> bool:
    """Tell whether the token limit has room, and no earlier shard of the round waits for it."""
    if enqueued_tokens is None:
        return True
    columns = tables.batch.c
    earlier = sa.select(sa.func.count()).where(
        columns.run_id == batch.run_id,
        columns.round == batch.round,
        columns.shard < batch.shard,
        columns.state == BatchState.PREPARED,
    )
    if connection.execute(earlier).scalar_one():
        return False
    waiting = sa.select(sa.func.coalesce(sa.func.sum(columns.input_tokens), 0)).where(
        columns.conn_id == batch.conn_id,
        columns.model == batch.model,
        columns.state.in_((BatchState.SUBMITTING, BatchState.SUBMITTED)),
    )
    enqueued = int(connection.execute(waiting).scalar_one())
    return enqueued == 0 or enqueued + batch.input_tokens <= enqueued_tokens


def note(
    connection: Connection,
    run_id: str,
    submission_id: str | None,
    was: str | None,
    became: str,
    detail: str | None = None,
) -> None:
    """Write a line of history."""
    connection.execute(
        sa.insert(tables.event).values(
            run_id=run_id,
            submission_id=submission_id,
            at=now(),
            was=was,
            became=became,
            detail=detail,
        )
    )


def keep_input_file(connection: Connection, submission_id: str, file_id: str) -> None:
    """Remember an uploaded file; a server may give a file of the same content the same id."""
    table = tables.input_file
    is_known = sa.select(table.c.file_id).where(
        table.c.submission_id == submission_id, table.c.file_id == file_id
    )
    if connection.execute(is_known).first() is None:
        connection.execute(
            sa.insert(table).values(submission_id=submission_id, file_id=file_id, uploaded_at=now())
        )

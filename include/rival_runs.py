"""Other open runs of a partition that ask the same: their rows would be paid for twice.

A sample, a redrive, `force`, other SQL and another target each make a run of their own. What such a
run has at the API is in no table yet, so another one would send the same requests beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from include import ledger_queries as queries
from include import ledger_tables as tables
from include.errors import ConfigurationError, PartitionBusyError
from include.job_spec import JobSpec
from include.ledger_records import Batch, BatchState, Run, RunState
from include.run_mode import FORCE


def check_alone(connection: Connection, run: Run) -> None:
    """Raise while another run of the partition is at the same requests.

    `PartitionBusyError` when an Airflow run goes on with it, so that it will end by itself, else
    `ConfigurationError`. Under the ledger's lock, inside the transaction that records the round,
    nothing can come between.
    """
    for rival, is_attended in _at_work_beside(connection, run):
        if _asks_the_same(rival, run):
            raise _busy(run, rival) if is_attended else _abandoned(run, rival)


def _busy(run: Run, rival: Run) -> PartitionBusyError:
    return PartitionBusyError(
        f"{run}: waits for run {rival.run_id} of the same partition (mode {rival.mode}), which "
        f"asks the same: see Airflow run {rival.dag_run_id} of {rival.dag_id}. What that one has "
        "loaded is not sent again."
    )


def _abandoned(run: Run, rival: Run) -> ConfigurationError:
    return ConfigurationError(
        f"{run}: run {rival.run_id} of the same partition (mode {rival.mode}) is open and "
        "asks the same: what it has at the API would be paid for twice. Nothing was "
        "submitted, and no other Airflow run goes on with that one. Clear the Airflow run "
        f"{rival.dag_run_id} of {rival.dag_id}, or end it by "
        f"`python -m llm_batch close {rival.run_id}`; then clear this task."
    )


def check_not_overtaken(connection: Connection, batch: Batch) -> None:
    """Raise `ConfigurationError` when another run has loaded, or sent, what this file would ask.

    Call it inside the transaction that claims the file: of two runs that nobody kept apart, since
    one had failed while the other was built, the first claim goes on.
    """
    other = overtaken_by(connection, [batch])
    if other is None:
        return
    is_done = other.state == RunState.DONE
    raise ConfigurationError(
        f"{batch}: run {other.run_id} of the same partition asked the same and was "
        f"{'loaded' if is_done else 'sent'} after this file was written: to send it could pay for "
        f"its rows twice. Nothing was sent. Say `python -m llm_batch close {batch.run_id}`, and "
        f"run the partition again{'' if is_done else ' when that one has ended'}: it sends what is "
        "missing."
    )


def overtaken_by(connection: Connection, files: Sequence[Batch]) -> Run | None:
    """Return the run that has loaded, or sent, what these files of one run would ask, if any."""
    waiting = [one for one in files if one.state == BatchState.PREPARED and one.round == 1]
    built = queries.round_of(connection, waiting[0].run_id, 1) if waiting else None
    if built is None:
        return None
    run = queries.run(connection, built.run_id)
    others = (*_done_since(connection, run, built.built_at), *_sent_instead(connection, run))
    return next((one for one in others if _asks_the_same(one, run)), None)


def _asks_the_same(one: Run, run: Run) -> bool:
    return JobSpec.from_json(one.spec).question == JobSpec.from_json(run.spec).question


def _done_since(connection: Connection, run: Run, moment: datetime) -> list[Run]:
    own = tables.run.c
    query = _others(run).where(own.state == RunState.DONE, own.done_at > moment)
    return [Run(**row) for row in connection.execute(query).mappings()]


def _sent_instead(connection: Connection, run: Run) -> list[Run]:
    """Return other open runs that have sent something, while this one has sent nothing yet."""
    batch = tables.batch.c
    sent = sa.select(batch.run_id).where(
        batch.run_id == run.run_id, batch.state != BatchState.PREPARED
    )
    if run.mode == FORCE or connection.execute(sent.limit(1)).first() is not None:
        return []
    query = _others(run).where(tables.run.c.state == RunState.OPEN, _has_sent())
    return [Run(**row) for row in connection.execute(query).mappings()]


def _others(run: Run) -> sa.Select[Any]:
    own = tables.run.c
    return sa.select(tables.run).where(
        own.job == run.job,
        own.interval_start == run.interval_start,
        own.interval_end == run.interval_end,
        own.run_id != run.run_id,
    )


def _has_sent() -> sa.Exists:
    batch = tables.batch.c
    return sa.exists().where(
        batch.run_id == tables.run.c.run_id, batch.state != BatchState.PREPARED
    )


def _at_work_beside(connection: Connection, run: Run) -> list[tuple[Run, bool]]:
    """Return other open runs of the partition that have sent something, or are about to.

    With each goes whether an Airflow run goes on with it.
    """
    has_files = sa.exists().where(tables.batch.c.run_id == tables.run.c.run_id)
    query = (
        _others(run)
        .add_columns(_goes_on().label("is_attended"))
        .where(
            tables.run.c.state == RunState.OPEN,
            sa.or_(_has_sent(), sa.and_(has_files, _goes_on())),
        )
        .order_by(tables.run.c.created_at)
    )
    return [_rival(dict(row)) for row in connection.execute(query).mappings()]


def _rival(columns: dict[str, Any]) -> tuple[Run, bool]:
    is_attended = bool(columns.pop("is_attended"))
    return Run(**columns), is_attended


def _goes_on() -> sa.Exists:
    who = tables.participant.c
    return sa.exists().where(who.run_id == tables.run.c.run_id, sa.not_(who.has_left))

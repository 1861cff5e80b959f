"""What is going on, as the ledger knows it: by job, by batch, and what needs somebody's look."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, RowMapping

from include import ledger_database
from include import ledger_tables as tables
from include.batch_status import BatchStatus
from include.cost import known_total
from include.errors import ConfigurationError
from include.figures import counted
from include.job_spec import JobSpec
from include.ledger_records import Batch, BatchState, Run, RunState, now
from include.run_mode import NORMAL, OWN_FILE

AT_THE_API = (BatchState.SUBMITTING, BatchState.SUBMITTED)
LONG_VALIDATING = timedelta(hours=1)
LONG_WITHOUT_PROGRESS = timedelta(hours=6)
LONG_SUBMITTING = timedelta(hours=1)
LONG_QUIET = timedelta(hours=2)  # an open run of which nothing is at the API
RECENT = timedelta(days=7)
SHORTEST_PREFIX = 4  # characters of a run id


@dataclass(frozen=True)
class JobStatus:
    """One job at this moment; money is that of the batches that were collected today (UTC)."""

    job: str
    open_runs: int
    in_flight: int  #: batches at the API
    requests: int  #: of these batches
    done: int  #: of these requests, when they were last looked at
    oldest: datetime | None  #: submission of the oldest of these batches
    last_done: datetime | None  #: partition of the run that ended last
    today_usd: Decimal | None  #: None when a price is unknown


@dataclass(frozen=True)
class Notice:
    """Something that does not mend itself, and what to do."""

    about: str
    what: str
    then: str


def job_statuses(engine: Engine, job: str | None = None) -> list[JobStatus]:
    """Return every job that the ledger knows, or one of them."""
    with ledger_database.reading(engine) as connection:
        names = sa.select(tables.run.c.job).distinct().order_by(tables.run.c.job)
        if job is not None:
            names = names.where(tables.run.c.job == job)
        return [_job_status(connection, name) for name in connection.scalars(names).all()]


def _job_status(connection: Connection, job: str) -> JobStatus:
    run, batch = tables.run.c, tables.batch.c
    opened = connection.scalar(sa.select(sa.func.count()).where(run.job == job, *_opened()))
    flight = connection.execute(
        sa.select(
            sa.func.count(),
            sa.func.coalesce(sa.func.sum(batch.requests), 0),
            sa.func.coalesce(sa.func.sum(batch.done_requests), 0),
            sa.func.min(batch.submitted_at),
        ).where(batch.job == job, batch.state.in_(AT_THE_API))
    ).one()
    last = (
        sa.select(run.interval_start)
        .where(run.job == job, run.state == RunState.DONE)
        .order_by(run.done_at.desc())
        .limit(1)
    )
    return JobStatus(
        job,
        int(opened or 0),
        int(flight[0]),
        int(flight[1]),
        int(flight[2]),
        flight[3],
        connection.scalar(last),
        _spent(connection, job, _midnight()),
    )


def _spent(connection: Connection, job: str, since: datetime) -> Decimal | None:
    batch = tables.batch.c
    costs = sa.select(batch.cost_usd).where(
        batch.job == job, batch.state == BatchState.COLLECTED, batch.collected_at >= since
    )
    return known_total(connection.scalars(costs))


def _midnight() -> datetime:
    return now().replace(hour=0, minute=0, second=0, microsecond=0)


def open_runs(engine: Engine, job: str | None = None) -> list[RowMapping]:
    """Return run id, job, partition, age and progress of each open run, oldest first."""
    run, batch = tables.run.c, tables.batch.c
    query = (
        sa.select(
            run.run_id,
            run.job,
            run.interval_start,
            run.interval_end,
            run.mode,
            run.created_at,
            run.rows,
            sa.func.max(batch.round).label("round"),
            sa.func.count(batch.submission_id).label("batches"),
            sa.func.coalesce(sa.func.sum(_is(batch.state.in_(AT_THE_API))), 0).label("in_flight"),
            sa.func.coalesce(sa.func.sum(_is(batch.state == BatchState.COLLECTED)), 0).label(
                "collected"
            ),
        )
        .select_from(tables.run.outerjoin(tables.batch, batch.run_id == run.run_id))
        .where(*_opened())
        .group_by(*(run[name] for name in ("run_id", "job", "interval_start", "interval_end")))
        .group_by(run.mode, run.created_at, run.rows)
        .order_by(run.created_at)
    )
    if job is not None:
        query = query.where(run.job == job)
    with ledger_database.reading(engine) as connection:
        return list(connection.execute(query).mappings())


def _opened() -> tuple[sa.ColumnElement[bool], ...]:
    return tables.run.c.state == RunState.OPEN, tables.run.c.mode != OWN_FILE


def _is(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
    return sa.case((condition, 1), else_=0)


def batches(
    engine: Engine, *, job: str | None = None, every: bool = False, limit: int | None = 1000
) -> list[Batch]:
    """Return the batches that are at the API, or the newest of all, latest intent first."""
    columns = tables.batch.c
    query = sa.select(tables.batch).order_by(columns.first_intent_at.desc(), columns.shard)
    if not every:
        query = query.where(columns.state.in_(AT_THE_API))
    if job is not None:
        query = query.where(columns.job == job)
    with ledger_database.reading(engine) as connection:
        return [Batch(**row) for row in connection.execute(query.limit(limit)).mappings()]


def find_run(engine: Engine, beginning: str) -> Run:
    """Return the run whose id begins so; raises `ConfigurationError` unless there is just one."""
    if len(beginning) < SHORTEST_PREFIX:
        raise ConfigurationError(
            f"{beginning!r} is too short for a run id: give {SHORTEST_PREFIX} characters or more."
        )
    column = tables.run.c.run_id
    query = sa.select(tables.run).where(column.startswith(beginning, autoescape=True)).limit(2)
    with ledger_database.reading(engine) as connection:
        found = [Run(**row) for row in connection.execute(query).mappings()]
    if len(found) != 1:
        problem = "More than one run id begins" if found else "The ledger knows no run that begins"
        raise ConfigurationError(
            f"{problem} with {beginning!r}. `python -m llm_batch runs` lists them."
        )
    return found[0]


def run_at(engine: Engine, job: str, moment: datetime) -> Run:
    """Return the newest run of the job whose data interval holds `moment`."""
    run = tables.run.c
    query = (
        sa.select(tables.run)
        .where(run.job == job, run.interval_start <= moment, run.interval_end > moment)
        .order_by(run.created_at.desc())
        .limit(1)
    )
    with ledger_database.reading(engine) as connection:
        found = connection.execute(query).mappings().first()
    if found is None:
        raise ConfigurationError(
            f"The ledger knows no run of job {job!r} over {moment:%F %H:%M} UTC. "
            "`python -m llm_batch runs` lists them."
        )
    return Run(**found)


def runs(engine: Engine, *, job: str | None = None, limit: int = 20) -> list[Run]:
    """Return the newest runs first."""
    query = sa.select(tables.run).order_by(tables.run.c.created_at.desc()).limit(limit)
    if job is not None:
        query = query.where(tables.run.c.job == job)
    with ledger_database.reading(engine) as connection:
        return [Run(**row) for row in connection.execute(query).mappings()]


def notices(engine: Engine, job: str | None = None, *, at: datetime | None = None) -> list[Notice]:
    """Return what needs a look at moment `at` (default: now), worst first."""
    moment = at or datetime.now(UTC)
    return [
        *(
            notice
            for batch in batches(engine, job=job, limit=None)
            if (notice := _of_batch(batch, moment)) is not None
        ),
        *_of_quiet_runs(engine, job, moment),
        *_of_failed_rows(engine, job, moment),
        *_of_duplicates(engine, moment),
    ]


def _of_batch(batch: Batch, at: datetime) -> Notice | None:
    if batch.state == BatchState.SUBMITTING:
        return _of_submitting(batch, at)
    age = at - (batch.submitted_at or at)
    if batch.api_status == BatchStatus.VALIDATING and age > LONG_VALIDATING:
        return Notice(
            str(batch),
            f"has been validating for {_hours(age)}",
            "The API's queue may be full, or its service degraded: see its status page. Nothing "
            "has to be done before the deadline.",
        )
    silent = at - (batch.progress_at or batch.submitted_at or at)
    if silent > LONG_WITHOUT_PROGRESS:
        return Notice(
            str(batch),
            f"is {batch.api_status}, without progress for {_hours(silent)}",
            "At its deadline it is cancelled, what it has done is kept. To give up now: "
            f"`python -m llm_batch cancel {batch.run_id} --batch {batch.batch_id}`.",
        )
    return None


def _of_submitting(batch: Batch, at: datetime) -> Notice | None:
    silent = at - (batch.intent_at or batch.first_intent_at or at)
    if silent <= LONG_SUBMITTING:
        return None
    return Notice(
        str(batch),
        f"was about to be created {_hours(silent)} ago, and nobody has come back to it",
        "Clear its submit task in Airflow: it looks for the batch before it makes one.",
    )


def _of_quiet_runs(engine: Engine, job: str | None, at: datetime) -> Iterator[Notice]:
    """Tell of open runs that nobody works on: a task of theirs is red, or their DAG is paused."""
    left, moves = _left(engine), _last_moves(engine)
    for run in open_runs(engine, job):
        if run["run_id"] in left:
            yield _of_left_run(engine, run)
            continue
        if run["in_flight"]:
            continue
        last = moves.get(run["run_id"], run["created_at"])
        if at - last > LONG_QUIET:
            yield Notice(
                f"run {run['run_id']} of job {run['job']}, partition {run['interval_start']:%F}",
                f"is open, has nothing at the API, and has not moved for {_hours(at - last)}",
                "Look for a red task of this run in Airflow, mend what it says, clear it. It "
                f"goes on from there.{_overtaken(engine, run)}",
            )


def _last_moves(engine: Engine) -> dict[str, datetime]:
    """Return when each open run has last changed, for those that have a history."""
    event = tables.event.c
    query = (
        sa.select(event.run_id, sa.func.max(event.at))
        .join(tables.run, tables.run.c.run_id == event.run_id)
        .where(*_opened())
        .group_by(event.run_id)
    )
    with ledger_database.reading(engine) as connection:
        return {row[0]: row[1] for row in connection.execute(query)}


def _left(engine: Engine) -> set[str]:
    """Return the open runs that no Airflow run works on: the last has failed, or gone elsewhere."""
    who = tables.participant.c
    query = (
        sa.select(who.run_id)
        .join(tables.run, tables.run.c.run_id == who.run_id)
        .where(*_opened())
        .group_by(who.run_id)
        .having(sa.func.sum(_is(sa.not_(who.has_left))) == 0)
    )
    with ledger_database.reading(engine) as connection:
        return set(connection.scalars(query))


def _of_left_run(engine: Engine, run: RowMapping) -> Notice:
    in_flight = (
        f"; {counted(run['in_flight'], 'batch')} of it at the API" if run["in_flight"] else ""
    )
    return Notice(
        f"run {run['run_id']} of job {run['job']}, partition {run['interval_start']:%F}",
        f"is open, and no Airflow run goes on with it{in_flight}",
        "Mend what the red task of its Airflow run says, then clear that task. It goes on from "
        f"there, and pays for nothing again.{_overtaken(engine, run)}",
    )


def _overtaken(engine: Engine, opened: RowMapping) -> str:
    """Say which run has done the partition since: a changed job makes a run of its own."""
    run = tables.run.c
    query = (
        sa.select(run.run_id)
        .where(*(run[name] == opened[name] for name in ("job", "interval_start", "interval_end")))
        .where(run.created_at > opened["created_at"], run.state == RunState.DONE)
        .order_by(run.created_at.desc())
        .limit(1)
    )
    with ledger_database.reading(engine) as connection:
        later = connection.scalar(query)
    if later is None:
        return ""
    return (
        f" Run {later} has done this partition since: unless that was a sample, "
        f"`python -m llm_batch close {opened['run_id']}` ends this one."
    )


def _of_failed_rows(engine: Engine, job: str | None, at: datetime) -> Iterator[Notice]:
    """Tell of partitions whose `report` is red, until a later run has said their failures anew."""
    run = tables.run.c
    query = sa.select(tables.run).where(
        run.done_at > at - RECENT, run.failed > 0, run.mode != OWN_FILE, ~is_said_anew()
    )
    if job is not None:
        query = query.where(run.job == job)
    with ledger_database.reading(engine) as connection:
        found = [Run(**row) for row in connection.execute(query).mappings()]
    for one in found:
        spec = JobSpec.from_json(one.spec)
        if spec.queue is None and spec.alert.is_exceeded(one.failed, one.loaded):
            yield Notice(
                f"run {one.run_id} of job {one.job}, partition {one.interval_start:%F}",
                f"has {counted(one.failed, 'failed row')} beside {one.loaded:,} loaded, more than "
                "the job's alert allows",
                "Look why in the failures table (_reason, _error_code), mend the cause, then "
                f"`python -m llm_batch redrive {one.job} {one.interval_start:%FT%H:%M}`.",
            )


def is_said_anew() -> sa.Exists:
    """Tell of a run whether a later one of its partition has said its failures anew.

    A redrive, a forced run, and one that reused nothing (another model or prompt) do.
    """
    run, later = tables.run.c, tables.run.alias("later").c
    return sa.exists().where(
        later.job == run.job,
        later.interval_start == run.interval_start,
        later.interval_end == run.interval_end,
        later.created_at > run.created_at,
        later.state == RunState.DONE,
        sa.or_(later.mode != NORMAL, later.reused == 0),
    )


def _of_duplicates(engine: Engine, at: datetime) -> Iterator[Notice]:
    table = tables.duplicate.c
    query = sa.select(tables.duplicate).where(
        table.kept_batch_id != "", table.found_at > at - RECENT
    )
    with ledger_database.reading(engine) as connection:
        for row in connection.execute(query).mappings():
            yield Notice(
                f"batch {row['batch_id']}",
                f"was a duplicate of {row['kept_batch_id']} "
                f"({counted(row['done_requests'], 'request')} done)",
                "It was cancelled. A longer [llm_batch] submit_grace makes this rarer.",
            )


def _hours(time: timedelta) -> str:
    return f"{time.total_seconds() / 3600:.0f} h"


def plain(value: Any) -> Any:
    """Return a value as JSON has it: money as decimal text, times as ISO 8601."""
    if isinstance(value, Decimal):
        return format(value, "f")
    return value.isoformat() if isinstance(value, datetime) else value

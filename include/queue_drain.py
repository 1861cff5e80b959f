"""The drain: waiting requests become runs, each over one group of requests.

    is it time? ─► sort: which model is asked, or what is wrong ─► claim: one run per group

A claim is one transaction of the ledger: it begins the run and moves the requests from queued to
processing under the run's id. Whoever is killed before it has changed nothing; whoever is killed
after it leaves an open run without a snapshot, which the next drain starts again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from include import ledger_database
from include import ledger_queries as queries
from include import ledger_tables as tables
from include.errors import ConfigurationError, JobSpecError, LLMBatchError, RequestRefusedError
from include.figures import counted
from include.job_spec import JOBS_ROOT, JobSpec, with_provider
from include.ledger import Ledger
from include.ledger_records import Partition, Run, RunState, now
from include.pipeline import pinned
from include.provider import OPENAI, ProviderProfile
from include.queue_records import RequestState
from include.queue_request import RequestCheck, StoredRequest
from include.queue_spec import Group, QueueSpec, group_spec
from include.request_body import BAD_REQUEST
from include.run_mode import NORMAL

log = logging.getLogger(__name__)

SORTED_AT_ONCE = 1_000  # requests in one transaction
_queue = tables.queue
_columns = tables.queue.c
_STORED = [_columns[name] for name in StoredRequest.__dataclass_fields__]
_WAITS = _columns.state == RequestState.QUEUED


class NothingClaimedError(LLMBatchError):
    """Nobody waits in the group any more; the transaction is undone."""


@dataclass(frozen=True)
class Waiting:
    """How many requests wait, counted no further than asked, and since when the oldest does."""

    requests: int
    oldest: datetime | None


def drain(
    ledger: Ledger,
    queue: QueueSpec,
    *,
    dag_id: str,
    everything: bool = False,
    moment: datetime | None = None,
    jobs_root: Path = JOBS_ROOT,
    provider: Callable[[str], ProviderProfile] = lambda _conn_id: OPENAI,
) -> list[Run]:
    """Take what waits, if it is time, and return the runs that have to be started.

    Each run's `dag_run_id` is the name under which Airflow is to run it, of DAG `dag_id`. Runs that
    an earlier drain began and nobody has extracted yet are among them: to start one again does no
    harm. With `everything`, what waits is taken whatever job.yaml says about the time. `provider`
    tells which server is behind a connection.
    """

    def spec_of(group: Group) -> JobSpec:
        spec = group_spec(queue, group, jobs_root)
        return with_provider(spec, provider(spec.request.conn_id))

    moment = moment or now()
    found = waiting(ledger, queue.source.queue.min_requests or 1)
    if found.requests and (
        everything or queue.source.queue.is_due(found.requests, found.oldest, moment)
    ):
        sort(ledger, RequestCheck(jobs_root))
        for number, group in enumerate(groups(ledger), 1):
            _claim_group(ledger, group, spec_of, dag_id, (moment, number))
    return unstarted(ledger, queue.name)


def join(ledger: Ledger, queue: QueueSpec, run_id: str, *, dag_id: str, dag_run_id: str) -> Run:
    """Return a claimed run as one that this Airflow run works on.

    While it is open it goes on with the limits, rounds, budget, canary and alert that job.yaml has
    now; what is asked stays as it was claimed. Raises `ConfigurationError` when it is closed.
    """
    run = ledger.run(run_id)
    if run.state == RunState.CLOSED:
        raise ConfigurationError(f"{run} is closed; the next drain takes what is left of it.")
    if run.state != RunState.OPEN:
        return run
    names = ("limits", "retry", "budget", "canary", "alert")
    spec = pinned(run).model_copy(update={name: getattr(queue, name) for name in names})
    return ledger.open_run(
        Partition(run.job, run.interval_start, run.interval_end),
        spec_digest=run.spec_digest,
        spec=spec.to_json(),
        mode=run.mode,
        dag_id=dag_id,
        dag_run_id=dag_run_id,
    )


def waiting(ledger: Ledger, at_most: int) -> Waiting:
    """Return how many requests wait, `at_most` of them counted."""
    some = sa.select(sa.literal(1)).where(_WAITS).limit(at_most).subquery()
    with ledger_database.reading(ledger.engine) as connection:
        count = connection.scalar(sa.select(sa.func.count()).select_from(some)) or 0
        oldest = connection.scalar(sa.select(sa.func.min(_columns.queued_at)).where(_WAITS))
    return Waiting(count, oldest)


def unstarted(ledger: Ledger, name: str) -> list[Run]:
    """Return the open runs of a queue that have no snapshot yet, the oldest first."""
    columns = tables.run.c
    query = (
        sa.select(tables.run)
        .where(columns.job == name, columns.state == RunState.OPEN, columns.snapshot.is_(None))
        .order_by(columns.created_at)
    )
    with ledger_database.reading(ledger.engine) as connection:
        return [Run(**row) for row in connection.execute(query).mappings()]


def sort(ledger: Ledger, check: RequestCheck) -> None:
    """Note which model each new request asks; a wrong one has failed, with the reason.

    Requests of a job whose folder is broken are left alone, and logged: mend it, and they go.
    """
    last, has_more = None, True
    while has_more:
        with ledger_database.writing(ledger.engine) as connection:
            last, has_more = _sort_some(connection, check, last)


def _sort_some(
    connection: Connection, check: RequestCheck, after: str | None
) -> tuple[str | None, bool]:
    """Sort some requests, those whose id is greater than `after`; None begins with the first.

    Returns the last id, and whether there may be more.
    """
    # Plain SQL can put an empty id, which no text is smaller than.
    is_next = sa.true() if after is None else _columns.request_id > after
    query = (
        sa.select(*_STORED)
        .where(_WAITS, _columns.model.is_(None), is_next)
        .order_by(_columns.request_id)
        .limit(SORTED_AT_ONCE)
        .with_for_update(skip_locked=True)
    )
    found = [StoredRequest(**row) for row in connection.execute(query).mappings()]
    models: dict[str, list[str]] = {}
    broken: dict[str, int] = {}
    for one in found:
        try:
            models.setdefault(check.model(one.parsed()), []).append(one.request_id)
        except RequestRefusedError as error:
            _refuse(connection, one.request_id, str(error))
        except JobSpecError as error:
            broken[str(error)] = broken.get(str(error), 0) + 1
    for model, ids in models.items():
        _update(connection, ids, model=model)
    for message, requests in broken.items():
        waiting = counted(requests, "request goes", "requests go")
        log.error("%s on waiting until the job is mended: %s", waiting, message)
    last = found[-1].request_id if found else None
    return last, len(found) == SORTED_AT_ONCE


def _refuse(connection: Connection, request_id: str, message: str) -> None:
    log.warning("Request %r of the queue is refused: %s.", request_id, message)
    _update(
        connection,
        [request_id],
        state=RequestState.FAILED,
        reason=BAD_REQUEST,
        error_message=message,
        ended_at=now(),
    )


def _update(connection: Connection, ids: Sequence[str], **values: object) -> None:
    statement = sa.update(_queue).where(_columns.request_id.in_(ids), _WAITS).values(**values)
    connection.execute(statement)


def groups(ledger: Ledger) -> list[Group]:
    """Return the groups of what waits and has been sorted, in a stable order."""
    is_job = _columns.job.is_not(None)
    empty = sa.literal("")
    query = sa.select(
        sa.func.coalesce(_columns.job, empty),
        sa.case((is_job, empty), else_=_columns.endpoint),
        sa.case((is_job, empty), else_=_columns.model),
    ).where(_WAITS, _columns.model.is_not(None))
    with ledger_database.reading(ledger.engine) as connection:
        return sorted(Group(*row) for row in connection.execute(query.distinct()))


def _claim_group(
    ledger: Ledger,
    group: Group,
    spec_of: Callable[[Group], JobSpec],
    dag_id: str,
    at: tuple[datetime, int],
) -> None:
    try:
        run = claim(ledger, spec_of(group), group, dag_id=dag_id, at=at)
    except NothingClaimedError:
        log.info("Queue %s, %s: nothing waits any more.", dag_id, group)
    except JobSpecError as error:
        log.error("Queue %s: the requests of %s go on waiting: %s", dag_id, group, error)
    else:
        log.info("%s: %s is taken, as Airflow run %s.", run, group, run.dag_run_id)


def claim(
    ledger: Ledger, spec: JobSpec, group: Group, *, dag_id: str, at: tuple[datetime, int]
) -> Run:
    """Begin the run of one group and move its requests to it, both or neither.

    `at` is the moment of the drain and the group's number in it. Together they name the Airflow
    run and the partition, of which each group has its own: its end is as many microseconds later.
    Raises `NothingClaimedError` when none waits (any more).
    """
    moment, number = at

    def take(connection: Connection, run_id: str) -> None:
        count = _take(connection, group, run_id)
        if not count:
            raise NothingClaimedError(str(group))
        queries.note(
            connection, run_id, None, None, RunState.OPEN, f"{counted(count, 'request')} claimed"
        )

    return ledger.open_run(
        Partition(spec.name, moment, moment + timedelta(microseconds=number)),
        spec_digest=spec.digest,
        spec=spec.to_json(),
        mode=NORMAL,
        dag_id=dag_id,
        dag_run_id=f"queue__{moment:%Y-%m-%dT%H:%M:%S.%f}__{number}",
        begin=take,
    )


def _take(connection: Connection, group: Group, run_id: str) -> int:
    """Move the waiting requests of a group to a run; return how many."""
    # A row that its application is just cancelling is left to it.
    free = sa.select(_columns.request_id).where(*_in_group(group)).with_for_update(skip_locked=True)
    statement = (
        sa.update(_queue)
        .where(_columns.request_id.in_(free), _WAITS)
        .values(state=RequestState.PROCESSING, run_id=run_id, claimed_at=now())
    )
    return connection.execute(statement).rowcount


def _in_group(group: Group) -> Iterator[sa.ColumnElement[bool]]:
    yield _WAITS
    yield _columns.model.is_not(None)
    if group.job:
        yield _columns.job == group.job
    else:
        yield _columns.job.is_(None)
        yield _columns.endpoint == group.endpoint
        yield _columns.model == group.model

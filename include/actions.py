"""What a person may do to a run from outside: cancel a batch or a run, redrive failed rows.

(`include.closing` ends a run for good.)

Every action is planned first, so that its consequences (rows, money) can be shown and confirmed,
and recorded in `llm_batch_action`: who, what, when, and how it ended. The line is written before
anything is asked of the API or of Airflow, so an action that dies half way is seen as well.
Whether the person may do it is decided before, by whoever calls.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from include import ledger_database, participants
from include import ledger_tables as tables
from include.errors import ConfigurationError, LLMBatchError
from include.figures import counted
from include.job_spec import JobSpec, with_overrides
from include.ledger import Ledger
from include.ledger_records import Batch, BatchState, Run, RunState, now
from include.partition_state import failures_left
from include.run_mode import NORMAL

if TYPE_CHECKING:
    from include.batch_api import BatchApi

log = logging.getLogger(__name__)

MOST_RUNS = 1_000  # of one partition that are looked at
MOST_ACTIONS = 200  # lines of history at a time
DETAIL_LENGTH = 1_000  # characters


class ActionKind(StrEnum):
    """What was done."""

    CANCEL_BATCH = "cancel_batch"
    CANCEL_RUN = "cancel_run"
    REDRIVE = "redrive"
    ERASE = "erase"
    CLOSE = "close"


class Outcome(StrEnum):
    """How an action ended; one that stays ASKED died on its way."""

    ASKED = "asked"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True)
class Actor:
    """Who acts: the name that they logged in with, and through what (`ui`, `cli`)."""

    name: str
    via: str


@dataclass(frozen=True)
class Action:
    """One line of `llm_batch_action`."""

    action_id: int
    at: datetime
    ended_at: datetime | None
    who: str
    via: str
    kind: str
    dag_id: str
    run_id: str
    submission_id: str | None
    outcome: str
    detail: str | None


@dataclass(frozen=True)
class Cancellation:
    """What cancelling would do. Money is US dollars, None when no price is known."""

    run: Run
    batches: tuple[Batch, ...]  #: those that the API still works on
    is_whole_run: bool
    requests: int
    answered: int  #: done or failed at the API so far: paid for, and kept
    open: int  #: not answered yet
    paid_usd: Decimal | None  #: about what `answered` has cost
    saved_usd: Decimal | None  #: about what `open` would cost
    airflow_runs: tuple[tuple[str, str], ...]  #: (DAG id, run id) of everybody who works on it

    @property
    def kind(self) -> ActionKind:
        """What is recorded."""
        return ActionKind.CANCEL_RUN if self.is_whole_run else ActionKind.CANCEL_BATCH


@dataclass(frozen=True)
class Redrive:
    """What sending the failed rows of a partition again would do."""

    run: Run
    rows: int  #: that are sent: those that have failed for good
    cost_usd: Decimal | None  #: about what one more answer for each of them costs
    is_changed: bool = False  #: the job asks something else by now: then `rows` are all rows

    @property
    def note(self) -> str:
        """What the Airflow run that does it says of itself."""
        rows = counted(self.rows, "row" if self.is_changed else "failed row")
        return f"Redrive of {rows} of {self.run.dag_run_id}."


def plan_cancel(ledger: Ledger, run_id: str, submission_id: str | None = None) -> Cancellation:
    """Return what cancelling a whole run, or one batch of it, would do.

    Raises `ConfigurationError` when the ledger does not know them, or when the batch is not at
    the API. A run is cancelled even when nothing of it is at the API: no further round begins.
    """
    run = ledger.run(run_id)
    every = ledger.batches(run_id)
    if submission_id is None:
        _check_open(run)
        at_api = _at_api(ledger, run)
    else:
        at_api = [_cancellable(run, every, submission_id)]
    requests = sum(one.requests for one in at_api)
    answered = sum(min(one.done_requests + one.failed_requests, one.requests) for one in at_api)
    each = price_per_request(run, every)
    return Cancellation(
        run=run,
        batches=tuple(at_api),
        is_whole_run=submission_id is None,
        requests=requests,
        answered=answered,
        open=requests - answered,
        paid_usd=None if each is None else each * answered,
        saved_usd=None if each is None else each * (requests - answered),
        airflow_runs=tuple(participants.names(ledger, run_id)),
    )


def plan_cancel_all(ledger: Ledger, run_ids: Sequence[str]) -> list[Cancellation]:
    """Return what cancelling these runs would do; one that has ended by now is left out."""
    runs = (ledger.run(one) for one in run_ids)
    return [plan_cancel(ledger, one.run_id) for one in runs if one.state == RunState.OPEN]


def _at_api(ledger: Ledger, run: Run) -> list[Batch]:
    return [one for one in ledger.batches(run.run_id) if one.state == BatchState.SUBMITTED]


def _check_open(run: Run) -> None:
    if run.state != RunState.OPEN:
        raise ConfigurationError(f"{run} is {run.state}: there is nothing left to cancel.")


def _cancellable(run: Run, batches: Sequence[Batch], submission_id: str) -> Batch:
    found = [one for one in batches if one.submission_id == submission_id]
    if not found:
        raise ConfigurationError(
            f"{run} has no batch or submission {submission_id}. "
            f"`python -m llm_batch show {run.run_id}` lists its batches."
        )
    if found[0].state != BatchState.SUBMITTED:
        raise ConfigurationError(
            f"{found[0]} is {found[0].state}: only a batch that the API works on (SUBMITTED) can "
            "be cancelled."
        )
    return found[0]


def price_per_request(run: Run, batches: Sequence[Batch]) -> Decimal | None:
    """Return about what one request of the run costs: as paid so far, or as estimated."""
    paid = [one for one in batches if one.cost_usd is not None and one.state == "COLLECTED"]
    answered = sum(one.requests for one in paid)
    if answered:
        return (
            sum((one.cost_usd for one in paid if one.cost_usd is not None), Decimal(0)) / answered
        )
    first = run.rows - run.reused - run.rejected
    return run.estimate_usd / first if run.estimate_usd is not None and first > 0 else None


def cancel(
    plan: Cancellation,
    ledger: Ledger,
    api: Callable[[str], BatchApi],
    actor: Actor,
    *,
    end_run: Callable[[str, str], object] = lambda _dag_id, _run_id: None,
) -> Action:
    """Ask the API to cancel what `plan` names, and record it.

    `api` opens a connection by its id. For a whole run, `end_run` is called first with the DAG id
    and run id of every Airflow run that works on it: it has to fail that run, so that no task
    wakes up and begins the next round with what was cancelled. What is at the API by then is
    cancelled, also what was submitted since it was planned.
    What the batches have done is collected: by this run when one batch was cancelled (the rest
    goes to the next round), by the partition's next run when the whole run was.
    One batch that cannot be cancelled does not keep the others from it. Raises what `end_run`
    raises, or the first error of the API, after it has been recorded.
    """
    only = None if plan.is_whole_run else plan.batches[0].submission_id
    with audited(ledger, plan.run, plan.kind, actor, submission_id=only) as note:
        # Both as it is now: others may have joined since, and tasks have gone on until their end.
        for airflow_run in participants.names(ledger, plan.run.run_id) if plan.is_whole_run else ():
            end_run(*airflow_run)
        for one in _at_api(ledger, plan.run) if plan.is_whole_run else plan.batches:
            note(_cancel_one(one, ledger, api))
    return last_action(ledger, plan.run.run_id)


def _cancel_one(
    batch: Batch, ledger: Ledger, api: Callable[[str], BatchApi]
) -> str | LLMBatchError:
    try:
        view = api(batch.conn_id).cancel(str(batch.batch_id))
        ledger.polled(view.batch_id, api_status=view.status, done=view.done, failed=view.failed)
    except LLMBatchError as error:
        log.error("%s could not be cancelled: %s", batch, error)
        return error
    log.warning("%s: cancelling was asked for by a person; it is %s.", batch, view.status)
    return f"{view.batch_id} {view.status}"


def plan_redrive(ledger: Ledger, run_id: str, job: JobSpec | None = None) -> Redrive:
    """Return what sending the failed rows of the run's partition again would do.

    `job` is the job's folder as it is now, where that is at hand: no row is loaded with a request
    that has changed, so all of them would be sent.

    Raises `ConfigurationError` while the normal run of these rows is open, or when no row has
    failed. A redrive that is open already is joined.
    """
    run = ledger.run(run_id)
    if JobSpec.from_json(run.spec).queue is not None:
        raise ConfigurationError(
            f"{run}: requests of the queue are not redriven. Their applications put them again, "
            "under new ids."
        )
    runs = partition_runs(ledger, run)
    for one in [one for one in runs if _is_alike(one, run)][-1:]:
        if one.state != RunState.DONE:
            raise ConfigurationError(
                f"{one} is not finished (Airflow run {one.dag_run_id}). Let it finish, or run the "
                "partition again without redrive: it goes on where it stopped."
            )
    rows = failures_left(one for one in runs if one.state == RunState.DONE)
    if not rows:
        raise ConfigurationError(f"{run}: no row of the partition has failed; nothing to redrive.")
    is_changed = job is not None and _asks_else(job, run)
    rows = run.rows if is_changed else rows
    each = price_per_request(run, ledger.batches(run_id))
    return Redrive(run, rows, None if each is None else each * rows, is_changed)


def _asks_else(job: JobSpec, run: Run) -> bool:
    """Tell whether a redrive, with the model of the run, finds none of its rows as loaded."""
    then = JobSpec.from_json(run.spec)
    try:
        now_asked = with_overrides(job, model=then.request.model)
    except ConfigurationError:  # the run will say so, and send nothing
        return False
    places = ((one.target.table, one.target.path) for one in (now_asked, then))
    return now_asked.question != then.question or len(set(places)) > 1


def _is_alike(one: Run, run: Run) -> bool:
    return one.mode == NORMAL and one.spec_digest == run.spec_digest


def redrive_params(run: Run) -> dict[str, Any]:
    """Return the params of an Airflow run that redrives this one.

    Its model and sample are among them: with the job's own, rows that are loaded would be others,
    and all of them would be sent.
    """
    spec = JobSpec.from_json(run.spec)
    params = {"redrive": True, "model": spec.request.model}
    return params if spec.sample == 1 else {**params, "sample": float(spec.sample)}


def redrive(
    plan: Redrive, ledger: Ledger, actor: Actor, *, trigger: Callable[[Redrive], str]
) -> Action:
    """Start the redrive and record it.

    `trigger` starts an Airflow run over the interval of `plan.run` with the param `redrive` set,
    by Airflow's own means, and returns its run id. What it raises is recorded and goes on.
    """
    with audited(ledger, plan.run, ActionKind.REDRIVE, actor) as note:
        note(f"Airflow run {trigger(plan)}")
    return last_action(ledger, plan.run.run_id)


def partition_runs(ledger: Ledger, run: Run) -> list[Run]:
    """Return the runs over the same rows as `run`, oldest first."""
    columns = tables.run.c
    query = (
        sa.select(tables.run)
        .where(
            columns.job == run.job,
            columns.interval_start == run.interval_start,
            columns.interval_end == run.interval_end,
        )
        .order_by(columns.created_at, columns.generation)
        .limit(MOST_RUNS)
    )
    with ledger_database.reading(ledger.engine) as connection:
        return [Run(**row) for row in connection.execute(query).mappings()]


@contextmanager
def audited(
    ledger: Ledger, run: Run, kind: ActionKind, actor: Actor, *, submission_id: str | None = None
) -> Iterator[Callable[[str | LLMBatchError], None]]:
    """Record an action around the block; the block passes on what came of it, text or error.

    An error that was passed on is raised at the end, when everything else has been done.
    """
    action_id = _begin(ledger, run, kind, actor, submission_id)
    said: list[str | LLMBatchError] = []
    try:
        yield said.append
    except BaseException as error:
        told = str(error) if isinstance(error, LLMBatchError) else type(error).__name__
        _end(ledger, action_id, Outcome.FAILED, [*map(str, said), told])
        raise
    errors = [one for one in said if isinstance(one, LLMBatchError)]
    _end(ledger, action_id, Outcome.FAILED if errors else Outcome.DONE, list(map(str, said)))
    if errors:
        raise errors[0]


def _begin(
    ledger: Ledger, run: Run, kind: ActionKind, actor: Actor, submission_id: str | None
) -> int:
    values = {
        "at": now(),
        "who": actor.name[:250],
        "via": actor.via,
        "kind": kind,
        "dag_id": run.dag_id,
        "run_id": run.run_id,
        "submission_id": submission_id,
        "outcome": Outcome.ASKED,
    }
    with ledger_database.writing(ledger.engine) as connection:
        key = connection.execute(sa.insert(tables.action).values(values)).inserted_primary_key
    log.warning("%s: %s was asked for by %s (%s).", run, kind, actor.name, actor.via)
    return int(key[0]) if key else 0


def _end(ledger: Ledger, action_id: int, outcome: Outcome, said: Sequence[str]) -> None:
    values = {"ended_at": now(), "outcome": outcome, "detail": "; ".join(said)[:DETAIL_LENGTH]}
    with ledger_database.writing(ledger.engine) as connection:
        connection.execute(
            sa.update(tables.action).where(tables.action.c.action_id == action_id).values(values)
        )


def last_action(ledger: Ledger, run_id: str) -> Action:
    """Return the newest action on a run."""
    return history(ledger, run_id=run_id, limit=1)[0]


def history(ledger: Ledger, *, run_id: str, limit: int = MOST_ACTIONS) -> list[Action]:
    """Return the newest actions on a run first."""
    with ledger_database.reading(ledger.engine) as connection:
        return history_on(connection, run_id=run_id, limit=limit)


def history_on(
    connection: Connection,
    *,
    run_id: str | None = None,
    dag_ids: Sequence[str] | None = None,
    limit: int = MOST_ACTIONS,
) -> list[Action]:
    """Return the newest actions first: on one run, on the runs of some DAGs, or on all."""
    table = tables.action
    query = sa.select(table).order_by(table.c.action_id.desc()).limit(limit)
    if run_id is not None:
        query = query.where(table.c.run_id == run_id)
    if dag_ids is not None:
        query = query.where(table.c.dag_id.in_(dag_ids))
    return [Action(**row) for row in connection.execute(query).mappings()]

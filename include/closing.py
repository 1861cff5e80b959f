"""Ends a run that nobody will finish: another run of its partition has taken its place.

A job whose prompt has changed makes a run of its own, and leaves the one before open when that was
not finished. Closing it stops its spend, collects what its batches have done, and lets go of it:
nothing of it is sent or loaded any more, its artifacts and its history age like those of a run
that is done. What it has cost stays in the ledger, and should the partition ever run with the same
request again, it goes on with what was collected.

A run over requests of the queue is never replaced: closing it is the way out when it cannot go on.
What has been answered, or has cost something, ends; the other requests are queued again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from include import collecting, participants
from include.actions import Action, ActionKind, Actor, audited, last_action, partition_runs
from include.artifacts import Artifacts
from include.cost import known_total
from include.errors import ConfigurationError
from include.figures import counted, money
from include.job_spec import JobSpec
from include.ledger import Ledger
from include.ledger_database import reading
from include.ledger_records import AT_REST, Batch, BatchState, Round, Run, RunState
from include.rival_runs import overtaken_by
from include.round_files import round_files
from include.run_mode import OWN_FILE
from include.submission import Submission
from include.waiting import Verdict, WaitPolicy, look

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

    from include.batch_api import BatchApi

SHORT_PATIENCE = timedelta(seconds=30)  #: with a file that is not known: a person waits
IsAlive = Callable[[str, str], bool]  #: of an Airflow run, by DAG id and run id


@dataclass(frozen=True)
class Closing:
    """What closing a run would do."""

    run: Run
    successor: Run  #: has the rows now. Itself for requests of the queue
    batches: int  #: at the API, or about to be
    unsent: int  #: requests in files that were never sent
    collected_usd: Decimal | None  #: None when a price is unknown

    @property
    def is_replaced(self) -> bool:
        """Whether another run has its rows; else they are requests of the queue."""
        return self.successor.run_id != self.run.run_id

    def text(self) -> str:
        """Return what somebody reads before they say yes."""
        cancelled = counted(self.batches, "batch is", "batches are")
        batches = f"{self.run}: it is closed, {cancelled} cancelled"
        kept = f"What it has collected ({money(self.collected_usd)}) stays on disk and in the costs"
        if not self.is_replaced:
            return (
                f"{batches}. {kept}: its requests have ended. Requests that were not sent, or have "
                "cost nothing, are queued again, and the next drain takes them."
            )
        return (
            f"{batches}, {counted(self.unsent, 'request is', 'requests are')} never sent. {kept}, "
            f"and is not loaded: its rows belong to run {self.successor.run_id}."
        )

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        known = self.collected_usd
        return {
            "run_id": self.run.run_id,
            "replaced_by": self.successor.run_id,
            "batches": self.batches,
            "unsent": self.unsent,
            "collected_usd": None if known is None else format(known, "f"),
        }


@dataclass(frozen=True)
class Places:
    """What closing works on; `submission` opens a connection by its id."""

    ledger: Ledger
    artifacts: Artifacts
    submission: Callable[[str], Submission]


def plan_close(ledger: Ledger, run_id: str, *, is_alive: IsAlive) -> Closing:
    """Return what closing a run would do.

    Raises `ConfigurationError` when the run is over already, when it is the newest of its
    partition (unless an earlier one was sent instead) or has a request file of its own, or while an
    Airflow run that works on it is alive.
    """
    run = ledger.run(run_id)
    _check_may_end(run)
    batches = ledger.batches(run_id)
    successor = _successor(ledger, run, batches)
    _check_nobody_works(ledger, run, is_alive)
    return Closing(
        run=run,
        successor=successor,
        batches=sum(one.state not in AT_REST for one in batches),
        unsent=sum(one.requests for one in batches if one.state == BatchState.PREPARED),
        collected_usd=_collected(batches, "cost_usd"),
    )


def _check_may_end(run: Run) -> None:
    if run.state != RunState.OPEN:
        raise ConfigurationError(f"{run} is {run.state}: there is nothing left to close.")
    if run.mode == OWN_FILE:
        raise ConfigurationError(
            f"{run} has a request file of its own: it is over when its batch is collected. There "
            "is nothing to close."
        )


def _successor(ledger: Ledger, run: Run, batches: Sequence[Batch]) -> Run:
    """Return the run that has the rows now; a run over requests of the queue keeps them."""
    newest = partition_runs(ledger, run)[-1]
    if newest.run_id != run.run_id or JobSpec.from_json(run.spec).queue is not None:
        return newest
    with reading(ledger.engine) as connection:
        other = overtaken_by(connection, batches)
    if other is not None:
        return other
    raise ConfigurationError(
        f"{run} is the newest run of its partition, and its rows have no other. Run the "
        "partition again: it goes on from where it stopped. Only a run that another one has "
        "replaced (the job was changed) can be closed."
    )


def _check_nobody_works(ledger: Ledger, run: Run, is_alive: IsAlive) -> None:
    for dag_id, dag_run_id in sorted(participants.everybody(ledger, run.run_id)):
        if is_alive(dag_id, dag_run_id):
            raise ConfigurationError(
                f"{run}: Airflow run {dag_run_id} of DAG {dag_id} works on it and has not ended. "
                f"Let it end, or stop it (`python -m llm_batch cancel {run.run_id}`); then close."
            )


def _collected(batches: Sequence[Batch], name: str) -> Decimal | None:
    """Return a sum over the collected batches, None (unknown, never 0) without a price."""
    return known_total(getattr(one, name) for one in batches if one.state == BatchState.COLLECTED)


def close(plan: Closing, places: Places, actor: Actor) -> Action:
    """Cancel what is at the API, collect what it has done, close the run, and record it all.

    Raises `ConfigurationError` while a batch is still being cancelled: close again then. May be
    called again after it was killed at any line.
    """
    run_id = plan.run.run_id
    with audited(places.ledger, plan.run, ActionKind.CLOSE, actor) as note:
        for one in places.ledger.batches(run_id):
            if one.state not in AT_REST:
                note(_ended(one, places))
        batches = places.ledger.batches(run_id)
        _check_at_rest(plan.run, batches)
        rounds = places.ledger.rounds(run_id)

        def end(connection: Connection) -> dict[str, int]:
            return _given_back(connection, plan.run, (rounds, batches), places.artifacts, note)

        places.ledger.close_run(
            run_id,
            end=end,
            **{name: _collected(batches, name) for name in ("cost_usd", "realtime_usd")},
        )
    return last_action(places.ledger, run_id)


def _given_back(
    connection: Connection,
    run: Run,
    done: tuple[list[Round], list[Batch]],
    artifacts: Artifacts,
    note: Callable[[str], None],
) -> dict[str, int]:
    """End or return the requests of the queue that the run had; return its counts."""
    spec = JobSpec.from_json(run.spec)
    if spec.queue is None:
        return {}
    from include.loading import RunFiles
    from include.queue_target import give_back

    files = RunFiles(spec, tuple(round_files(run, *done, artifacts)), run.rejected_file, artifacts)
    found = give_back(connection, run.run_id, files)
    note(f"{found.completed} completed, {found.failed} failed, {found.queued} queued again")
    return {"loaded": found.completed, "failed": found.failed}


def _ended(batch: Batch, places: Places) -> str:
    """Bring a batch to its end as far as that goes now; return what became of it."""
    submission = places.submission(batch.conn_id)
    batch = submission.withdraw(batch.submission_id)
    if batch.state == BatchState.SUBMITTED:
        batch = _cancelled(batch, places.ledger, submission.api)
    if batch.state == BatchState.ENDED:
        batch = collecting.collect(
            batch, places.ledger, places.artifacts, submission.api, patience=SHORT_PATIENCE
        )
    return f"{batch.batch_id or batch.submission_id} {batch.api_status}, {batch.state}"


def _cancelled(batch: Batch, ledger: Ledger, api: BatchApi) -> Batch:
    # Nothing of a closed run is sent again: a batch that is unknown need not be waited for.
    policy = WaitPolicy(lost_minutes=0.0)
    if look(batch, ledger, api, policy) is Verdict.WAIT:
        view = api.cancel(str(batch.batch_id))
        ledger.polled(view.batch_id, api_status=view.status, done=view.done, failed=view.failed)
        look(batch, ledger, api, policy)
    return ledger.batch(batch.submission_id)


def _check_at_rest(run: Run, batches: Sequence[Batch]) -> None:
    left = [one for one in batches if one.state not in AT_REST]
    if left:
        raise ConfigurationError(
            f"{run} is not closed yet: {len(left)} of its batches are still being cancelled at "
            f"the API, {left[0].batch_id} is {left[0].api_status}. That takes up to ten minutes. "
            "Say close again then: what they have done is collected first."
        )

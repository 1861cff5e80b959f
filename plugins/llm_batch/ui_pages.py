"""The ledger as pages reach it, and what the page of a run shows."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException
from sqlalchemy.engine import Connection, Engine

from include import actions, closing, figures, ledger_database, run_view
from include.closing import Closing
from include.errors import ConfigurationError, LLMBatchError
from include.job_spec import JobSpec
from include.ledger import Ledger
from include.ledger_records import Run, RunState
from include.provider import ProviderProfile
from llm_batch import connections, ui_airflow

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

_lock = threading.Lock()
_engines: list[Engine] = []


class LedgerNotReadyError(ConfigurationError):
    """There is no ledger yet, or it is not of this release."""


@contextmanager
def ledger() -> Iterator[Connection]:
    """Yield a connection to a ledger of this release that only reads.

    Raises `LedgerNotReadyError`, or `TransientError` when its database does not answer. Pages
    never migrate: tasks do, when the next run begins.
    """
    with ledger_database.reading(_engine()) as connection:
        found = ledger_database.version(connection)
        if found is None:
            raise LedgerNotReadyError("No run has begun yet: the ledger has no tables.")
        if found != ledger_database.HEAD:
            raise LedgerNotReadyError(
                f"The ledger is at migration {found}, this release needs {ledger_database.HEAD}. "
                + _cure(found)
            )
        yield connection


def _cure(found: str) -> str:
    if found > ledger_database.HEAD:
        return "It belongs to a newer release: restart the API server with that release."
    return "The next task of any LLM batch job migrates it; trigger one, then reload this page."


def writable_ledger() -> Ledger:
    """Return the ledger for an action, which records itself."""
    return Ledger(_engine())


def _engine() -> Engine:
    """Return this process's one engine, until the connection changes."""
    new = connections.ledger_engine()
    with _lock:
        if not _engines or _engines[0].url != new.url:
            _engines[:] = [ledger_database.prepare(new)]
        return _engines[0]


def find_run(
    connection: Connection, session: Session, dag_id: str, dag_run_id: str
) -> tuple[list[Run], ui_airflow.AirflowRun | None]:
    """Return the ledger's runs behind an Airflow run, newest first, and the Airflow run.

    An Airflow run that found the partition's run open has joined it, and shows it.
    """
    airflow = ui_airflow.airflow_run(session, dag_id, dag_run_id)
    runs = run_view.runs_of(connection, dag_id, dag_run_id)
    return runs, airflow


def run_page(
    connection: Connection,
    session: Session,
    runs: Sequence[Run],
    airflow: ui_airflow.AirflowRun | None,
) -> dict[str, Any]:
    """Return what the page of a run shows."""
    seen = run_view.view(connection, runs[0], runs)
    spec = pinned(runs[0])
    end = closable(session, runs[0])
    return {
        "view": seen,
        "run": seen.run,
        "spec": spec,
        "airflow": airflow,
        "now": datetime.now(UTC),
        "pages": batch_pages(seen),
        "artifacts_at": connections.artifacts().uri(""),
        "next": what_next(seen, airflow, spec, end),
        "end": end,
        "is_final": not seen.is_open
        or (airflow is not None and airflow.is_final and not seen.at_api),
        "history": actions.history_on(connection, run_id=seen.run.run_id, limit=10),
    }


def pinned(run: Run) -> JobSpec | None:
    """Return the run's spec; None when another release wrote what this one cannot read."""
    try:
        return JobSpec.from_json(run.spec)
    except ValueError:
        return None


def closable(session: Session, run: Run) -> Closing | None:
    """Return what closing a run would do; None when it cannot be closed."""
    if run.state != RunState.OPEN or pinned(run) is None:
        return None
    try:
        return plan_close(session, run)
    except ConfigurationError:  # it may still end by itself
        return None


def plan_close(session: Session, run: Run) -> Closing:
    """Return what closing a run would do; raises `ConfigurationError` when it cannot be closed."""
    is_alive = partial(ui_airflow.is_alive, session)
    return closing.plan_close(writable_ledger(), run.run_id, is_alive=is_alive)


def batch_pages(seen: run_view.RunView) -> dict[str, str]:
    """Return the provider's page of each batch that has one, by the batch's id."""
    known = {name: _provider(name) for name in {one.conn_id for one in seen.shards}}
    pages = ((one.batch_id, known[one.conn_id]) for one in seen.shards if one.batch_id)
    found = ((name, profile.page_of(name)) for name, profile in pages if profile is not None)
    return {name: page for name, page in found if page}


def _provider(conn_id: str) -> ProviderProfile | None:
    try:
        return connections.provider(conn_id)
    except LLMBatchError:  # a mistake in a connection that the page does not need
        return None


def what_next(
    seen: run_view.RunView,
    airflow: ui_airflow.AirflowRun | None,
    spec: JobSpec | None,
    end: Closing | None,
) -> str:
    """Return one sentence on what happens next, or what a person should do."""
    run = seen.run
    if not seen.is_open:
        return _after(seen)
    if end is not None:
        return _never(end)
    if airflow is not None and airflow.state == "failed":
        return (
            "The Airflow run has failed, but the work is not lost. Look at the failed task's log, "
            "mend the cause, then clear the failed task, or run the partition again: it goes on "
            "from here and pays for nothing twice."
        )
    still = [one for one in seen.shards if run_view.is_still(one, datetime.now(UTC))]
    if still:
        return (
            f"{figures.counted(len(still), 'batch')} at the API made no progress for more than "
            f"{figures.span(run_view.STILL)}. The API takes up to 24 hours; at its deadline a "
            "batch is cancelled, what it has done is kept, and the rest goes to the next round."
        )
    if seen.at_api:
        batches = figures.counted(seen.batches, "batch")
        return f"Waiting for the API: it works on {seen.at_api} of {batches}."
    refused = next(
        (one.error for one in seen.shards if one.state == "PREPARED" and one.error), None
    )
    if refused:
        return f"Waiting to submit. The API's last answer: {refused}"
    if not seen.rounds:
        extracted = figures.counted(run.rows, "row is", "rows are")
        return f"{extracted} extracted." if run.rows else "Extracting rows."
    last = seen.rounds[-1]
    if last.state == "SETTLED":
        most = spec.retry.rounds if spec else last.number
        if last.sums["retry"] and last.number < most:
            rows = figures.counted(last.sums["retry"], "row")
            return f"Round {last.number + 1} comes next, with {rows}."
        return "All rounds are settled; loading comes next."
    return "Between two steps: a task of the run is about to go on."


def _never(end: Closing) -> str:
    if end.is_replaced:
        return (
            "It will not end by itself: another run has this partition, mostly of a changed job. "
            "Close it, unless the job is to be changed back: then a run of the day goes on with it."
        )
    return (
        "Its Airflow run has ended and left it open. Mend the cause and clear the failed task: it "
        "goes on from here and pays for nothing twice. Or close it: requests that have cost "
        "nothing are queued again."
    )


def _after(seen: run_view.RunView) -> str:
    run = seen.run
    if not seen.is_done:
        return (
            "Closed by a person: nothing of it is sent or loaded any more. What it has collected "
            "is kept, and is not paid again if the partition runs with the same request."
        )
    if not run.failed:
        return "Finished: every row is loaded."
    failed = figures.counted(run.failed, "row is", "rows are")
    return (
        f"Finished: {failed} in the failures table, with the reason. Mend the cause, then redrive."
    )


def found_run(dag_id: str, ledger_run: str) -> Run:
    """Return a run of this DAG: the permission was checked for the DAG, not for the run."""
    with ledger() as connection:
        found = run_view.run_of(connection, dag_id, ledger_run)
    if found is None:
        raise HTTPException(404, "This DAG has no such run.")
    return found

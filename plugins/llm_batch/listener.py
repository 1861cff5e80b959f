"""Stops the spend of a run that has failed, and has the note of an ended run written.

`BatchTrigger.on_kill` cancels the batch of a task that is ended while its trigger runs. It cannot
know of a batch whose trigger has not begun yet, or whose task never came to wait. When the whole
Airflow run has failed, whoever failed it, nobody waits for what it still has at the API: that is
cancelled here, unless another Airflow run works on the same partition: it goes on with them. What
cancelled batches have done is collected by the next run of the partition.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from airflow.listeners import hookimpl

from llm_batch.own_dags import may_submit
from llm_batch.run_notes import RunNotes

if TYPE_CHECKING:
    from airflow.models.dagrun import DagRun

log = logging.getLogger(__name__)
notes = RunNotes()


@hookimpl
def on_starting(component: object) -> None:
    """Let a scheduler import what its tasks need, before it forks them; see `preload`."""
    if type(component).__name__ == "Job":
        from llm_batch import preload  # noqa: F401


@hookimpl
def on_dag_run_success(dag_run: DagRun, msg: str) -> None:
    """Have the run's note written."""
    del msg
    notes.add(dag_run)


@hookimpl
def on_dag_run_failed(dag_run: DagRun, msg: str) -> None:
    """Cancel what the run has in flight, in a thread: the scheduler must not wait for the API."""
    del msg
    notes.add(dag_run)
    if not may_submit(dag_run):
        return  # another team's: it costs neither a thread nor a connection
    threading.Thread(
        target=cancel_in_flight, args=(dag_run.dag_id, dag_run.run_id), daemon=True
    ).start()


def cancel_in_flight(dag_id: str, dag_run_id: str) -> None:
    """Ask for every batch of this Airflow run that the API still works on to be cancelled."""
    from include import participants
    from include.errors import LLMBatchError
    from llm_batch import connections

    try:
        batches = participants.leave(connections.ledger(), dag_id, dag_run_id)
    except LLMBatchError as error:
        log.error("Run %s of DAG %s failed; its batches may go on: %s", dag_run_id, dag_id, error)
        return
    for batch in batches:
        # One that cannot be cancelled must not keep the others at work.
        try:
            connections.batch_api(batch.conn_id).cancel(str(batch.batch_id))
            log.warning("%s: its run has failed, so cancelling was asked for.", batch)
        except LLMBatchError as error:
            log.error("%s: its run has failed, and it may go on: %s", batch, error)

"""Writes the note of an Airflow run that has ended: what it came to.

Airflow 3.3.2 has no call for it in a task; a listener of ended runs is called inside the scheduler.
The scheduler must not wait for the ledger, so it only names the run here. One thread of the process
writes the notes, one after the other, with a session of its own: it holds at most one connection,
and a ledger that hangs costs notes, nothing else. A note of a person is never touched.
"""

from __future__ import annotations

import logging
import queue
import threading
from typing import TYPE_CHECKING

from llm_batch.own_dags import may_report

if TYPE_CHECKING:
    from airflow.models.dagrun import DagRun, DagRunNote

WAITING = 1000  # runs that may wait for their note; more of them go without

log = logging.getLogger(__name__)


class RunNotes:
    """The notes to be written by this process, and the thread that writes them."""

    def __init__(self) -> None:
        self._ended: queue.Queue[tuple[str, str]] = queue.Queue(WAITING)
        self._lock = threading.Lock()
        self._writer: threading.Thread | None = None

    def add(self, dag_run: DagRun) -> None:
        """Have the note of this run written soon; never waits, never raises."""
        if not may_report(dag_run):
            return
        _load()
        try:
            self._ended.put_nowait((dag_run.dag_id, dag_run.run_id))
        except queue.Full:
            log.warning(
                "Run %s of DAG %s gets no note: %s others wait for theirs.",
                dag_run.run_id, dag_run.dag_id, WAITING,
            )  # fmt: skip
            return
        with self._lock:
            if self._writer is None or not self._writer.is_alive():
                self._writer = threading.Thread(target=self._write, daemon=True)
                self._writer.start()

    def _write(self) -> None:
        while True:
            dag_id, dag_run_id = self._ended.get()
            try:
                write(dag_id, dag_run_id)
            except Exception as error:  # noqa: BLE001  # a note is never worth more than a log line
                log.warning(
                    "Run %s of DAG %s gets no note (%s). Its figures are the return value of its "
                    "report task.",
                    dag_run_id,
                    dag_id,
                    type(error).__name__,
                )
            finally:
                self._ended.task_done()


def write(dag_id: str, dag_run_id: str) -> None:
    """Write the note of an Airflow run, unless a person has written one or no job was run."""
    from airflow.models.dagrun import DagRun
    from airflow.utils.session import create_session

    text = _text(dag_id, dag_run_id)
    if text is None:
        return
    with create_session() as session:
        found = session.query(DagRun).filter_by(dag_id=dag_id, run_id=dag_run_id).one_or_none()
        if found is not None and _may_write(found.dag_run_note):
            found.note = text


def _may_write(existing: DagRunNote | None) -> bool:
    """Tell whether there is no note, or one that no person has written or changed."""
    from include.run_note import is_ours

    return existing is None or (existing.user_id is None and is_ours(existing.content))


def _text(dag_id: str, dag_run_id: str) -> str | None:
    from include import participants
    from include.report import run_report
    from include.run_note import note
    from llm_batch import connections

    ledger = connections.ledger()
    try:
        run = participants.newest_run(ledger, dag_id, dag_run_id)
        return None if run is None else note(run, run_report(run, ledger))
    finally:
        ledger.engine.dispose()


def _load() -> None:
    """Import what the writer needs, here: an executor that forks while it imports would hang."""
    import include.participants
    import include.report
    import include.run_note  # noqa: F401

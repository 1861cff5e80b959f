"""Run a job over a range of days through Airflow's own backfill, and wait for the runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from typing import Any

from include.errors import ConfigurationError, TransientError
from include.local_stack.rest import (
    FINAL_RUN_STATES,
    AirflowClient,
    Backfill,
    DagRun,
    wait_until,
)

CREATE_TIMEOUT = 60.0  # seconds


@dataclass(frozen=True)
class Days:
    """A job and the first and last day (UTC, both included) that it shall process."""

    job: str
    first: date
    last: date

    @property
    def bounds(self) -> tuple[datetime, datetime]:
        """Logical dates of the first and the last day."""
        return _midnight(self.first), _midnight(self.last)

    @property
    def count(self) -> int:
        """How many days."""
        return (self.last - self.first).days + 1


def start_backfill(
    client: AirflowClient, days: Days, conf: Mapping[str, Any], *, replace: bool = False
) -> None:
    """Create the backfill of these days and let the scheduler begin with it.

    Days that are already done run again: what they loaded stays loaded and is not paid again.
    A backfill of the job that still has unfinished runs is an error, unless `replace`.

    The DAG is paused while the runs are created. On SQLite, Airflow 3.3.2 commits them one by
    one; a scheduler that takes the first while the API rolls the others back, dies.
    """
    client.set_paused(days.job, paused=True)
    try:
        for earlier in client.active_backfills(days.job):
            _close(client, days.job, earlier, replace=replace)
        _create(client, days, conf)
    finally:
        client.set_paused(days.job, paused=False)


def wait_for_days(
    client: AirflowClient,
    days: Days,
    *,
    seconds: float,
    watch: Callable[[list[DagRun]], None] = lambda _runs: None,
) -> list[DagRun]:
    """Wait until the run of every day is final; `watch` sees all runs at every poll.

    Returns the runs, oldest first. Raises `WaitTimeoutError` after `seconds`.
    """

    def all_final() -> list[DagRun] | None:
        runs = client.runs(days.job, *days.bounds)
        watch(runs)
        final = [run for run in runs if run.state in FINAL_RUN_STATES]
        return runs if len(final) == len(runs) >= days.count else None

    return wait_until(f"{days.count} runs of {days.job}", seconds, all_final, interval=1.0)


def _close(client: AirflowClient, job: str, earlier: Backfill, *, replace: bool) -> None:
    runs = client.runs(job, earlier.first, earlier.last)
    unfinished = [run.run_id for run in runs if run.state not in FINAL_RUN_STATES]
    if unfinished and not replace:
        msg = f"backfill {earlier.id} of {job} still runs ({len(unfinished)} unfinished runs): "
        raise ConfigurationError(msg + "wait for it, or cancel it in the UI")
    # Airflow marks a finished backfill complete only every 30 s and allows one per DAG.
    client.cancel_backfill(earlier.id)


def _create(client: AirflowClient, days: Days, conf: Mapping[str, Any]) -> None:
    def created() -> bool:
        try:
            client.create_backfill(days.job, *days.bounds, conf=conf)
        except TransientError:
            # SQLite was locked. Airflow may leave a backfill without runs behind: end it.
            for broken in client.active_backfills(days.job):
                client.cancel_backfill(broken.id)
            return False
        return True

    wait_until(f"a backfill of {days.job}", CREATE_TIMEOUT, created)


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time(), UTC)

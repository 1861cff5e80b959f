"""Run a job over a range of days through Airflow's own backfill, and wait for the runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

from include.backfill_estimate import Interval
from include.errors import ConfigurationError, TransientError
from include.figures import counted
from include.local_stack.rest import (
    FINAL_RUN_STATES,
    AirflowClient,
    Backfill,
    DagRun,
    wait_until,
)

CREATE_TIMEOUT = 60.0  # seconds
REPROCESS = ("none", "failed", "completed")
# How far to look for the logical date after the last one: it is where the last interval ends.
LOOK_AHEAD = (timedelta(days=2), timedelta(days=40), timedelta(days=400))
DAYS_AT_ONCE = 60  # polled once a second; more of them less often


@dataclass(frozen=True)
class Days:
    """A job and the first and last day (both included, in `timezone`) to process."""

    job: str
    first: date
    last: date
    timezone: str = "UTC"

    @property
    def bounds(self) -> tuple[datetime, datetime]:
        """The first and the last moment of these days, aware."""
        return self._midnight(self.first), self._midnight(
            self._next(self.last)
        ) - timedelta.resolution

    @property
    def count(self) -> int:
        """How many days."""
        return (self.last - self.first).days + 1

    def _midnight(self, day: date) -> datetime:
        return datetime.combine(day, time(), ZoneInfo(self.timezone)).astimezone(UTC)

    @staticmethod
    def _next(day: date) -> date:
        return day + timedelta(days=1)


@dataclass(frozen=True)
class How:
    """How Airflow goes about a backfill.

    `reprocess` says which days run that have a run already: none of them, those whose run has
    failed, or all. `replace` ends an unfinished backfill of the job instead of refusing.
    """

    reprocess: str = "completed"
    backwards: bool = False
    max_active_runs: int = 10
    replace: bool = False


USUAL = How()


def start_backfill(
    client: AirflowClient, days: Days, conf: Mapping[str, Any], how: How = USUAL
) -> list[datetime]:
    """Create the backfill of these days, let the scheduler begin, and return its logical dates.

    Days that are already done run again: what they loaded stays loaded and is not paid again.
    A backfill of the job that still has unfinished runs is an error, unless `how.replace`.

    The DAG is paused while the runs are created. On SQLite, Airflow 3.3.2 commits them one by
    one; a scheduler that takes the first while the API rolls the others back, dies.
    """
    client.set_paused(days.job, paused=True)
    try:
        for earlier in client.active_backfills(days.job):
            _close(client, days.job, earlier, replace=how.replace)
        dates = client.backfill_dates(days.job, *days.bounds, reprocess=how.reprocess)
        if not dates:
            raise ConfigurationError(
                f"{days.job} has nothing to run from {days.first} to {days.last}: the days are "
                f"not over, or have runs that reprocess={how.reprocess} leaves alone."
            )
        _create(client, days, conf, how)
    finally:
        client.set_paused(days.job, paused=False)
    return dates


def wait_for_runs(
    client: AirflowClient,
    job: str,
    dates: Sequence[datetime],
    *,
    seconds: float,
    watch: Callable[[list[DagRun]], None] = lambda _runs: None,
) -> list[DagRun]:
    """Wait until the runs of these logical dates are final; `watch` sees them at every poll.

    Returns the runs, oldest first. Raises `WaitTimeoutError` after `seconds`.
    """
    wanted = set(dates)

    def all_final() -> list[DagRun] | None:
        found = client.runs(job, dates[0], dates[-1])
        runs = [run for run in found if run.date in wanted]
        watch(runs)
        final = [run for run in runs if run.state in FINAL_RUN_STATES]
        return runs if len(final) == len(runs) >= len(wanted) else None

    interval = max(1.0, len(wanted) / DAYS_AT_ONCE)
    return wait_until(
        f"{counted(len(wanted), 'run')} of {job}", seconds, all_final, interval=interval
    )


def intervals_of(
    client: AirflowClient, days: Days, *, reprocess: str = "completed"
) -> list[Interval]:
    """The data intervals that a backfill of these days would run now, oldest first.

    Airflow tells where each begins; it ends where the next one does. When there is no next one
    yet, the last is taken to be as long as the one before it, or a day.
    """
    first, last = days.bounds
    dates = client.backfill_dates(days.job, first, last, reprocess=reprocess)
    if not dates:
        return []
    all_dates = client.backfill_dates(days.job, first, last)
    ends = dict(pairwise([*all_dates, _date_after(client, days, all_dates)]))
    return [(start, ends[start]) for start in dates]


def _date_after(client: AirflowClient, days: Days, dates: Sequence[datetime]) -> datetime:
    last = dates[-1]
    for ahead in LOOK_AHEAD:
        later = client.backfill_dates(days.job, last, last + ahead)
        if len(later) > 1:
            return later[1]
    length = last - dates[-2] if len(dates) > 1 else timedelta(days=1)
    return last + length


def hold(client: AirflowClient, job: str, *, paused: bool) -> int:
    """Let the job's backfill begin no more runs, or let it go on; the number of its open runs."""
    backfill = _only(client, job)
    client.pause_backfill(backfill.id, paused=paused)
    return len(_unfinished(client, job, backfill))


def cancel(client: AirflowClient, job: str) -> int:
    """End the job's backfill and stop its spend; returns how many running runs were ended.

    Airflow itself lets running runs go on. They are marked as failed here, which cancels their
    batches; what those have done is kept, and a backfill with reprocess=failed goes on from there.
    """
    backfill = _only(client, job)
    client.cancel_backfill(backfill.id)
    running = [run for run in _unfinished(client, job, backfill) if run.is_backfill]
    for run in running:
        client.mark_run(job, run.run_id, "failed")
    return len(running)


def _only(client: AirflowClient, job: str) -> Backfill:
    found = client.active_backfills(job)
    if not found:
        raise ConfigurationError(f"{job} has no backfill that runs.")
    return found[0]


def _unfinished(client: AirflowClient, job: str, backfill: Backfill) -> list[DagRun]:
    runs = client.runs(job, backfill.first, backfill.last)
    return [run for run in runs if run.state not in FINAL_RUN_STATES]


def _close(client: AirflowClient, job: str, earlier: Backfill, *, replace: bool) -> None:
    unfinished = _unfinished(client, job, earlier)
    if unfinished and not replace:
        left = counted(len(unfinished), "unfinished run")
        msg = f"backfill {earlier.id} of {job} still runs ({left}): "
        raise ConfigurationError(msg + "wait for it, or cancel it: make backfill DO=cancel")
    # Airflow marks a finished backfill complete only every 30 s and allows one per DAG.
    client.cancel_backfill(earlier.id)


def _create(client: AirflowClient, days: Days, conf: Mapping[str, Any], how: How) -> None:
    def created() -> bool:
        try:
            client.create_backfill(
                days.job,
                *days.bounds,
                reprocess=how.reprocess,
                max_active_runs=how.max_active_runs,
                backwards=how.backwards,
                conf=conf,
            )
        except TransientError:
            # SQLite was locked. Airflow may leave a backfill without runs behind: end it.
            for broken in client.active_backfills(days.job):
                client.cancel_backfill(broken.id)
            return False
        return True

    wait_until(f"a backfill of {days.job}", CREATE_TIMEOUT, created)

"""What happens right now, a line per day: rewritten in place on a terminal, else now and then."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import TextIO

from include.errors import TransientError
from include.figures import counted, money
from include.ledger import Ledger
from include.ledger_records import Batch, BatchState, Run
from include.local_stack.rest import FINAL_RUN_STATES, DagRun

PLAIN_INTERVAL = 5.0  # seconds between printed lines when there is no terminal


@dataclass(frozen=True)
class DayProgress:
    """How far the run of one day is; requests are those of its current round."""

    day: str
    state: str
    round: int
    done: int
    failed: int
    requests: int
    cost: Decimal

    def __str__(self) -> str:
        """One line."""
        head = f"{self.day}  {self.state:<8}"
        if not self.round:
            return head.rstrip()
        return (
            f"{head}  round {self.round}  {self.done:>6} done {self.failed:>5} failed "
            f"of {self.requests:<6}  {money(self.cost)}"
        )


class Progress:
    """The progress of a job's runs since a moment, from the ledger; a run that is over is kept."""

    def __init__(self, ledger: Ledger, job: str, since: datetime) -> None:
        self._ledger, self._job, self._since = ledger, job, since
        self._over: dict[str, DayProgress] = {}

    def of(self, runs: Sequence[DagRun]) -> list[DayProgress]:
        """The progress of every Airflow run; [] while the ledger is busy."""
        try:
            known = newest_runs(self._ledger, self._job, self._since)
            return [self._day(run, known) for run in runs]
        except TransientError:
            return []

    def _day(self, run: DagRun, known: Mapping[datetime, Run]) -> DayProgress:
        if run.run_id in self._over:
            return self._over[run.run_id]
        found = _day(self._ledger, run, known)
        if run.state in FINAL_RUN_STATES:
            self._over[run.run_id] = found
        return found


def newest_runs(ledger: Ledger, job: str, since: datetime) -> dict[datetime, Run]:
    """The newest ledger run of each partition of a job, by the start of its interval.

    Runs that were done before `since` belong to an earlier backfill and are left out.
    """
    runs = [run for run in ledger.runs(job) if run.done_at is None or run.done_at >= since]
    return {run.interval_start: run for run in reversed(runs)}


def interval_start(run: DagRun) -> datetime | None:
    """Where the data interval of an Airflow run begins, aware UTC."""
    return datetime.fromisoformat(run.interval_start) if run.interval_start else None


class Screen:
    """Shows lines of progress; `out` is a terminal or anything else."""

    def __init__(self, out: TextIO = sys.stdout) -> None:
        self._out = out
        self._in_place = out.isatty()
        self._shown: dict[str, str] = {}
        self._height = 0
        self._next = 0.0

    def show(self, days: Sequence[DayProgress]) -> None:
        """Show the newest state."""
        if self._in_place:
            self._rewrite(days)
        elif days and time.monotonic() >= self._next:
            self._append(days)
            self._next = time.monotonic() + PLAIN_INTERVAL

    def _append(self, days: Sequence[DayProgress]) -> None:
        for one in days:
            line = str(one)
            if self._shown.get(one.day) != line:
                self._shown[one.day] = line
                print(line, file=self._out, flush=True)

    def _rewrite(self, days: Sequence[DayProgress]) -> None:
        lines = _fitting(days, max(shutil.get_terminal_size().lines - 3, 3))
        up = f"\x1b[{self._height}F" if self._height else ""
        text = "".join(f"\x1b[K{line}\n" for line in lines)
        print(f"{up}{text}\x1b[J", end="", file=self._out, flush=True)
        self._height = len(lines)


def _fitting(days: Sequence[DayProgress], height: int) -> list[str]:
    """At most `height` lines: those that still move come first when there are too many."""
    if len(days) <= height:
        return [str(one) for one in days]
    moving = sorted(days, key=lambda one: (one.state in FINAL_RUN_STATES, one.day))
    shown = [str(one) for one in moving[: height - 1]]
    done = sum(one.state in FINAL_RUN_STATES for one in days)
    return [*shown, f"... {done} of {counted(len(days), 'day')} are done"]


def _day(ledger: Ledger, dag_run: DagRun, known: Mapping[datetime, Run]) -> DayProgress:
    start = interval_start(dag_run)
    run = known.get(start) if start else None
    batches = [] if run is None else ledger.batches(run.run_id)
    number = max((batch.round for batch in batches), default=0)
    current = [batch for batch in batches if batch.round == number]
    return DayProgress(
        day=f"{start:%Y-%m-%d}" if start else dag_run.run_id,
        state=dag_run.state,
        round=number,
        done=sum(_done(batch) for batch in current),
        failed=sum(_failed(batch) for batch in current),
        requests=sum(batch.requests for batch in current),
        cost=sum((batch.cost_usd or Decimal(0) for batch in batches), Decimal(0)),
    )


def _done(batch: Batch) -> int:
    """Answered requests: what the API counts, and once collected what we count."""
    return batch.succeeded if batch.state == BatchState.COLLECTED else batch.done_requests


def _failed(batch: Batch) -> int:
    if batch.state == BatchState.COLLECTED:
        return batch.retry + batch.failed
    return batch.failed_requests

"""One job over some days on a running stack: start, watch, add up, judge."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy.engine import Engine

from include.artifacts import Artifacts
from include.backfill_estimate import IntervalEstimate, estimate_intervals
from include.budgets import check_priced
from include.cost import known_total
from include.estimates import Estimates
from include.figures import counted, money, noun
from include.job_spec import JobSpec, load_job, with_overrides
from include.ledger import Ledger
from include.local_stack import showing
from include.local_stack.backfill import (
    Days,
    How,
    intervals_of,
    start_backfill,
    wait_for_runs,
)
from include.local_stack.databases import artifacts_of, engine_of, target_of
from include.local_stack.environment import LEDGER_DB, jobs_root
from include.local_stack.estimate_table import estimate_lines
from include.local_stack.progress import Progress, Screen
from include.local_stack.rest import AirflowClient, DagRun
from include.local_stack.summary import DaySummary, Summarizer, table_text
from include.local_stack.task_errors import error_lines
from include.object_storage import remote_path
from include.source_place import SourcePlace

BILL_TIMEOUT = 30.0  # seconds


@dataclass(frozen=True)
class Session:
    """What is needed to run a job and to read back what it did."""

    client: AirflowClient
    spec: JobSpec
    jobs: Path
    ledger: Ledger
    artifacts: Artifacts
    source: Callable[[], SourcePlace]
    target: Engine | Artifacts
    logs: Path
    simulator_url: str | None

    @classmethod
    def open(
        cls,
        client: AirflowClient,
        job: str,
        env: Mapping[str, str],
        *,
        logs: Path,
        simulator_url: str | None,
    ) -> Session:
        """A session for `job`, its databases found through the connections in `env`."""
        spec = load_job(job, jobs_root(env))
        return cls(
            client=client,
            spec=spec,
            jobs=jobs_root(env),
            ledger=Ledger(engine_of(env, LEDGER_DB.removeprefix("AIRFLOW_CONN_"))),
            artifacts=artifacts_of(env),
            source=lambda: engine_of(env, spec.source.conn_id) if spec.source.sql else remote_path,
            target=target_of(env, spec),
            logs=logs,
            simulator_url=simulator_url,
        )

    def estimate(
        self, days: Days, *, conf: Mapping[str, Any], reprocess: str
    ) -> list[IntervalEstimate]:
        """Print and return what these days would send and cost; nothing is sent.

        Raises `ConfigurationError` at the end when the runs would not start without a price.
        """
        spec = with_overrides(self.spec, model=conf.get("model"), sample=None)
        found: list[IntervalEstimate] = []

        def kept() -> Iterator[IntervalEstimate]:
            intervals = intervals_of(self.client, days, reprocess=reprocess)
            for one in estimate_intervals(
                spec,
                intervals,
                self.source(),
                self.target,
                Estimates(self.ledger, spec),
                include_failures=not conf.get("redrive"),
                root=self.jobs,
            ):
                found.append(one)
                yield one

        for line in estimate_lines(kept()):
            print(line, flush=True)
        check_priced(spec)
        return found

    def process(
        self,
        days: Days,
        *,
        conf: Mapping[str, Any],
        seconds: float,
        how: How,
        keep_running: Callable[[], None] = lambda: None,
    ) -> bool:
        """Backfill, show progress, print what came of it; True when no row is missing."""
        began = datetime.now(UTC)
        dates = start_backfill(self.client, days, conf, how)
        first, last = (f"{one:%Y-%m-%d %H:%M}" for one in (dates[0], dates[-1]))
        print(f"{counted(len(dates), 'run')} of {days.job}, from {first} to {last} UTC")
        screen, progress = Screen(), Progress(self.ledger, days.job, began)

        def watch(runs: list[DagRun]) -> None:
            keep_running()
            screen.show(progress.of(runs))

        runs = wait_for_runs(self.client, days.job, dates, seconds=seconds, watch=watch)
        return self._report(len(dates), runs, began)

    def _report(self, count: int, runs: Sequence[DagRun], began: datetime) -> bool:
        summarizer = Summarizer(self.spec, self.ledger, self.artifacts, self.target)
        found = summarizer.days(runs, began)
        print(f"\n{table_text(found)}\n")
        self._print_reasons()
        self._print_bill()
        self._print_rows()
        whole = self._judge(count, found)
        if not whole:
            self._print_errors(runs)
        return whole

    def _print_reasons(self) -> None:
        reasons = showing.failure_reasons(self.target, self.spec)
        if reasons:
            listed = ", ".join(f"{count} {name}" for name, count in reasons.items())
            print(f"Rows in {self.spec.target.failures_place} by reason: {listed}\n")

    def _print_bill(self) -> None:
        if self.simulator_url is None:
            return
        bill = simulator_bill(self.simulator_url)
        ours = known_total(
            batch.cost_usd
            for run in self.ledger.runs()
            for batch in self.ledger.batches(run.run_id)
        )
        print(
            "The simulator's own bill, all runs so far: "
            f"{counted(bill['batches'], 'batch')}, {counted(bill['requests'], 'paid answer')}, "
            f"${bill['cost_usd']}; the ledger says {money(ours)}\n"
        )

    def _print_rows(self) -> None:
        target = self.spec.target
        print(f"{target.results_place}:\n{showing.result_rows(self.target, self.spec)}\n")
        print(f"{target.failures_place}:\n{showing.failure_rows(self.target, self.spec)}\n")

    def _print_errors(self, runs: Sequence[DagRun]) -> None:
        for line in error_lines(self.client, self.logs, self.spec.name, runs):
            print(line)
        print(f"Task logs are below {self.logs}")

    def _judge(self, count: int, found: Sequence[DaySummary]) -> bool:
        problems = [problem for one in found for problem in one.problems]
        if len(found) < count:
            problems.append(
                f"{counted(count, 'run was', 'runs were')} asked for, but {len(found)} found"
            )
        for problem in problems:
            print(f"WRONG  {problem}")
        if problems:
            return False
        rows = sum(one.rows for one in found)
        print(
            f"Nothing is missing: {counted(rows, 'row')} of {counted(len(found), 'day')} "
            f"{noun(rows, 'is', 'are')} loaded, failed with a reason, or reused."
        )
        return True


def simulator_bill(url: str) -> dict[str, Any]:
    """What the simulator at `url` would charge: `batches`, `requests`, `cost_usd`, ..."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/_sim/bill", timeout=BILL_TIMEOUT) as response:
        bill: dict[str, Any] = json.load(response)
    return bill

"""One job over some days on a running stack: start, watch, add up, judge."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy.engine import Engine

from include.artifacts import Artifacts
from include.job_spec import JobSpec, load_job
from include.ledger import Ledger
from include.local_stack import showing
from include.local_stack.backfill import Days, start_backfill, wait_for_days
from include.local_stack.databases import artifacts_of, engine_of, target_of
from include.local_stack.environment import LEDGER_DB, jobs_root
from include.local_stack.progress import Screen, progress_of
from include.local_stack.rest import AirflowClient, DagRun
from include.local_stack.summary import DaySummary, Summarizer, money, table_text, total_of

BILL_TIMEOUT = 30.0  # seconds


@dataclass(frozen=True)
class Session:
    """What is needed to run a job and to read back what it did."""

    client: AirflowClient
    spec: JobSpec
    ledger: Ledger
    artifacts: Artifacts
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
            ledger=Ledger(engine_of(env, LEDGER_DB.removeprefix("AIRFLOW_CONN_"))),
            artifacts=artifacts_of(env),
            target=target_of(env, spec),
            logs=logs,
            simulator_url=simulator_url,
        )

    def process(
        self,
        days: Days,
        *,
        conf: Mapping[str, Any],
        seconds: float,
        replace: bool,
        keep_running: Callable[[], None] = lambda: None,
    ) -> bool:
        """Backfill, show progress, print what came of it; True when no row is missing."""
        began = datetime.now(UTC)
        start_backfill(self.client, days, conf, replace=replace)
        screen = Screen()

        def watch(runs: list[DagRun]) -> None:
            keep_running()
            screen.show(progress_of(self.ledger, days.job, runs, began))

        runs = wait_for_days(self.client, days, seconds=seconds, watch=watch)
        return self._report(days, runs, began)

    def _report(self, days: Days, runs: Sequence[DagRun], began: datetime) -> bool:
        summarizer = Summarizer(self.spec, self.ledger, self.artifacts, self.target)
        found = summarizer.days(runs, began)
        print(f"\n{table_text(found)}\n")
        self._print_reasons()
        self._print_bill()
        self._print_rows()
        return self._judge(days, found)

    def _print_reasons(self) -> None:
        reasons = showing.failure_reasons(self.target, self.spec)
        if reasons:
            listed = ", ".join(f"{count} {name}" for name, count in reasons.items())
            print(f"Rows in {self.spec.target.failures_place} by reason: {listed}\n")

    def _print_bill(self) -> None:
        if self.simulator_url is None:
            return
        bill = simulator_bill(self.simulator_url)
        ours = total_of(
            batch.cost_usd
            for run in self.ledger.runs()
            for batch in self.ledger.batches(run.run_id)
        )
        print(
            f"The simulator's own bill, all runs so far: {bill['batches']} batches, "
            f"{bill['requests']} paid answers, ${bill['cost_usd']}; the ledger says {money(ours)}\n"
        )

    def _print_rows(self) -> None:
        target = self.spec.target
        print(f"{target.results_place}:\n{showing.result_rows(self.target, self.spec)}\n")
        print(f"{target.failures_place}:\n{showing.failure_rows(self.target, self.spec)}\n")

    def _judge(self, days: Days, found: Sequence[DaySummary]) -> bool:
        problems = [problem for one in found for problem in one.problems]
        if len(found) < days.count:
            problems.append(
                f"{days.count} days were asked for, but the DAG has {len(found)} runs in them: "
                "days that are not over, or that its schedule leaves out, have none"
            )
        for problem in problems:
            print(f"WRONG  {problem}")
        if problems:
            print(f"Task logs are below {self.logs}")
            return False
        rows = sum(one.rows for one in found)
        print(
            f"All {rows:,} rows of {len(found)} days are loaded, failed with a reason, or reused."
        )
        return True


def simulator_bill(url: str) -> dict[str, Any]:
    """What the simulator at `url` would charge: `batches`, `requests`, `cost_usd`, ..."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/_sim/bill", timeout=BILL_TIMEOUT) as response:
        bill: dict[str, Any] = json.load(response)
    return bill

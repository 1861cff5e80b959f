"""A cluster whose parts are killed while it works: nothing is lost, nothing is doubled.

Celery workers, Redis, PostgreSQL, an S3 server and two triggerers, with the commands and the
environment of docker-compose.yaml. The simulator's own bill has the last word.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import openai
import psutil
import pytest
import sqlalchemy as sa

from include.audit import audit
from include.batch_api import BatchApi
from include.dataset_path import dataset_at
from include.ledger import Ledger
from include.ledger_records import Run
from include.local_stack.component import Component
from include.local_stack.rest import FINAL_RUN_STATES, POLL_INTERVAL, DagRun, wait_until
from include.simulator.process import Simulator
from include.source_tables import TABLES
from tests.system.compose_machine import ComposeMachine, new_databases, new_variables

pytestmark = [
    pytest.mark.system,
    pytest.mark.long,
    pytest.mark.postgres,
    pytest.mark.redis,
]

T = TypeVar("T")
JOBS = {"ticket_triage": "tickets", "commit_labels": "commits"}
FIRST = datetime(2026, 9, 1, tzinfo=UTC)
DAYS = 30
RUNS = DAYS * len(JOBS)
ROWS = 12  # a day and job
PATIENCE = 180 + 30.0 * RUNS  # seconds for everything; half of it should be enough
DAG = """\"Airflow DAG of a cluster test.\"

from datetime import UTC, datetime

from llm_batch.dag import batch_dag

dag = batch_dag("{job}", schedule="@daily", start_date=datetime(2026, 8, 1, tzinfo=UTC))
"""
MOST_TRIGGERS = 4  # of one triggerer
# A cluster waits for minutes where nobody waits for it. Times only: nothing else differs.
SPEED = {
    "AIRFLOW__CORE__PARALLELISM": "16",  # enough for the workers between two looks of the scheduler
    "AIRFLOW__CELERY__WORKER_CONCURRENCY": "2",
    "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "300",
    "AIRFLOW__LLM_BATCH__FIRST_POLL": "3",
    "AIRFLOW__LLM_BATCH__POLL_INTERVAL": "2",
    "AIRFLOW__LLM_BATCH__RETRY_DELAY": "3",
    "AIRFLOW__LLM_BATCH__SUBMIT_GRACE": "2",
    "AIRFLOW__LLM_BATCH__SUBMIT_LEASE": "20",
    "AIRFLOW__LLM_BATCH__BUSY_PAUSE": "3",
    "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "10",
    "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "15",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "30",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "5",
    "AIRFLOW__SCHEDULER__TASK_QUEUED_TIMEOUT": "90",
    "AIRFLOW__SCHEDULER__TASK_QUEUED_TIMEOUT_CHECK_INTERVAL": "10",
    "AIRFLOW__TRIGGERER__CAPACITY": str(MOST_TRIGGERS),
    "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "12",
}
FAULTS: list[dict[str, Any]] = [
    {"id": "row fails once", "fault": "line_error", "fraction": 0.03, "first_times": 1},
    {
        "id": "row is refused",
        "fault": "line_error",
        "status": 400,
        "fraction": 0.01,
        "seed": 7,
    },
    {
        "id": "answer cut off",
        "fault": "cut_off",
        "fraction": 0.01,
        "first_times": 1,
        "seed": 3,
    },
    {"id": "line twice", "fault": "duplicate_line", "fraction": 0.02, "seed": 5},
    {"id": "batch expires", "fault": "expire", "nth": 5, "every": 17, "fraction": 0.5},
    {"id": "batch is slow", "fault": "stuck", "seconds": 6, "nth": 2, "every": 5},
    {
        "id": "answer of POST lost",
        "fault": "reset_after",
        "method": "POST",
        "path": "/batches$",
        "nth": 4,
        "every": 16,
    },
    {
        "id": "POST refused, 429",
        "fault": "fail_before",
        "status": 429,
        "method": "POST",
        "path": "/batches$",
        "nth": 9,
        "every": 23,
        "retry_after": 1,
    },
    {
        "id": "upload fails",
        "fault": "fail_after",
        "method": "POST",
        "path": "/files$",
        "nth": 3,
        "every": 13,
    },
    {"id": "download torn", "fault": "truncate", "nth": 6, "every": 11},
    {
        "id": "listing fails",
        "fault": "fail_before",
        "status": 503,
        "method": "GET",
        "path": "/batches$",
        "nth": 5,
        "every": 9,
    },
]


# More batches than a triggerer takes on, until they are released: both triggerers have some.
HELD = {"id": "held for the triggerer", "fault": "stuck", "times": MOST_TRIGGERS + 3}


@pytest.fixture(scope="module")
def machine(
    tmp_path_factory: pytest.TempPathFactory, postgres_url: str, missing: Callable[[str], None]
) -> Iterator[ComposeMachine]:
    """The running cluster, with 30 days of rows to work on."""
    if not any(Path(one, "redis-server").exists() for one in os.environ["PATH"].split(":")):
        missing("no redis-server on this machine")
    home = tmp_path_factory.mktemp("cluster")
    (home / "dags").mkdir()
    for job in JOBS:
        (home / "dags" / f"{job}.py").write_text(DAG.format(job=job))
    server, variables = sa.make_url(postgres_url), new_variables(home / ".env")
    with (
        new_databases(server, variables["POSTGRES_PASSWORD"]) as names,
        ComposeMachine(
            home / "machine",
            variables=variables,
            server=server,
            databases=names,
            dags=home / "dags",
            extra=SPEED,
        ) as running,
    ):
        yield running


class Cluster:
    """The running machine, and what the test asks it."""

    def __init__(self, machine: ComposeMachine) -> None:
        self.machine = machine
        self.simulator = Simulator(machine.home, [])
        self.simulator.url = machine.url("simulator")
        self.data = machine.engine("llm_batch")
        self.airflow = machine.engine("airflow")
        self.ledger = Ledger(self.data)
        self.kills: list[str] = []

    def fill(self) -> None:
        """Some rows for each day and job, in the tables that the jobs read."""
        for table in JOBS.values():
            key, moment, *texts = (column.name for column in TABLES[table].columns)
            rows = [
                {
                    key: f"{table}-{day:02d}-{number:02d}",
                    moment: FIRST + timedelta(days=day, hours=number),
                }
                | {text: f"{text} of {table} number {day}.{number}" for text in texts}
                for day in range(DAYS)
                for number in range(ROWS)
            ]
            TABLES[table].create(self.data)
            with self.data.begin() as connection:
                connection.execute(sa.insert(TABLES[table]), rows)

    def backfill(self) -> None:
        """Two backfills at once, one of them the last day first."""
        self.simulator.clear_faults()
        self.simulator.add_faults(*FAULTS, HELD)
        last = FIRST + timedelta(days=DAYS - 1)
        for job in JOBS:
            self.wait_until(f"DAG {job}", lambda job=job: self._has(job))  # type: ignore[misc]
            self.machine.client.create_backfill(
                job, FIRST, last, max_active_runs=5, backwards=job == "commit_labels"
            )
            self.machine.client.set_paused(job, paused=False)

    def _has(self, job: str) -> bool:
        return self.machine.client.has_dag(job, since=FIRST)

    def runs(self) -> list[DagRun]:
        last = FIRST + timedelta(days=DAYS - 1)
        return [run for job in JOBS for run in self.machine.client.runs(job, FIRST, last)]

    def done(self) -> int:
        return sum(run.state in FINAL_RUN_STATES for run in self.runs())

    def wait_for_done(self, count: int) -> None:
        self.wait_until(f"{count} finished runs", lambda: self.done() >= count, interval=3)

    def wait_until(
        self, what: str, probe: Callable[[], T | None], *, interval: float = POLL_INTERVAL
    ) -> T:
        """Wait, and start again meanwhile what ends by itself."""

        def found() -> T | None:
            self.machine.keep_running()
            return probe()

        return wait_until(what, PATIENCE, found, interval=interval)

    def kill(self, name: str, what: str) -> None:
        """`kill -9` of a component and all its processes; it is started again at once."""
        component = self.machine.components[name]
        before = component.pid
        component.kill()
        code = component._process.wait() if component._process else None
        self.kills.append(f"{name} (pid {before}, exit code {code}) with {what}")
        assert code == -9
        component.start()
        assert component.pid != before

    def tasks_of(self, worker: str) -> list[psutil.Process]:
        """The processes of a worker that run tasks: children of its pool."""
        return tasks_of(self.machine.components[worker])

    def triggers(self) -> dict[int, int]:
        """Which triggerer has which trigger."""
        query = "SELECT id, triggerer_id FROM trigger WHERE triggerer_id IS NOT NULL"
        with self.airflow.connect() as connection:
            return {row[0]: row[1] for row in connection.execute(sa.text(query))}


def tasks_of(component: Component) -> list[psutil.Process]:
    try:
        pool = psutil.Process(component.pid).children()
        return [task for one in pool for task in one.children()]
    except psutil.NoSuchProcess:
        return []


@pytest.fixture(scope="module")
def cluster(machine: ComposeMachine) -> Cluster:
    return Cluster(machine)


def test_a_cluster_loses_and_doubles_nothing(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 days of two jobs, faults, and `kill -9` of worker, triggerer and scheduler: all zero."""
    cluster.fill()
    cluster.backfill()

    kill_a_triggerer(cluster)
    cluster.wait_for_done(RUNS // 4)
    kill_a_worker(cluster)
    cluster.wait_for_done(RUNS // 2)
    kill_the_scheduler(cluster)
    cluster.wait_for_done(RUNS)

    fired = {rule["id"]: rule["fired"] for rule in cluster.simulator.faults()}
    assert all(fired.values()), fired
    assert Counter(run.state for run in cluster.runs()) == {"success": RUNS}
    lead_to_objects(cluster, monkeypatch)
    found = Verdict.of(cluster)
    with capsys.disabled():
        print(found.text(cluster, fired))
    assert not found.findings
    assert not found.billed_twice
    assert not found.unknown_batches
    assert found.ended == found.rows == RUNS * ROWS
    assert found.ledger_usd == found.bill_usd


def kill_a_worker(cluster: Cluster) -> None:
    """While it runs tasks."""
    running = cluster.wait_until("a task on worker-1", lambda: cluster.tasks_of("worker-1"))
    cluster.kill("worker-1", f"{len(running)} running tasks")


def kill_a_triggerer(cluster: Cluster) -> None:
    """While both have triggers; the triggers of the dead one go to another one."""
    before = cluster.wait_until(
        "triggers on both triggerers",
        lambda: held if len(held := cluster.triggers()) > MOST_TRIGGERS else None,
    )
    assert len(set(before.values())) == 2
    cluster.kill("triggerer-1", f"{len(before)} triggers on both triggerers")

    def moved() -> list[int]:
        now = cluster.triggers()
        return [one for one, owner in before.items() if now.get(one, owner) != owner]

    taken_over = cluster.wait_until("a trigger to be taken over", moved)
    cluster.kills[-1] += f", {len(taken_over)} of them taken over"
    cluster.simulator.release()


def kill_the_scheduler(cluster: Cluster) -> None:
    """While tasks run."""

    def running() -> list[psutil.Process]:
        return [*cluster.tasks_of("worker-1"), *cluster.tasks_of("worker-2")]

    tasks = cluster.wait_until("a running task", running)
    cluster.kill("scheduler", f"{len(tasks)} running tasks")


class Verdict:
    """What the audit and the bill say of everything that the cluster has done."""

    def __init__(self, runs: list[Run], findings: list[str]) -> None:
        self.runs, self.findings = runs, findings
        self.rows = self.ended = self.batches = self.billed_twice = self.unknown_batches = 0
        self.ledger_usd = self.bill_usd = Decimal(0)

    @classmethod
    def of(cls, cluster: Cluster) -> Verdict:
        # The schedule adds a run over yesterday when a DAG is unpaused: it is none of ours.
        until = FIRST + timedelta(days=DAYS)
        runs = [run for run in cluster.ledger.runs() if run.interval_start < until]
        api = BatchApi(openai.OpenAI(api_key="sk-test", base_url=f"{cluster.simulator.url}/v1"))
        artifacts = dataset_at("s3://llm-batch/artifacts")
        verdict = cls(
            runs,
            [
                f"{finding.invariant}: {finding.message}"
                for run in runs
                for finding in audit(run.run_id, cluster.ledger, artifacts, cluster.data, api)
            ],
        )
        verdict._count(cluster)
        return verdict

    def _count(self, cluster: Cluster) -> None:
        known = {
            batch.batch_id: batch
            for run in self.runs
            for batch in cluster.ledger.batches(run.run_id)
        }
        made = [one["id"] for one in cluster.simulator.batches()["batches"]]
        billed = Counter(
            (line["metadata"]["run_id"], line["metadata"]["round"], line["custom_id"])
            for line in cluster.simulator.bill_lines()
            for _ in range(line["billed"])
        )
        self.batches = len(known)
        self.rows = sum(run.rows for run in self.runs)
        self.ended = sum(run.loaded + run.failed + run.reused for run in self.runs)
        self.unknown_batches = len(set(made) ^ set(known))
        self.billed_twice = sum(count > 1 for count in billed.values())
        self.ledger_usd = sum((run.cost_usd or Decimal(0) for run in self.runs), Decimal(0))
        self.bill_usd = Decimal(cluster.simulator.bill()["cost_usd"])

    def text(self, cluster: Cluster, fired: dict[str, int]) -> str:
        """What a person wants to read of it."""
        done = [run for run in self.runs if run.done_at]
        began = min(run.created_at for run in done)
        seconds = (max(run.done_at for run in done if run.done_at) - began).total_seconds()
        size = f"{len(self.runs)} runs of {len(JOBS)} jobs, {self.rows} rows"
        wrong = {
            "audit findings": len(self.findings),
            "rows lost": self.rows - self.ended,
            "billed twice": self.billed_twice,
            "batches unknown to ledger or API": self.unknown_batches,
        }
        lines = [
            f"{size}, {self.batches} batches in {seconds:.0f} s",
            *(f"killed: {kill}" for kill in cluster.kills),
            f"faults: {_listed(fired)}",
            _listed(wrong),
            f"the ledger says ${self.ledger_usd}, the bill ${self.bill_usd}",
            *self.findings[:20],
        ]
        return "\n".join(["", *lines])


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def lead_to_objects(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `s3://` lead to the S3 server, as for a process beside the cluster."""
    for name, value in cluster.machine.environment("worker").items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)

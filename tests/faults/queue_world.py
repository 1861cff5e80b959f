"""A request queue without Airflow: applications, the drain, and the runs that it takes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from include import ledger_tables as tables
from include import pipeline, run_mode
from include.ledger_records import Run, RunState
from include.queue_drain import drain
from include.queue_request import QueueRequest
from include.queue_spec import QueueSpec
from include.report import RunReport, run_report
from include.request_queue import RequestQueue
from include.submission import SubmissionPolicy
from tests.faults.world import TEXT, World

NAME = "request_queue"
PATIENT = SubmissionPolicy(grace=1.0, lease=0.0, skew=10.0, busy_pause=0.05, file_pause=0.05)


def queue_spec(**changes: Any) -> QueueSpec:
    """A queue with small batches; `changes` replace top-level parts."""
    parts: dict[str, Any] = {
        "name": NAME,
        "source": {"queue": {"min_requests": 1}},
        "limits": {"requests_per_batch": 700},
    }
    return QueueSpec.model_validate(parts | changes)


def request(number: int) -> QueueRequest:
    """Request `number`: one of three groups, with a text that the simulator repeats."""
    text = f"{TEXT} {number}"
    if number % 3 == 0:
        body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": text}]}
        return QueueRequest(f"r{number}", "/v1/chat/completions", body)
    if number % 3 == 1:
        body = {"model": "gpt-5-mini", "input": text}
        return QueueRequest(f"r{number}", "/v1/responses", body, priority=number % 2)
    row = {"subject": text, "body": text, "channel": "mail", "customer_tier": "pro"}
    return QueueRequest(f"r{number}", job="ticket_triage", row=row)


@dataclass
class QueueWorld(World):
    """A world whose ledger, queue and target are one database at `url`."""

    url: str = ""
    # Processes of their own on a busy machine: an answer that is merely late is not a lost one.
    policy: SubmissionPolicy = PATIENT
    queue: QueueSpec = field(default_factory=queue_spec)
    asked: list[QueueRequest] = field(default_factory=list)  # what an application puts
    before: frozenset[str] = frozenset()  # batches of other worlds on the same simulator

    def _engine(self, name: str) -> sa.Engine:
        if name not in self._engines:
            engine = sa.create_engine(self.url)
            self.prepare(engine)
            self._engines[name] = engine
        return self._engines[name]

    def target(self) -> sa.Engine:
        """The queue is the target."""
        return self.ledger().engine

    def application(self) -> RequestQueue:
        """What an application has."""
        return RequestQueue(self._engine("application"), jobs_root=self.jobs)

    def drain(self, *, everything: bool = True) -> list[Run]:
        """Take what waits, and return the runs to start."""
        return drain(
            self.ledger(), self.queue, dag_id=NAME, everything=everything, jobs_root=self.jobs
        )

    def open_runs(self) -> list[Run]:
        """What Airflow still has to finish: it tries again what was killed."""
        return [one for one in self.ledger().runs(NAME) if one.state == RunState.OPEN]

    def process(self, run: Run) -> Run:
        """Do what the graph does for one run, or what is left of it."""
        ledger = self.ledger()
        run = pipeline.extract(run, ledger, self.artifacts(), lambda: ledger.engine)
        for number in range(1, self.queue.retry.rounds + 1):
            if not self.round(run, number, ledger):
                break
        return pipeline.load(ledger.run(run.run_id), ledger, self.artifacts(), self.target)

    def drain_and_process(self) -> list[Run]:
        """One drain and all that it starts."""
        return [self.process(run) for run in self.drain()]

    def run(self, *, mode: str = run_mode.NORMAL) -> RunReport:
        """Put, drain, and do all that is open: what applications and Airflow do again and again.

        Returns the report of the last run. A queue has no other `mode` than the normal one.
        """
        ledger = self.ledger()
        self.application().put_many(self.asked)
        self.drain()
        for run in self.open_runs():
            self.process(run)
        self.run_ids = [one.run_id for one in ledger.runs(NAME)]
        return run_report(ledger.run(self.run_ids[-1]), ledger)

    def rows(self) -> dict[str, dict[str, Any]]:
        """The queue's table by request_id."""
        with self.ledger().engine.connect() as connection:
            found = connection.execute(sa.select(tables.queue)).mappings()
            return {row["request_id"]: dict(row) for row in found}

    def problems(self) -> list[str]:
        """What is wrong once all has ended: something lost, doubled, swapped or billed amiss."""
        rows = self.rows()
        billed: Counter[str] = Counter()
        for line in self.simulator.bill_lines():
            if line["batch_id"] not in self.before:
                billed[line["custom_id"]] += line["billed"]
        sent = {one["custom_id"]: name for name, one in rows.items() if one["custom_id"]}
        bills = [
            one for one in self.simulator.bill()["by_batch"] if one["batch_id"] not in self.before
        ]
        total = sum((Decimal(one["cost_usd"]) for one in bills), Decimal(0))
        ours = sum((one["cost_usd"] or Decimal(0) for one in rows.values()), Decimal(0))
        found = [f"{name} is {one['state']}" for name, one in rows.items() if not one["ended_at"]]
        found += [f"{name} has the answer of another" for name in rows if _is_swapped(rows[name])]
        found += [f"{sent.get(one, one)} was billed {n}" for one, n in billed.items() if n != 1]
        found += [f"{sent[one]} was never billed" for one in sent.keys() - billed.keys()]
        found += [f"nobody asked {one}" for one in billed.keys() - sent.keys()]
        return found + ([f"${ours} are not the bill's ${total}"] if ours != total else [])


def _is_swapped(row: dict[str, Any]) -> bool:
    """The simulator repeats a short text; an answer with a schema is made of the text's words."""
    number = row["request_id"].removeprefix("r")
    if row["state"] != "completed" or not number.isdigit() or row["job"]:
        return False
    return bool(row["answer"] != f"{TEXT} {number}")

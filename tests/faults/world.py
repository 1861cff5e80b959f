"""A whole job without Airflow: source, target, ledger, artifacts, and the simulator.

`World.run()` does what the graph does, step by step, with the product's own functions. It can be
called again after any interruption, as Airflow would call the tasks again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import openai
import sqlalchemy as sa

from include import collecting, pipeline, run_mode, spend_limits
from include.artifacts import Artifacts
from include.batch_api import BatchApi
from include.canary import after_canary, canary_of, judge
from include.job_spec import JOBS_ROOT, JobSpec, with_provider
from include.ledger import Ledger
from include.ledger_records import Batch, Partition, Run
from include.provider import OPENAI, ProviderProfile
from include.report import RunReport, run_report
from include.simulator.process import Simulator
from include.spend_limits import SpendLimit
from include.submission import Submission, SubmissionPolicy, SubmitLaterError
from include.waiting import Verdict, WaitPolicy, look

START = datetime(2026, 11, 1, tzinfo=UTC)
DAY = timedelta(days=1)
EARLIER, LATER = datetime(2000, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)
KEY = "sk-canary-7c1f"  # must never be seen in a log, an error or the ledger
TEXT = "canary-row-text"  # nor this, which begins every row's text
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"type": "string", "enum": ["bug", "question", "praise"]},
        "score": {"type": "number", "minimum": 0, "maximum": 1},
        "urgent": {"type": "boolean"},
    },
    "required": ["kind", "score", "urgent"],
    "additionalProperties": False,
}
# The simulator's clock is ours: a small skew keeps the other worlds' batches out of the pages.
QUICK = SubmissionPolicy(grace=0.02, lease=0.0, skew=2.0, busy_pause=0.02, file_pause=0.02)


def job(**changes: Any) -> JobSpec:
    """A small job over table `notes`; `changes` replace top-level parts."""
    parts: dict[str, Any] = {
        "name": "note_labels",
        "source": {
            "conn_id": "source_db",
            "key": ["note_id"],
            "sql": "SELECT note_id, body FROM notes WHERE written_at >= :interval_start"
            " AND written_at < :interval_end ORDER BY note_id",
        },
        "request": {
            "endpoint": "/v1/chat/completions",
            "model": "gpt-4o-mini",
            "prompt": "Label the note.\n---\n{{ body }}",
            "output_schema": SCHEMA,
            "params": {"max_completion_tokens": 200},
        },
        "target": {"conn_id": "results_db", "table": "note_labels"},
        "limits": {"requests_per_batch": 5},
    }
    return JobSpec.model_validate(parts | changes)


def thrifty_job(**changes: Any) -> JobSpec:
    """The same job with all that saves money: a canary, shared requests and a budget."""
    parts: dict[str, Any] = {
        "canary": {"requests": 2, "max_failure_rate": 0.1},
        "reuse": {"identical": True},
        "budget": {"max_usd": 50, "max_usd_per_month": 100},
    }
    return job(**parts | changes)


@dataclass(frozen=True)
class FirstIsLate(WaitPolicy):
    """The deadline of the first batch passes when it `has` come so far; that of others never.

    Its last call passes at once when it is seen cancelling, with `is_deaf`.
    """

    has: Callable[[Batch], bool] = lambda _batch: True
    is_deaf: bool = False

    def deadline(self, batch: Batch) -> datetime:
        """By what is seen of the batch instead of by the clock."""
        is_first = (batch.round, batch.shard) == (1, 1)
        is_past = is_first and (self.has(batch) or batch.api_status == "cancelling")
        return EARLIER if is_past else LATER

    def last_call(self, batch: Batch) -> datetime:
        """Likewise."""
        return EARLIER if self.is_deaf and batch.api_status == "cancelling" else LATER


@dataclass
class World:
    """Everything that one partition needs; `folder` holds its databases and artifacts.

    Worlds of different `day`s have the same rows and so the same requests, but runs of their own:
    each can be compared with another, on one simulator. `prepare` is shown every new engine.
    """

    folder: Path
    simulator: Simulator
    day: int = 0
    spec: JobSpec = field(default_factory=job)
    transport: httpx2.BaseTransport | None = None
    headers: dict[str, str] = field(default_factory=dict)
    policy: SubmissionPolicy = QUICK
    profile: ProviderProfile = OPENAI
    create_timeout: float = 60.0  # seconds: on a busy machine a late answer is not a lost one
    patience: float = 300.0  # seconds that a batch may take
    wait: WaitPolicy = field(default_factory=lambda: WaitPolicy(lost_minutes=0.0))
    jobs: Path = JOBS_ROOT
    limit: SpendLimit | None = None
    prepare: Callable[[sa.Engine], None] = lambda _engine: None
    on_judged: Callable[[], None] = lambda: None
    run_ids: list[str] = field(default_factory=list)
    _is_open: bool = False
    _engines: dict[str, sa.Engine] = field(default_factory=dict)
    _api: BatchApi | None = None

    @property
    def partition(self) -> Partition:
        """The day that this world is about."""
        start = START + self.day * DAY
        return Partition(self.spec.name, start, start + DAY)

    def fill(self, rows: int, *, text: str = TEXT, bodies: int | None = None) -> None:
        """Write `rows` notes into the source, with so many different `bodies` (None: all)."""
        at = (self.partition.start + timedelta(hours=12)).isoformat()
        texts = [f"{text} {n % (bodies or rows)}" for n in range(rows)]
        notes = [{"id": f"n{n:04d}", "at": at, "body": body} for n, body in enumerate(texts)]
        with self.source().begin() as connection:
            connection.exec_driver_sql(
                "CREATE TABLE IF NOT EXISTS notes (note_id TEXT, written_at TEXT, body TEXT)"
            )
            connection.execute(sa.text("INSERT INTO notes VALUES (:id, :at, :body)"), notes)

    def source(self) -> sa.Engine:
        """The source's engine."""
        return self._engine("source")

    def target(self) -> sa.Engine:
        """The target's engine."""
        return self._engine("target")

    def ledger(self) -> Ledger:
        """The ledger."""
        return Ledger(self._engine("ledger"))

    def artifacts(self) -> Artifacts:
        """The artifacts."""
        return Artifacts(self.folder / "artifacts")

    def api(self) -> BatchApi:
        """The API, through `transport` when there is one."""
        if self._api is None:
            transport = self.transport or httpx2.HTTPTransport(verify=False)
            client = openai.OpenAI(
                api_key=KEY,
                base_url=self.simulator.base_url,
                http_client=httpx2.Client(transport=transport),
                default_headers=self.headers,
            )
            self._api = BatchApi(client, create_timeout=self.create_timeout, profile=self.profile)
        return self._api

    def close(self) -> None:
        """Drop all connections to databases, as the end of a process does."""
        for engine in self._engines.values():
            engine.dispose()
        self._engines.clear()

    def _engine(self, name: str) -> sa.Engine:
        if name not in self._engines:
            engine = sa.create_engine(f"sqlite:///{self.folder}/{name}.db")
            self.prepare(engine)
            self._engines[name] = engine
        return self._engines[name]

    def run(self, *, mode: str = run_mode.NORMAL) -> RunReport:
        """Do the whole run, or what is left of it after an interruption."""
        ledger = self.ledger()
        run = self._opened(ledger, mode)
        if self.limit is not None:
            spend_limits.join(ledger, run, self.limit)
        run = pipeline.extract(run, ledger, self.artifacts(), self.source)
        for number in range(1, self.spec.retry.rounds + 1):
            if not self.round(run, number, ledger):
                break
        run = pipeline.load(ledger.run(run.run_id), ledger, self.artifacts(), self.target)
        self._is_open = False
        return run_report(run, ledger)

    def _opened(self, ledger: Ledger, mode: str) -> Run:
        """Open the run, once: later tasks know its id from the first."""
        if self._is_open:
            return ledger.run(self.run_ids[-1])
        run = pipeline.open_run(
            ledger,
            with_provider(self.spec, self.profile),
            self.partition,
            mode=mode,
            dag_id=self.spec.name,
            dag_run_id="in-process",
        )
        self._is_open = True
        self.run_ids.append(run.run_id)
        return run

    def round(self, run: Run, number: int, ledger: Ledger) -> bool:
        """Do one round; False when nothing is open."""
        batches = pipeline.build(
            ledger.run(run.run_id),
            number,
            ledger,
            self.artifacts(),
            self.target,
            most_shards=1024,
            jobs_root=self.jobs,
            profile=self.profile,
        )
        run = ledger.run(run.run_id)
        for batch in self._canary(run, batches, ledger) if number == 1 else batches:
            self.shard(batch, ledger)
        if batches:
            pipeline.settle(run, number, ledger, self.api(), self.policy)
        return bool(batches)

    def _canary(self, run: Run, batches: list[Batch], ledger: Ledger) -> list[Batch]:
        """Send the canary of the first round and judge it; return what goes after it."""
        canary = pipeline.pinned(run).canary
        first = canary_of(batches, canary)
        if first is not None:
            self.shard(first, ledger)
            judge(run, ledger)
            self.on_judged()
        return after_canary(batches, canary)

    def shard(self, batch: Batch, ledger: Ledger) -> None:
        """Submit, wait and collect one request file."""
        until = time.monotonic() + self.patience
        while True:
            self.submit(batch, ledger)
            verdict = look(ledger.batch(batch.submission_id), ledger, self.api(), self.wait)
            if verdict is Verdict.OVER:
                break
            if time.monotonic() > until:
                raise TimeoutError(f"{batch} has not ended")
            time.sleep(0.01)
        collecting.collect(ledger.batch(batch.submission_id), ledger, self.artifacts(), self.api())

    def submit(self, batch: Batch, ledger: Ledger) -> None:
        """Submit, and come back while a limit is reached."""
        submission = Submission(ledger, self.api(), self.artifacts(), self.policy)
        until = time.monotonic() + self.patience
        while time.monotonic() < until:
            try:
                submission.submit(
                    batch.submission_id, enqueued_tokens=self.spec.limits.enqueued_tokens
                )
            except SubmitLaterError as later:
                time.sleep(min(later.retry_after or 0.0, 0.1))
            else:
                return
        raise TimeoutError(f"{batch} never got its turn")

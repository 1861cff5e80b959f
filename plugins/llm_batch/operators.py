"""One operator per step of a run; each is one verb, short, and safe to run again.

XCom carries ids and counts only. What a step needs to know it reads from the ledger, with the spec
that the run was opened with.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator, conf
from airflow.sdk.exceptions import AirflowSkipException

from include.job_spec import load_job, with_overrides
from llm_batch import connections
from llm_batch.links import BatchLink

if TYPE_CHECKING:
    from airflow.sdk import Context

    from include.ledger_records import Batch, Partition
    from include.submission import SubmitLaterError

SHORTEST_DEFERRAL = 10.0  # seconds; see BatchTrigger.run


class BatchOperator(BaseOperator):
    """What the steps have in common: each tells how much memory it took."""

    def post_execute(self, context: Context, result: Any = None) -> None:
        """Log the peak, so that a worker's size can be chosen from what runs really took."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
        megabytes = peak // (1 << 20 if sys.platform == "darwin" else 1 << 10)
        self.log.info("Peak memory of this task's process: %s MB.", megabytes)


class RunOperator(BatchOperator):
    """A step of the run that `run` names: a dict with `run_id`, as `ExtractOperator` returns."""

    template_fields: Sequence[str] = ("run",)

    def __init__(self, *, run: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.run = run


class RoundOperator(RunOperator):
    """A step of one round of the run; rounds count from 1."""

    def __init__(self, *, round_number: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.round_number = round_number


class ExtractOperator(BatchOperator):
    """Opens the run of this data interval, or joins the open one, and writes its snapshot.

    Returns `{"run_id", "rows"}`. Airflow params `model`, `sample`, `redrive` and `force` change
    the run; a changed model or sample is a run of its own in the ledger.
    """

    ui_color = "#f1f3f4"

    def __init__(self, *, job: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.job = job

    def execute(self, context: Context) -> dict[str, Any]:
        """Open, then extract."""
        from include import pipeline

        params = context["params"]
        spec = with_overrides(
            load_job(self.job, connections.jobs_root()),
            model=params.get("model"),
            sample=params.get("sample"),
        )
        ledger = connections.ledger()
        run = pipeline.open_run(
            ledger,
            spec,
            partition(self.job, context),
            mode=_mode(params),
            dag_id=self.dag_id,
            dag_run_id=context["run_id"],
        )
        source = spec.source.conn_id
        run = pipeline.extract(
            run, ledger, connections.artifacts(), lambda: connections.engine(source)
        )
        return {"run_id": run.run_id, "rows": run.rows}


class BuildRequestsOperator(RoundOperator):
    """Writes the request files of one round; skips itself, and the round, when nothing is open.

    Returns one dict per shard: `submission_id`, `shard`, `requests`, `enqueued_tokens`.
    """

    ui_color = "#f1f3f4"

    def execute(self, context: Context) -> list[dict[str, Any]]:
        """Build, or skip."""
        from include import pipeline

        ledger = connections.ledger()
        run = ledger.run(self.run["run_id"])
        spec = pipeline.pinned(run)
        batches = pipeline.build(
            run,
            self.round_number,
            ledger,
            connections.artifacts(),
            lambda: connections.target(spec),
            most_shards=conf.getint("core", "max_map_length", fallback=1024),
            jobs_root=connections.jobs_root(),
        )
        if not batches:
            raise AirflowSkipException(f"Round {self.round_number}: no row is open.")
        return [shard(one, spec.limits.enqueued_tokens) for one in batches]


class SubmitBatchOperator(BatchOperator):
    """Creates exactly one batch for one request file, or finds the one that exists.

    `submission` is one of the dicts of `BuildRequestsOperator`. In a DAG of your own, give
    `request_file` (a JSONL file that follows the Batch API) and `openai_conn_id` instead.
    Ends when the API has the batch; never waits for it. While a limit is reached it defers itself
    (`deferrable=False`: sleeps), which uses up no retry. Returns `submission` with `batch_id`.
    """

    template_fields: Sequence[str] = ("submission", "request_file", "openai_conn_id")
    operator_extra_links = (BatchLink(),)
    ui_color = "#fef7e0"

    def __init__(
        self,
        *,
        submission: dict[str, Any] | None = None,
        request_file: str | None = None,
        openai_conn_id: str = "openai_default",
        deferrable: bool = conf.getboolean("llm_batch", "deferrable", fallback=True),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if (submission is None) == (request_file is None):
            raise ValueError(
                f"{self.task_id}: give either `submission` (of BuildRequestsOperator) or "
                "`request_file`."
            )
        self.submission = submission
        self.request_file = request_file
        self.openai_conn_id = openai_conn_id
        self.deferrable = deferrable

    def execute(self, context: Context) -> dict[str, Any]:
        """Submit; come back later when it is not our turn."""
        from include.submission import SubmitLaterError

        submission = self.submission or self._registered(context)
        row = connections.ledger().batch(submission["submission_id"])
        submit = connections.submission(row.conn_id).submit
        while True:
            try:
                row = submit(row.submission_id, enqueued_tokens=submission.get("enqueued_tokens"))
            except SubmitLaterError as later:
                self.log.info("%s", later)
                if self.deferrable:
                    defer_until_turn(self, later)
                time.sleep(later.retry_after or SHORTEST_DEFERRAL)
            else:
                context["ti"].xcom_push(key="batch_id", value=row.batch_id)
                return {**submission, "batch_id": row.batch_id}

    def execute_complete(self, context: Context, event: Any = None) -> dict[str, Any]:
        """It is our turn, perhaps."""
        return self.execute(context)

    def _registered(self, context: Context) -> dict[str, Any]:
        from include import standalone

        row = standalone.register(
            str(self.request_file),
            connections.ledger(),
            connections.artifacts(),
            partition(f"{self.dag_id}.{self.task_id}"[:250], context),
            conn_id=self.openai_conn_id,
            dag_id=self.dag_id,
            dag_run_id=context["run_id"],
        )
        return shard(row, None)


class CollectResultsOperator(BatchOperator):
    """Downloads both files of an ended batch and writes one outcome for each of its requests.

    `batch` is what `BatchSensor` returned. Returns counts by outcome, tokens and cost.
    """

    template_fields: Sequence[str] = ("batch",)
    operator_extra_links = (BatchLink(),)
    ui_color = "#e6f4ea"

    def __init__(self, *, batch: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.batch = batch

    def execute(self, context: Context) -> dict[str, Any]:
        """Collect."""
        from include import collecting

        ledger, artifacts = connections.ledger(), connections.artifacts()
        row = ledger.batch(self.batch["submission_id"])
        row = collecting.collect(row, ledger, artifacts, connections.batch_api(row.conn_id))
        return {
            "submission_id": row.submission_id,
            "batch_id": row.batch_id,
            "requests": row.requests,
            "succeeded": row.succeeded,
            "retry": row.retry,
            "failed": row.failed,
            "missing": row.missing,
            "quarantined": row.quarantined,
            "cost_usd": None if row.cost_usd is None else str(row.cost_usd),
            "outcomes": artifacts.uri(row.outcomes_file or ""),
        }


class SettleRoundOperator(RoundOperator):
    """Adds a round up and looks for duplicate batches. Returns the round's counts."""

    ui_color = "#f1f3f4"

    def execute(self, context: Context) -> dict[str, Any]:
        """Settle."""
        from include import pipeline

        ledger = connections.ledger()
        run = ledger.run(self.run["run_id"])
        settled = pipeline.settle(
            run,
            self.round_number,
            ledger,
            connections.batch_api(pipeline.pinned(run).request.conn_id),
            connections.submission_policy(),
        )
        return {
            "requests": settled.requests,
            "succeeded": settled.succeeded,
            "retry": settled.retry,
            "failed": settled.failed,
            "missing": settled.missing,
        }


class LoadResultsOperator(RunOperator):
    """Puts every row into the results or the failures: in one transaction, or by whole files."""

    ui_color = "#e6f4ea"

    def execute(self, context: Context) -> dict[str, Any]:
        """Load."""
        from include import pipeline

        ledger = connections.ledger()
        run = ledger.run(self.run["run_id"])
        spec = pipeline.pinned(run)
        run = pipeline.load(run, ledger, connections.artifacts(), lambda: connections.target(spec))
        return {"run_id": run.run_id, "loaded": run.loaded, "failed": run.failed}


class ReportOperator(RunOperator):
    """Tells what the run came to: log, return value, asset event, metrics.

    Fails the run when more rows failed than `alert.failure_rate` allows; everything good has been
    loaded by then.
    """

    ui_color = "#f1f3f4"

    def execute(self, context: Context) -> dict[str, Any]:
        """Report."""
        from airflow.sdk.observability.stats import Stats

        from include.report import check_failure_rate, run_report

        ledger = connections.ledger()
        run = ledger.run(self.run["run_id"])
        report = run_report(run, ledger)
        self.log.info("%s", report.text())
        for name, value in report.metrics().items():
            Stats.gauge(f"llm_batch.run.{name}", value, tags={"job": run.job})
        for asset in self.outlets:
            context["outlet_events"][asset].extra = report.as_dict()
        check_failure_rate(run, report)
        return report.as_dict()


def partition(job: str, context: Context) -> Partition:
    """Return the data interval of this Airflow run as a partition of `job`."""
    from include.ledger_records import Partition

    dag_run = context["dag_run"]
    start = context.get("data_interval_start") or dag_run.logical_date or dag_run.run_after
    end = context.get("data_interval_end") or start
    return Partition(job, _utc(start), _utc(end))


def shard(row: Batch, enqueued_tokens: int | None) -> dict[str, Any]:
    """Return what travels through XCom for one request file."""
    return {
        "submission_id": row.submission_id,
        "round": row.round,
        "shard": row.shard,
        "requests": row.requests,
        "enqueued_tokens": enqueued_tokens,
    }


def defer_until_turn(operator: BaseOperator, later: SubmitLaterError) -> None:
    """Give the worker back until it may be this batch's turn."""
    from airflow.providers.standard.triggers.temporal import TimeDeltaTrigger

    pause = max(later.retry_after or 0.0, SHORTEST_DEFERRAL)
    operator.defer(
        trigger=TimeDeltaTrigger(timedelta(seconds=pause)), method_name="execute_complete"
    )


def _mode(params: Any) -> str:
    from include import pipeline

    if params.get("force"):
        return pipeline.FORCE
    return pipeline.REDRIVE if params.get("redrive") else pipeline.NORMAL


def _utc(moment: Any) -> datetime:
    """Return a plain aware datetime: Airflow hands out its own class."""
    return datetime.fromtimestamp(moment.timestamp(), UTC)

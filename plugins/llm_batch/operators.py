"""One operator per step of a run; each is one verb, short, and safe to run again.

XCom carries ids and counts only. What a step needs to know it reads from the ledger, with the spec
that the run was opened with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk import conf
from airflow.sdk.bases.xcom import BaseXCom
from airflow.sdk.exceptions import DownstreamTasksSkipped

from include import run_mode
from include.job_spec import load_job, with_overrides, with_provider
from llm_batch import connections, metrics
from llm_batch.links import BatchLink
from llm_batch.notices import tell
from llm_batch.steps import (
    BatchOperator,
    BegunOperator,
    RoundOperator,
    RunOperator,
    come_back,
    partition,
    run_of,
    shard,
)

if TYPE_CHECKING:
    from airflow.providers.openlineage.extractors import OperatorLineage
    from airflow.sdk import Context

    from include.ledger import Ledger


class ExtractOperator(BatchOperator):
    """Opens the run of this data interval, or joins the open one, and writes its snapshot.

    Returns `{"run_id", "rows"}`. Airflow params `model`, `sample`, `redrive` and `force` change
    the run; a changed model or sample is a run of its own in the ledger.
    """

    ui_color = "#f1f3f4"

    def __init__(self, *, job: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.job = job
        self._run_id = ""  # for OpenLineage: it asks in a fork, which had better not ask Airflow

    def execute(self, context: Context) -> dict[str, Any]:
        """Open, then extract."""
        from include import pipeline
        from include.spend_limits import PARAM, SpendLimit, join

        params = context["params"]
        spec = with_overrides(
            load_job(self.job, connections.jobs_root()),
            model=params.get("model"),
            sample=params.get("sample"),
        )
        spec = with_provider(spec, connections.provider(spec.request.conn_id))
        ledger = connections.ledger()
        run = pipeline.open_run(
            ledger,
            spec,
            partition(self.job, context),
            mode=_mode(params),
            dag_id=self.dag_id,
            dag_run_id=context["run_id"],
        )
        self._run_id = run.run_id
        limit = SpendLimit.of(params.get(PARAM))
        if limit is not None:
            join(ledger, run, limit)
        run = pipeline.extract(
            run,
            ledger,
            connections.artifacts(),
            lambda: connections.source(spec),
            jobs_root=connections.jobs_root(),
        )
        return {"run_id": run.run_id, "rows": run.rows}

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> OperatorLineage[Any, Any]:
        """Tell OpenLineage what was read, and how many rows."""
        from llm_batch import lineage

        return lineage.of_extract(self._run_id)


class SubmitBatchOperator(BegunOperator):
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

    def works_on(self, ledger: Ledger) -> str | None:
        """Return the id of the run; a file of your own is registered first."""
        return None if self.submission is None else run_of(self.submission, ledger)

    def execute(self, context: Context) -> dict[str, Any]:
        """Submit; come back later when it is not our turn."""
        from include import alerts
        from include.submission import SubmitLaterError

        ledger = connections.ledger()
        submission = self.submission or self._registered(context)
        row = ledger.batch(submission["submission_id"])
        is_new = row.batch_id is None
        self.log.info("%s: round %s, shard %s.", ledger.run(row.run_id), row.round, row.shard)
        submit = connections.submission(row.conn_id).submit
        while True:
            try:
                row = submit(row.submission_id, enqueued_tokens=submission.get("enqueued_tokens"))
            except SubmitLaterError as later:
                self.log.info("%s", later)
                come_back(self, later.retry_after or 0.0, deferrable=self.deferrable)
            else:
                context["ti"].xcom_push(key="batch_id", value=row.batch_id)
                tell(alerts.of_submission(row, ledger), context, self.notifiers)
                if is_new:
                    metrics.submitted(row)
                metrics.in_flight(row, ledger)
                page = connections.batch_page(row.conn_id, row.batch_id)
                return {**submission, "batch_id": row.batch_id, "page": page}

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
            profile=connections.provider(self.openai_conn_id),
        )
        return shard(row, None)


class CollectResultsOperator(BegunOperator):
    """Downloads both files of an ended batch and writes one outcome for each of its requests.

    `batch` is what `BatchSensor` returned. Returns counts by outcome, tokens and cost.
    """

    template_fields: Sequence[str] = ("batch",)
    operator_extra_links = (BatchLink(),)
    ui_color = "#e6f4ea"

    def __init__(self, *, batch: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.batch = batch

    def works_on(self, ledger: Ledger) -> str:
        """Return the id of the run."""
        return run_of(self.batch, ledger)

    def execute(self, context: Context) -> dict[str, Any]:
        """Collect."""
        from include import collecting

        ledger, artifacts = connections.ledger(), connections.artifacts()
        before = ledger.batch(self.batch["submission_id"])
        run = ledger.run(before.run_id)
        self.log.info("%s: round %s, shard %s.", run, before.round, before.shard)
        api = connections.batch_api(before.conn_id)
        row = collecting.collect(before, ledger, artifacts, api)
        if row.state != before.state:
            metrics.collected(row)
        metrics.in_flight(row, ledger)
        return {
            "submission_id": row.submission_id,
            "batch_id": row.batch_id,
            "page": connections.batch_page(row.conn_id, row.batch_id),
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
    """Adds a round up and looks for duplicate batches. Returns the round's counts.

    When no row is open it skips the tasks `later` (the builds of all later rounds), so that none
    of them takes a process to find that out.
    """

    ui_color = "#f1f3f4"

    def __init__(self, *, later: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.later = tuple(later)

    def execute(self, context: Context) -> dict[str, Any]:
        """Settle, and skip what has nothing left to do."""
        counts = self._settled(context)
        if self.later and not counts["retry"]:
            context["ti"].xcom_push(key=BaseXCom.XCOM_RETURN_KEY, value=counts)
            raise DownstreamTasksSkipped(tasks=list(self.later))  # type: ignore[no-untyped-call]
        return counts

    def _settled(self, context: Context) -> dict[str, Any]:
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
        self.tell_about(run.run_id, context)
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

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> OperatorLineage[Any, Any]:
        """Tell OpenLineage what was written, and how many rows."""
        from llm_batch import lineage

        return lineage.of_load(self.run["run_id"])


class ReportOperator(RunOperator):
    """Tells what the run came to: log, return value, asset event, metrics.

    Fails the run when more rows failed than `alert.failure_rate` allows; everything good has been
    loaded by then.
    """

    ui_color = "#f1f3f4"

    def execute(self, context: Context) -> dict[str, Any]:
        """Report."""
        from include.report import check_failure_rate, run_report

        ledger = connections.ledger()
        run = ledger.run(self.run["run_id"])
        report = run_report(run, ledger)
        self.log.info("%s", report.text())
        metrics.reported(run, report)
        for asset in self.outlets:
            context["outlet_events"][asset].extra = report.as_dict()
        self.tell_about(run.run_id, context)
        check_failure_rate(run, report)
        return report.as_dict()

    def get_openlineage_facets_on_complete(self, task_instance: Any) -> OperatorLineage[Any, Any]:
        """Tell OpenLineage what the run came to."""
        from llm_batch import lineage

        return lineage.of_report(self.run["run_id"])


def _mode(params: Any) -> str:
    if params.get("force"):
        return run_mode.FORCE
    return run_mode.REDRIVE if params.get("redrive") else run_mode.NORMAL

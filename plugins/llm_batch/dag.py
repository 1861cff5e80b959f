"""The graph of a job: extract, rounds, load, report.

    extract ─► round_1 ─► round_2 ─► … ─► load ─► report
    round_n = build ─► shard[ submit ─► wait ─► collect ] ─► settle

Rounds are unrolled, so that the grid shows at a glance how many a day needed; a round with nothing
open skips itself. Within a round, each shard goes its own way through submit, wait and collect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from airflow.sdk import (
    DAG,
    Asset,
    CronDataIntervalTimetable,
    ExceptionRetryPolicy,
    Param,
    RetryAction,
    RetryRule,
    TaskGroup,
    TriggerRule,
    conf,
    task_group,
)

from include import errors
from include.job_spec import JobSpec, load_job
from llm_batch import connections
from llm_batch.connections import jobs_root
from llm_batch.operators import (
    BuildRequestsOperator,
    CollectResultsOperator,
    ExtractOperator,
    LoadResultsOperator,
    ReportOperator,
    SettleRoundOperator,
    SubmitBatchOperator,
)
from llm_batch.sensors import BatchSensor

RETRIES = 6
RETRY_DELAY = timedelta(seconds=connections.seconds("retry_delay", 60.0))
RETRY_POLICY = ExceptionRetryPolicy(
    rules=[
        RetryRule(
            exception=[errors.ConfigurationError, errors.PermanentError, errors.FailureRateError],
            action=RetryAction.FAIL,
            reason="a retry cannot help; the message says what to mend",
        ),
        RetryRule(
            exception=[errors.TransientError, errors.UnknownOutcomeError],
            action=RetryAction.RETRY,
            retry_delay=RETRY_DELAY,
            reason="tried again from the last committed step",
        ),
    ]
)


def batch_dag(
    job: str,
    *,
    schedule: str | None,
    start_date: datetime,
    timezone: str = "UTC",
    tags: Sequence[str] = (),
    default_args: Mapping[str, Any] | None = None,
    **dag_arguments: Any,
) -> DAG:
    """Return the DAG of the job folder `include/jobs/<job>/` (setting `[llm_batch] jobs`).

    `schedule` is a cron expression or preset; every run works on one data interval of it
    (`CronDataIntervalTimetable`). More keyword arguments go to `airflow.sdk.DAG`; `default_args`
    are added to those of this project and win over them. Raises `JobSpecError`, shown as this
    DAG's import error, when the job folder is wrong.
    """
    spec = load_job(job, jobs_root())
    timetable = None if schedule is None else CronDataIntervalTimetable(schedule, timezone=timezone)
    settings: dict[str, Any] = {"catchup": False, "max_active_runs": 4} | dag_arguments
    with DAG(
        dag_id=job,
        schedule=timetable,
        start_date=start_date,
        params=_params(spec),
        tags=["llm_batch", *tags],
        doc_md=_documentation(spec),
        default_args={
            "retries": RETRIES,
            "retry_delay": RETRY_DELAY,
            "retry_policy": RETRY_POLICY,
            **(default_args or {}),
        },
        **settings,
    ) as dag:
        _graph(spec)
    return dag


def _graph(spec: JobSpec) -> None:
    extract = ExtractOperator(task_id="extract", job=spec.name)
    run: Any = extract.output
    last: Any = extract
    for number in range(1, spec.retry.rounds + 1):
        group = _round(number, run)
        last >> group
        last = group
    load = LoadResultsOperator(task_id="load", run=run, trigger_rule=TriggerRule.NONE_FAILED)
    report = ReportOperator(task_id="report", run=run, outlets=[Asset(spec.name)])
    last >> load >> report


def _round(number: int, run: Any) -> TaskGroup:
    with TaskGroup(group_id=f"round_{number}") as group:
        build = BuildRequestsOperator(
            task_id="build",
            run=run,
            round_number=number,
            trigger_rule=TriggerRule.NONE_FAILED,
        )
        settle = SettleRoundOperator(task_id="settle", run=run, round_number=number)
        _shard.expand(submission=build.output) >> settle
    return group


@task_group(group_id="shard")
def _shard(submission: Any) -> None:
    """Send one request file through the API."""
    label = "shard {{ task.submission['shard'] }} · {{ task.submission['requests'] }} requests"
    submit = SubmitBatchOperator(
        task_id="submit", submission=submission, map_index_template=label, **_in_pool(1)
    )
    size = "{{ task.batch['batch_id'] }} · {{ task.batch['requests'] }} requests"
    submitted: Any = submit.output
    wait = BatchSensor(task_id="wait", batch=submitted, map_index_template=size, **_in_pool(2))
    ended: Any = wait.output
    CollectResultsOperator(task_id="collect", batch=ended, map_index_template=size)


def _in_pool(priority: int) -> dict[str, Any]:
    """Cap what is in flight over all jobs and backfills by `[llm_batch] pool`, when it is set.

    The pool must have been made with `--include-deferred`. A batch that is at the API is waited
    for before another one is submitted.
    """
    pool = conf.get("llm_batch", "pool", fallback=None)
    if not pool:
        return {}
    return {"pool": pool, "priority_weight": priority, "weight_rule": "absolute"}


def _params(spec: JobSpec) -> dict[str, Param]:
    return {
        "model": Param(
            None, type=["null", "string"], description=f"Instead of {spec.request.model}."
        ),
        "sample": Param(
            None,
            type=["null", "number"],
            exclusiveMinimum=0,
            maximum=1,
            description="Only this fraction of the rows, chosen by key.",
        ),
        "redrive": Param(
            False, type="boolean", description="Send the failed rows of the partition again."
        ),
        "force": Param(
            False, type="boolean", description="Send all rows again, loaded ones too. Costs money."
        ),
    }


def _documentation(spec: JobSpec) -> str:
    return (
        f"{spec.description or f'Batch job {spec.name}.'}\n\n"
        f"- source: `{spec.source.conn_id}`, key `{', '.join(spec.source.key)}`\n"
        f"- request: `{spec.request.endpoint}` with `{spec.request.model}` over "
        f"`{spec.request.conn_id}`\n"
        f"- target: `{spec.target.results_place}` and `{spec.target.failures_place}`"
        f"{f' on `{spec.target.conn_id}`' if spec.target.conn_id else ' (Parquet)'}\n"
        f"- at most {spec.retry.rounds} rounds; budget "
        f"{'none' if spec.budget.max_usd is None else f'${spec.budget.max_usd}'}\n"
        f"- spec digest `{spec.digest[:12]}`\n"
    )

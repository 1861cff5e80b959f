"""The graph of a job: extract, rounds, load, report.

    extract ─► approval ─► canary ─► round_1 ─► round_2 ─► … ─► load ─► report
    approval = estimate ─► approve                                       (jobs that set one)
    canary  = build ─► shard[ submit ─► wait ─► collect ] ─► judge      (jobs that set one)
    round_n = build ─► shard[ submit ─► wait ─► collect ] ─► settle

Rounds are unrolled, so that the grid shows at a glance how many a day needed; a settle that leaves
nothing open skips the later ones. Within a round, each shard goes its own way through submit, wait
and collect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from airflow.sdk import (
    DAG,
    Asset,
    BaseNotifier,
    BaseOperator,
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
from include.job_documentation import documentation
from include.job_spec import JobSpec, load_job
from include.queue_spec import QueueSpec
from llm_batch import connections
from llm_batch.build_operators import (
    BuildCanaryOperator,
    BuildRequestsOperator,
    JudgeCanaryOperator,
)
from llm_batch.connections import jobs_root
from llm_batch.operators import (
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
            exception=[
                errors.ConfigurationError,
                errors.PermanentError,
                errors.CanaryError,
                errors.FailureRateError,
            ],
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


TASK_DEFAULTS: dict[str, Any] = {
    "retries": RETRIES,
    "retry_delay": RETRY_DELAY,
    "retry_policy": RETRY_POLICY,
}


def batch_dag(
    job: str,
    *,
    schedule: str | None,
    start_date: datetime,
    timezone: str = "UTC",
    tags: Sequence[str] = (),
    default_args: Mapping[str, Any] | None = None,
    notifiers: Sequence[BaseNotifier] = (),
    **dag_arguments: Any,
) -> DAG:
    """Return the DAG of the job folder `include/jobs/<job>/` (setting `[llm_batch] jobs`).

    `schedule` is a cron expression or preset; every run works on one data interval of it
    (`CronDataIntervalTimetable`). More keyword arguments go to `airflow.sdk.DAG`; `default_args`
    are added to those of this project and win over them. `notifiers` are told of alerts, each once,
    besides those of `[llm_batch] notifiers`. Raises `JobSpecError`, shown as this
    DAG's import error, when the job folder is wrong.
    """
    spec = load_job(job, jobs_root())
    timetable = None if schedule is None else CronDataIntervalTimetable(schedule, timezone=timezone)
    settings: dict[str, Any] = {"catchup": False, "max_active_runs": 4} | dag_arguments
    with DAG(
        dag_id=job,
        schedule=timetable,
        start_date=_in_zone(start_date, timezone),
        params=_params(spec),
        tags=["llm_batch", *tags],
        doc_md=documentation(spec, jobs_root()),
        default_args={**TASK_DEFAULTS, "notifiers": notifiers, **(default_args or {})},
        **settings,
    ) as dag:
        add_graph(ExtractOperator(task_id="extract", job=job), spec)
    return dag


def add_graph(extract: BaseOperator, spec: JobSpec | QueueSpec) -> None:
    """Add all that follows `extract` to its DAG."""
    run: Any = extract.output
    last: Any = extract
    for group in _groups(spec, run):
        last >> group
        last = group
    load = LoadResultsOperator(task_id="load", run=run, trigger_rule=TriggerRule.NONE_FAILED)
    report = ReportOperator(task_id="report", run=run, outlets=[Asset(spec.name)])
    last >> load >> report


def _round(number: int, run: Any, rounds: int) -> TaskGroup:
    with TaskGroup(group_id=f"round_{number}") as group:
        build = BuildRequestsOperator(
            task_id="build",
            run=run,
            round_number=number,
            trigger_rule=TriggerRule.NONE_FAILED,
        )
        settle = SettleRoundOperator(
            task_id="settle",
            run=run,
            round_number=number,
            later=[f"round_{later}.build" for later in range(number + 1, rounds + 1)],
        )
        _shard.expand(submission=build.output) >> settle
    return group


def _groups(spec: JobSpec | QueueSpec, run: Any) -> Iterator[TaskGroup]:
    """Yield the task groups between extract and load, in order."""
    if spec.budget.approve_above_usd is not None:
        from llm_batch.approval import approval

        yield approval(run)
    if spec.canary.requests is not None:
        yield _canary(run)
    for number in range(1, spec.retry.rounds + 1):
        yield _round(number, run, spec.retry.rounds)


def _canary(run: Any) -> TaskGroup:
    with TaskGroup(group_id="canary") as group:
        build = BuildCanaryOperator(task_id="build", run=run, trigger_rule=TriggerRule.NONE_FAILED)
        judge = JudgeCanaryOperator(task_id="judge", run=run)
        _shard.expand(submission=build.output) >> judge
    return group


@task_group(group_id="shard")
def _shard(submission: Any) -> None:
    """Send one request file through the API."""
    label = f"shard {{{{ task.submission['shard'] }}}} · {_requests('task.submission')}"
    submit = SubmitBatchOperator(
        task_id="submit", submission=submission, map_index_template=label, **_in_pool(1)
    )
    size = f"{{{{ task.batch['batch_id'] }}}} · {_requests('task.batch')}"
    submitted: Any = submit.output
    wait = BatchSensor(task_id="wait", batch=submitted, map_index_template=size, **_in_pool(2))
    ended: Any = wait.output
    CollectResultsOperator(task_id="collect", batch=ended, map_index_template=size)


def _requests(of: str) -> str:
    """Return a template for `1 request` or `200 requests` of what a task was given."""
    number = f"{of}['requests']"
    return f"{{{{ {number} }}}} request{{{{ '' if {number} == 1 else 's' }}}}"


def _in_pool(priority: int) -> dict[str, Any]:
    """Cap what is in flight over all jobs and backfills by `[llm_batch] pool`, when it is set.

    The pool must have been made with `--include-deferred`. A batch that is at the API is waited
    for before another one is submitted.
    """
    pool = conf.get("llm_batch", "pool", fallback=None)
    if not pool:
        return {}
    return {"pool": pool, "priority_weight": priority, "weight_rule": "absolute"}


def _in_zone(start: datetime, timezone: str) -> datetime:
    """Return the same moment in the time zone of the schedule: Airflow makes it the DAG's own."""
    return start if start.tzinfo is None else start.astimezone(ZoneInfo(timezone))


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
        "spend_limit": Param(
            None,
            type=["null", "object"],
            description='A budget that runs share: {"name": "backfill of May", "max_usd": 50}.',
        ),
    }

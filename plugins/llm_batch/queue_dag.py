"""The two DAGs of a request queue.

    <queue>_drain  every few minutes:  drain ─► start[run…]
    <queue>        one run per group of claimed requests:  extract ─► round_1 ─► … ─► load ─► report

The first is a light look at the table and skips itself most of the time, so that the grid of the
second shows real runs only. The second is the graph of every job.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from airflow.sdk import DAG, CronTriggerTimetable, Param

from include.figures import counted
from include.queue_spec import QueueSpec, load_queue
from llm_batch.connections import jobs_root
from llm_batch.dag import TASK_DEFAULTS, add_graph
from llm_batch.queue_operators import (
    DrainQueueOperator,
    ExtractRequestsOperator,
    StartRunOperator,
)


def drain_dag(
    queue: str, *, every: str, start_date: datetime, tags: Sequence[str] = (), **dag_arguments: Any
) -> DAG:
    """Return the DAG that looks at the queue at the cron expression `every` and starts its runs.

    When requests are taken is said in `include/jobs/<queue>/job.yaml`. Raises `JobSpecError`, shown
    as this DAG's import error, when that is wrong.
    """
    spec = load_queue(queue, jobs_root())
    with DAG(
        dag_id=f"{queue}_drain",
        schedule=CronTriggerTimetable(every, timezone="UTC"),
        start_date=start_date,
        catchup=False,
        max_active_runs=1,
        params={
            "everything": Param(
                False, type="boolean", description="Take all that waits, whatever the time."
            )
        },
        tags=["llm_batch", *tags],
        doc_md=_documentation(spec),
        default_args=TASK_DEFAULTS,
        **dag_arguments,
    ) as dag:
        drain = DrainQueueOperator(task_id="drain", queue=queue)
        start = StartRunOperator.partial(
            task_id="start",
            dag_id_to_start=queue,
            map_index_template="{{ task.run['dag_run_id'] }}",
        )
        start.expand(run=drain.output)
    return dag


def queue_dag(
    queue: str, *, start_date: datetime, tags: Sequence[str] = (), **dag_arguments: Any
) -> DAG:
    """Return the DAG whose runs `drain_dag` starts; a run has one endpoint and one model."""
    spec = load_queue(queue, jobs_root())
    settings: dict[str, Any] = {"max_active_runs": 32, "is_paused_upon_creation": False}
    with DAG(
        dag_id=queue,
        schedule=None,
        start_date=start_date,
        catchup=False,
        tags=["llm_batch", *tags],
        doc_md=_documentation(spec),
        default_args=TASK_DEFAULTS,
        **settings | dag_arguments,
    ) as dag:
        add_graph(ExtractRequestsOperator(task_id="extract", queue=queue), spec)
    return dag


def _documentation(spec: QueueSpec) -> str:
    drain = spec.source.queue
    least, age = drain.min_requests, drain.max_age_minutes
    occasions = [
        counted(least, "request waits", "requests wait") if least else "",
        f"one has waited {counted(age, 'minute')}" if age else "",
        f"it is {drain.daily_at:%H:%M} in {drain.timezone}" if drain.daily_at else "",
    ]
    return (
        f"{spec.description or f'Request queue {spec.name}.'}\n\n"
        f"- taken when {', or '.join(filter(None, occasions))}\n"
        f"- at most {counted(spec.retry.rounds, 'round')}\n"
        "- table `llm_batch_queue` in the ledger's database\n"
    )

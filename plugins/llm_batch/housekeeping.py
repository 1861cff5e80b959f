"""Housekeeping as an Airflow DAG: one task for each chore of `include.housekeeping`."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from airflow.sdk import DAG, BaseOperator, Param, TriggerRule, conf

from llm_batch import connections

if TYPE_CHECKING:
    from airflow.sdk import Context

    from include.housekeeping import Housekeeping

CHORES = {
    "adopt_orphans": "orphans",
    "delete_files": "files",
    "retain_artifacts": "old_artifacts",
    "retain_requests": "old_requests",
    "retain_history": "old_history",
    "report_quota": "quota",
}
DESCRIPTION = """\
Cleans up behind the runs of all jobs: orphan batches, files at the provider, old artifacts, old
requests of the queue, old history. **It only tells what it would do**, unless the param `apply`
(or the setting `[llm_batch] housekeeping_apply`) is true. It touches nothing that is open, and
nothing that is not ours. Retention: the settings `keep_…_days`.
"""


class HousekeepingOperator(BaseOperator):
    """Does one chore, a method of `include.housekeeping.Housekeeping`, or tells what is due.

    Returns its counts. Safe to run again at any time, and beside runs that are under way.
    """

    ui_color = "#f1f3f4"

    def __init__(self, *, chore: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.chore = chore

    def execute(self, context: Context) -> dict[str, int]:
        """Do it."""
        done = getattr(housekeeping(apply=bool(context["params"]["apply"])), self.chore)()
        self.log.info("%s", done.text())
        counts: dict[str, int] = done.counts
        return counts


def housekeeping(*, apply: bool) -> Housekeeping:
    """Return the chores over this installation's ledger, API and artifacts."""
    from include.housekeeping import Housekeeping, Keep

    usual = Keep()
    keep = Keep(
        files_days=connections.seconds("keep_files_days", usual.files_days),
        plain_days=connections.seconds("keep_plain_days", usual.plain_days),
        artifacts_days=connections.seconds("keep_artifacts_days", usual.artifacts_days),
        requests_days=connections.seconds("keep_requests_days", usual.requests_days),
        history_days=connections.seconds("keep_history_days", usual.history_days),
    )
    return Housekeeping(
        connections.ledger(),
        connections.artifacts(),
        connections.batch_api,
        keep,
        apply=apply,
    )


def housekeeping_dag(*, schedule: str | None, start_date: datetime, **dag_arguments: Any) -> DAG:
    """Return the DAG `batch_housekeeping`; one chore that fails does not keep the others back."""
    apply = conf.getboolean("llm_batch", "housekeeping_apply", fallback=False)
    settings: dict[str, Any] = {"catchup": False, "max_active_runs": 1} | dag_arguments
    with DAG(
        dag_id="batch_housekeeping",
        schedule=schedule,
        start_date=start_date,
        params={"apply": Param(apply, type="boolean", description="Do it, not only tell.")},
        tags=["llm_batch"],
        doc_md=DESCRIPTION,
        default_args={"retries": 2},
        **settings,
    ) as dag:
        last: Any = None
        for task_id, chore in CHORES.items():
            task = HousekeepingOperator(
                task_id=task_id, chore=chore, trigger_rule=TriggerRule.ALL_DONE
            )
            if last is not None:
                last >> task
            last = task
    return dag

"""Which Airflow runs may have to do with batches, told from their DAG alone.

Listeners hear of every run of every team. What they ask costs no query: the operators of a DAG are
at hand where a run has ended. A DAG that is not at hand may be one of ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from airflow.models.dagrun import DagRun

REPORT = "ReportOperator"
SUBMITS = {"submission", "request_file"}  # template fields of SubmitBatchOperator, and of no other


def may_report(dag_run: DagRun) -> bool:
    """Tell whether the DAG has our report."""
    dag = getattr(dag_run, "dag", None)
    return dag is None or any(task.task_type == REPORT for task in dag.tasks)


def may_submit(dag_run: DagRun) -> bool:
    """Tell whether the DAG makes batches: in a class of its user's, too, that is based on ours."""
    dag = getattr(dag_run, "dag", None)
    return dag is None or any(set(task.template_fields) >= SUBMITS for task in dag.tasks)

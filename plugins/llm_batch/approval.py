"""A person approves a run's estimate in Airflow's Required Actions before anything is sent.

Imported only by DAGs whose job sets `budget.approve_above_usd`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import TaskGroup

from llm_batch import connections
from llm_batch.build_operators import BuildRequestsOperator
from llm_batch.steps import go_on

if TYPE_CHECKING:
    from airflow.sdk import Context

GROUP = "approval"


class EstimateOperator(BuildRequestsOperator):
    """Writes the request files of round 1 and returns what a person is asked about them.

    Returns `{"subject", "body"}`. Skips itself, and so the question, when the estimate is within
    `budget.approve_above_usd`, or a person has approved this run before.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(round_number=1, **kwargs)

    def execute(self, context: Context) -> Any:
        """Estimate, or skip."""
        from airflow.sdk.exceptions import AirflowSkipException

        from include.approvals import approve, needs_approval, question, was_rejected

        batches = self.built(context)
        ledger = connections.ledger()
        run = ledger.run(self.run["run_id"])
        if not batches or not needs_approval(run, ledger):
            if was_rejected(run, ledger):  # its plan counts again from here on
                approve(run, ledger, by="budget.approve_above_usd, which was raised")
            raise AirflowSkipException("Nobody has to be asked about this run.")
        subject, body = question(run, batches)
        return {"subject": subject, "body": body}


class ApproveSpendOperator(ApprovalOperator):
    """Waits for a person; "Reject" fails the run. Who said what is kept in the ledger."""

    template_fields = (*ApprovalOperator.template_fields, "run")

    def __init__(self, *, run: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(fail_on_reject=True, **kwargs)
        self.run = run

    def pre_execute(self, context: Context) -> None:
        """Go on with the run, when its Airflow run had ended and this task was cleared."""
        go_on(connections.ledger(), self.run["run_id"], context)

    def execute_complete(self, context: Context, event: dict[str, Any]) -> Any:
        """Record the answer, then go on or fail: on a no, and when the money has gone since."""
        from include.approvals import approve, reject

        if "error" not in event:
            is_yes = event["chosen_options"] == [self.APPROVE]
            user = event.get("responded_by_user") or {}
            ledger = connections.ledger()
            decide = approve if is_yes else reject
            decide(
                ledger.run(self.run["run_id"]),
                ledger,
                by=str(user.get("name") or user.get("id") or "somebody unknown"),
            )
        return super().execute_complete(context, event)


def approval(run: Any) -> TaskGroup:
    """Return the task group `approval`: estimate, then ask."""
    with TaskGroup(group_id=GROUP) as group:
        estimate = EstimateOperator(task_id="estimate", run=run)
        asked = f"ti.xcom_pull(task_ids='{GROUP}.estimate')"
        approve = ApproveSpendOperator(
            task_id="approve",
            run=run,
            subject=f"{{{{ {asked}['subject'] }}}}",
            body=f"{{{{ {asked}['body'] }}}}",
            retries=0,  # a "no" is an answer: asking again would be nagging
        )
        estimate >> approve
    return group

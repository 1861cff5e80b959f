"""Links from a task to its batch at the provider."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow.sdk import BaseOperatorLink

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator
    from airflow.sdk.types import TaskInstanceKey

OPENAI_BATCHES = "https://platform.openai.com/batches/"


class BatchLink(BaseOperatorLink):
    """The batch's page at OpenAI."""

    @property
    def name(self) -> str:
        """The button's text."""
        return "Batch at OpenAI"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """Return the page of the batch that the task has returned, or the list of batches."""
        from airflow.sdk.execution_time.xcom import XCom

        result = XCom.get_one(
            key="return_value",
            dag_id=ti_key.dag_id,
            task_id=ti_key.task_id,
            run_id=ti_key.run_id,
            map_index=ti_key.map_index,
        )
        batch_id = result.get("batch_id") if isinstance(result, dict) else None
        return OPENAI_BATCHES + (batch_id or "")

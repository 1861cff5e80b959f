"""Links from a task to its batch at the provider."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow.sdk import BaseOperatorLink

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator
    from airflow.sdk.types import TaskInstanceKey


class BatchLink(BaseOperatorLink):
    """The batch's page at the provider."""

    @property
    def name(self) -> str:
        """The button's text."""
        return "Batch at the provider"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """Return the `page` that the task has returned; without one Airflow shows no button."""
        from airflow.sdk.execution_time.xcom import XCom

        result = XCom.get_one(
            key="return_value",
            dag_id=ti_key.dag_id,
            task_id=ti_key.task_id,
            run_id=ti_key.run_id,
            map_index=ti_key.map_index,
        )
        return str(result.get("page") or "") if isinstance(result, dict) else ""

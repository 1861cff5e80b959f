"""Registers with Airflow what belongs to no single task."""

from __future__ import annotations

from airflow.plugins_manager import AirflowPlugin
from llm_batch import listener
from llm_batch.links import BatchLink


class LLMBatchPlugin(AirflowPlugin):
    """Links of the batch tasks, and the listener that stops the spend of a failed run."""

    name = "llm_batch"
    operator_extra_links = [BatchLink()]  # noqa: RUF012  # as the base class has it
    listeners = [listener]  # noqa: RUF012  # same

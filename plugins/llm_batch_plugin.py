"""Registers with Airflow what belongs to no single task."""

from __future__ import annotations

from airflow.plugins_manager import AirflowPlugin
from llm_batch import listener, views
from llm_batch.links import BatchLink


class LLMBatchPlugin(AirflowPlugin):
    """Links of the batch tasks, the listener that stops the spend of a failed run, and pages."""

    name = "llm_batch"
    operator_extra_links = [BatchLink()]  # noqa: RUF012  # as the base class has it
    listeners = [listener]  # noqa: RUF012  # same
    external_views = views.external_views()
    fastapi_apps = [  # noqa: RUF012  # same
        {"app": views.pages, "url_prefix": views.PREFIX, "name": views.NAME}
    ]

"""Where Airflow shows our pages: in its navigation, and as a tab of every DAG and run."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from airflow.configuration import conf

PREFIX = "/llm-batch"
NAME = "LLM batches"


def external_views() -> list[dict[str, Any]]:
    """Return the entries of `AirflowPlugin.external_views`; Airflow fills in the ids."""
    base = urlsplit(conf.get("api", "base_url", fallback="")).path.rstrip("/") + PREFIX
    places = {
        "nav": ("llm-batches", "/jobs"),
        "dag": ("llm-batches-dag", "/dag?dag_id={DAG_ID}"),
        "dag_run": ("llm-batches-run", "/run?dag_id={DAG_ID}&run_id={RUN_ID}"),
    }
    return [
        {"name": NAME, "destination": place, "url_route": route, "href": base + href}
        for place, (route, href) in places.items()
    ]


async def pages(scope: Any, receive: Any, send: Any) -> None:
    """Serve our pages (ASGI); they are imported at the first request.

    The scheduler, the triggerer and every task load the plugin as well, and need none of it.
    """
    from llm_batch.ui import app

    await app(scope, receive, send)

"""From Airflow connections and settings to what `include/` works with.

Settings are the section `[llm_batch]` of Airflow's configuration, or the environment:
`AIRFLOW__LLM_BATCH__ARTIFACTS` and so on. `docs/operating.md` lists them.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseHook, ObjectStoragePath, conf
from airflow.sdk.exceptions import AirflowException, AirflowNotFoundException
from airflow.sdk.log import mask_secret
from airflow.sdk.module_loading import (  # type: ignore[attr-defined]
    import_string,
)

from include.dataset_path import dataset_at
from include.errors import ConfigurationError
from include.job_spec import JOBS_ROOT

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI
    from sqlalchemy.engine import Engine

    from include.artifacts import Artifacts
    from include.batch_api import BatchApi
    from include.job_spec import JobSpec
    from include.ledger import Ledger
    from include.submission import Submission, SubmissionPolicy
    from include.waiting import WaitPolicy

SECTION = "llm_batch"
LEDGER_CONN_ID = "llm_batch_db"
# Looking a hook up by connection type imports every provider; these two need not.
SQL_HOOKS = {
    "sqlite": "airflow.providers.sqlite.hooks.sqlite.SqliteHook",
    "postgres": "airflow.providers.postgres.hooks.postgres.PostgresHook",
}


def seconds(name: str, default: float) -> float:
    """Return a setting of section `[llm_batch]` that is a number of seconds."""
    return float(conf.getfloat(SECTION, name, fallback=default))


def jobs_root() -> Path:
    """Return the folder of the job folders: `[llm_batch] jobs`, or `include/jobs`."""
    return Path(conf.get(SECTION, "jobs", fallback="") or JOBS_ROOT)


def artifacts() -> Artifacts:
    """Return the files of all runs, at the URI of `[llm_batch] artifacts`."""
    from include.artifacts import Artifacts

    uri = conf.get(SECTION, "artifacts", fallback=f"file://{_airflow_home()}/llm_batch")
    if uri.startswith("file://") or "://" not in uri:
        return Artifacts(Path(uri.removeprefix("file://")))
    return Artifacts(ObjectStoragePath(uri))


def target(spec: JobSpec) -> Engine | Artifacts:
    """Return where a job's results go: its database, or the folder of its Parquet dataset."""
    if spec.target.path:
        return dataset_at(spec.target.path, ObjectStoragePath)
    return engine(spec.target.conn_id)


def ledger() -> Ledger:
    """Return the ledger on connection `llm_batch_db`; a SQLite file when there is none."""
    from include.ledger import Ledger

    try:
        return Ledger(engine(LEDGER_CONN_ID))
    except MissingConnectionError:
        from sqlalchemy import create_engine

        return Ledger(create_engine(f"sqlite:///{_airflow_home()}/llm_batch.db"))


def engine(conn_id: str) -> Engine:
    """Return a SQLAlchemy engine for an Airflow connection, through its hook."""
    hook = _sql_hook(conn_id)
    if not hasattr(hook, "get_sqlalchemy_engine"):
        raise ConfigurationError(
            f"Connection {conn_id!r} of type {hook.conn_type!r} is no SQL database; "
            "expected one whose hook offers get_sqlalchemy_engine()."
        )
    result: Engine = hook.get_sqlalchemy_engine()
    return result


def openai_client(conn_id: str) -> OpenAI:
    """Return the synchronous client of a connection of type `openai`, its key masked in logs."""
    from airflow.providers.openai.hooks.openai import OpenAIHook

    _mask(_connection(conn_id))
    _quiet()
    client: OpenAI = OpenAIHook(conn_id=conn_id).get_conn()
    return client


async def async_openai_client(conn_id: str) -> AsyncOpenAI:
    """Return the asynchronous client of a connection of type `openai`."""
    from airflow.providers.openai.hooks.openai import OpenAIHook

    _quiet()
    client: AsyncOpenAI = await OpenAIHook(conn_id=conn_id).aget_conn()
    mask_secret(client.api_key)
    return client


def batch_api(conn_id: str) -> BatchApi:
    """Return the calls of the Batch API through a connection of type `openai`."""
    from include.batch_api import CREATE_TIMEOUT, BatchApi

    return BatchApi(
        openai_client(conn_id),
        conn_id=conn_id,
        create_timeout=seconds("create_timeout", CREATE_TIMEOUT),
    )


def submission_policy() -> SubmissionPolicy:
    """Return how long the submission protocol waits."""
    from include.submission import SubmissionPolicy

    usual = SubmissionPolicy()
    return SubmissionPolicy(
        grace=seconds("submit_grace", usual.grace),
        lease=seconds("submit_lease", usual.lease),
        busy_pause=seconds("busy_pause", usual.busy_pause),
    )


def submission(conn_id: str) -> Submission:
    """Return the submission protocol over the ledger, the API and the artifacts."""
    from include.submission import Submission

    return Submission(ledger(), batch_api(conn_id), artifacts(), submission_policy())


def wait_policy(deadline_hours: float | None = None) -> WaitPolicy:
    """Return how long a batch may take."""
    from include.waiting import WaitPolicy

    usual = WaitPolicy()
    return WaitPolicy(
        deadline_hours=deadline_hours or seconds("deadline_hours", usual.deadline_hours),
        cancel_hours=seconds("cancel_hours", usual.cancel_hours),
    )


class MissingConnectionError(ConfigurationError):
    """An Airflow connection that the job names is not defined."""


def _connection(conn_id: str) -> Any:
    try:
        return BaseHook.get_connection(conn_id)
    except AirflowNotFoundException:
        raise MissingConnectionError(
            f"Airflow connection {conn_id!r} is not defined. Add it (Admin > Connections, or "
            f"AIRFLOW_CONN_{conn_id.upper()}) and clear this task."
        ) from None


def _sql_hook(conn_id: str) -> Any:
    connection = _connection(conn_id)
    path = SQL_HOOKS.get(connection.conn_type)
    if path is not None:
        hook_class = import_string(path)
        return hook_class(**{hook_class.conn_name_attr: conn_id})
    try:
        return connection.get_hook()
    except AirflowException as error:
        raise ConfigurationError(
            f"Connection {conn_id!r} has type {connection.conn_type!r}, for which no provider is "
            f"installed ({error})."
        ) from None


def _quiet() -> None:
    """Keep one line per HTTP call out of the task logs: what matters is logged by us."""
    logging.getLogger("httpx2").setLevel(logging.WARNING)


def _mask(connection: Any) -> None:
    """Mask the key in every form in which a log could show it."""
    if connection.password:
        mask_secret(connection.password)
        mask_secret(f"Bearer {connection.password}")


def _airflow_home() -> Path:
    return Path(os.environ.get("AIRFLOW_HOME", "~/airflow")).expanduser()

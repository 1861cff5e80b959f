"""From Airflow connections and settings to what `include/` works with.

Settings are the section `[llm_batch]` of Airflow's configuration, or the environment:
`AIRFLOW__LLM_BATCH__ARTIFACTS` and so on. `docs/operating.md` lists them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseHook, conf
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
    from include.batch_api import AsyncBatchApi, BatchApi
    from include.job_spec import JobSpec
    from include.ledger import Ledger
    from include.object_storage import Remote
    from include.provider import ProviderProfile
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


def job_now(name: str) -> JobSpec | None:
    """Return a job as its folder says now; None where it is not at hand, or broken."""
    from include.job_spec import load_job

    try:
        return load_job(name, jobs_root())
    except ConfigurationError:
        return None


def artifacts() -> Artifacts:
    """Return the files of all runs, at the URI of `[llm_batch] artifacts`."""
    return _files_at(_artifacts_uri())


def reports() -> Artifacts:
    """Return the daily reports, at the URI of `[llm_batch] reports`."""
    return _files_at(conf.get(SECTION, "reports", fallback="") or f"{_artifacts_uri()}/reports")


def _artifacts_uri() -> str:
    uri: str = conf.get(SECTION, "artifacts", fallback=f"file://{_airflow_home()}/llm_batch")
    return uri.rstrip("/")


def _files_at(uri: str) -> Artifacts:
    from include.artifacts import Artifacts

    if uri.startswith("file://") or "://" not in uri:
        return Artifacts(Path(uri.removeprefix("file://")))
    return Artifacts(storage(uri))


def storage(uri: str) -> Any:
    """Return the path object of a URI such as `s3://conn_id@bucket/folder`."""
    from llm_batch.object_storage import storage_path

    return storage_path(uri)


def source(spec: JobSpec) -> Engine | Remote:
    """Return where a job's rows are: the database of its SQL, or what opens its files."""
    return storage if spec.source.path else engine(spec.source.conn_id)


def target(spec: JobSpec) -> Engine | Artifacts:
    """Return where a job's results go: its database, the folder of its dataset, or the queue."""
    if spec.queue is not None:
        return ledger().engine
    if spec.target.path:
        return dataset_at(spec.target.path, storage)
    return engine(spec.target.conn_id)


def ledger() -> Ledger:
    """Return the ledger on connection `llm_batch_db`, migrated if need be."""
    from include.ledger import Ledger

    return Ledger(ledger_engine())


def ledger_engine() -> Engine:
    """Return the engine of connection `llm_batch_db`; of a SQLite file when there is none."""
    try:
        return engine(LEDGER_CONN_ID)
    except MissingConnectionError:
        from sqlalchemy import create_engine

        return create_engine(f"sqlite:///{_airflow_home()}/llm_batch.db")


def engine(conn_id: str) -> Engine:
    """Return a SQLAlchemy engine for an Airflow connection, through its hook."""
    hook = sql_hook(conn_id)
    if not hasattr(hook, "get_sqlalchemy_engine"):
        raise ConfigurationError(
            f"Connection {conn_id!r} of type {hook.conn_type!r} is no SQL database; "
            "expected one whose hook offers get_sqlalchemy_engine()."
        )
    # A triggerer lives for weeks: a connection that a restarted server dropped is made anew.
    result: Engine = hook.get_sqlalchemy_engine(engine_kwargs={"pool_pre_ping": True})
    return result


def provider(conn_id: str) -> ProviderProfile:
    """Return the profile of the server behind a connection of type `openai`."""
    found = connection(conn_id)
    return _profile(found, found.extra_dejson)


def batch_page(conn_id: str, batch_id: str | None) -> str:
    """Return the web page of a batch at the provider; empty when none is known."""
    try:
        return provider(conn_id).page_of(batch_id)
    except ConfigurationError:
        return ""


def _profile(found: Any, extra: dict[str, Any]) -> ProviderProfile:
    from include.provider import profile_of

    arguments = extra.get("openai_client_kwargs") or {}
    host = arguments.get("base_url") or found.host or os.environ.get("OPENAI_BASE_URL")
    return profile_of(extra, host, found.conn_id)


def openai_client(conn_id: str) -> OpenAI:
    """Return the synchronous client of a connection of type `openai`, its key masked in logs."""
    from airflow.providers.openai.hooks.openai import OpenAIHook

    _mask(connection(conn_id))
    _quiet()
    with _client_errors(conn_id):
        client: OpenAI = OpenAIHook(conn_id=conn_id).get_conn()
    return client


def has_key(conn_id: str) -> bool:
    """Tell whether a connection of type `openai` holds a key, or says how it does without."""
    found = connection(conn_id)
    return bool(found.password) or "auth_type" in found.extra_dejson


async def async_batch_api(conn_id: str) -> AsyncBatchApi:
    """Return what a triggerer calls of the Batch API, over a client of its own: close it."""
    from airflow.providers.common.compat.connection import (
        get_async_connection,
        get_async_extra_dejson,
    )
    from airflow.providers.openai.hooks.openai import OpenAIHook

    from include.batch_api import AsyncBatchApi

    _quiet()
    found = await get_async_connection(conn_id)
    profile = _profile(found, await get_async_extra_dejson(found))
    with _client_errors(conn_id):
        client: AsyncOpenAI = await OpenAIHook(conn_id=conn_id).aget_conn()
    mask_secret(client.api_key)
    return AsyncBatchApi(client, profile)


@contextmanager
def _client_errors(conn_id: str) -> Iterator[None]:
    """Say which connection is wrong when no client can be made of it."""
    from openai import OpenAIError

    try:
        yield
    except (OpenAIError, ValueError, TypeError) as error:
        # The hook's messages name keys of the extra; the SDK's name variables, never a key.
        raise ConfigurationError(
            f"Connection {conn_id!r} gives no client of the OpenAI API: {error} Correct the "
            "connection and clear this task."
        ) from None


def batch_api(conn_id: str) -> BatchApi:
    """Return the calls of the Batch API through a connection of type `openai`."""
    from include.batch_api import CREATE_TIMEOUT, BatchApi

    return BatchApi(
        openai_client(conn_id),
        conn_id=conn_id,
        create_timeout=seconds("create_timeout", CREATE_TIMEOUT),
        profile=provider(conn_id),
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


def wait_policy(conn_id: str, deadline_hours: float | None = None) -> WaitPolicy:
    """Return how long a batch may take: as told, as set, or as long as its provider may need."""
    from include.waiting import WaitPolicy

    usual = WaitPolicy()
    hours = deadline_hours or seconds("deadline_hours", 0.0) or provider(conn_id).deadline_hours
    return WaitPolicy(
        deadline_hours=hours,
        cancel_hours=seconds("cancel_hours", usual.cancel_hours),
    )


class MissingConnectionError(ConfigurationError):
    """An Airflow connection that the job names is not defined."""


def connection(conn_id: str) -> Any:
    """Return an Airflow connection; raises `MissingConnectionError` when it is not defined."""
    try:
        return BaseHook.get_connection(conn_id)
    except AirflowNotFoundException:
        raise MissingConnectionError(
            f"Airflow connection {conn_id!r} is not defined. Add it (Admin > Connections, or "
            f"AIRFLOW_CONN_{conn_id.upper()}) and clear this task."
        ) from None


def sql_hook(conn_id: str) -> Any:
    """Return the hook of a connection to an SQL database."""
    found = connection(conn_id)
    path = SQL_HOOKS.get(found.conn_type)
    if path is not None:
        hook_class = import_string(path)
        return hook_class(**{hook_class.conn_name_attr: conn_id})
    try:
        return found.get_hook()
    except AirflowException as error:
        raise ConfigurationError(
            f"Connection {conn_id!r} has type {found.conn_type!r}, for which no provider is "
            f"installed ({error})."
        ) from None


def _quiet() -> None:
    """Keep one line per HTTP call out of the task logs: what matters is logged by us."""
    logging.getLogger("httpx2").setLevel(logging.WARNING)


def _mask(found: Any) -> None:
    """Mask the key in every form in which a log could show it."""
    if found.password:
        mask_secret(found.password)
        mask_secret(f"Bearer {found.password}")


def _airflow_home() -> Path:
    return Path(os.environ.get("AIRFLOW_HOME", "~/airflow")).expanduser()

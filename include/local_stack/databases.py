"""SQLAlchemy engines and artifacts for the connections of a stack, without Airflow.

Understands what `make demo` and `make backfill` read back: SQLite and PostgreSQL connections in
both of Airflow's forms (JSON and URI).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import sqlalchemy as sa
from sqlalchemy.engine import URL, Engine, make_url

from include.artifacts import Artifacts
from include.dataset_path import dataset_at
from include.errors import ConfigurationError
from include.job_spec import JobSpec
from include.local_stack.environment import ARTIFACTS

POSTGRES = frozenset({"postgres", "postgresql"})


def engine_of(env: Mapping[str, str], conn_id: str) -> Engine:
    """An engine for the Airflow connection `conn_id` of this environment; see `url_of`."""
    url = url_of(env, conn_id)
    if url.get_backend_name() == "sqlite":
        Path(str(url.database)).parent.mkdir(parents=True, exist_ok=True)
    return sa.create_engine(url)


def url_of(env: Mapping[str, str], conn_id: str) -> URL:
    """The address of the Airflow connection `conn_id` of this environment.

    Raises `ConfigurationError` when it is not there or of an unknown type; the message never
    holds the connection itself.
    """
    name = f"AIRFLOW_CONN_{conn_id.upper()}"
    if name not in env:
        raise ConfigurationError(
            f"{name} is not set, and job.yaml names the connection {conn_id}: export it in this "
            "terminal and in that of `make up`, or correct its name"
        )
    return _url(name, env[name])


def artifacts_of(env: Mapping[str, str]) -> Artifacts:
    """The artifacts of this environment."""
    uri = env[ARTIFACTS]
    if uri.startswith("file://"):
        return Artifacts(Path(unquote(uri.removeprefix("file://"))))
    from upath import UPath

    return Artifacts(UPath(uri))


def target_of(env: Mapping[str, str], spec: JobSpec) -> Engine | Artifacts:
    """Where a job's results go: an engine, or the files of its Parquet dataset."""
    if spec.target.path:
        return dataset_at(spec.target.path)
    return engine_of(env, spec.target.conn_id)


def _url(name: str, value: str) -> URL:
    if value.lstrip().startswith("{"):
        return _from_json(name, _fields(name, value))
    scheme, _, rest = value.partition("://")
    if scheme == "sqlite":
        path = unquote(rest.partition("?")[0])
        return URL.create("sqlite", database="/" + path.strip("/"))
    if scheme in POSTGRES:
        url = make_url(value).set(drivername="postgresql+psycopg")
        return url.difference_update_query(["__extra__"])
    raise _unknown(name, scheme)


def _fields(name: str, value: str) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = json.loads(value)
    except ValueError as error:
        # Without the value: it may hold a password.
        raise ConfigurationError(f"{name} is no JSON: {error}") from None
    return fields


def _from_json(name: str, fields: Mapping[str, Any]) -> URL:
    kind = fields.get("conn_type", "")
    if kind == "sqlite":
        return URL.create("sqlite", database=fields["host"])
    if kind in POSTGRES:
        return URL.create(
            "postgresql+psycopg",
            username=fields.get("login"),
            password=fields.get("password"),
            host=fields.get("host"),
            port=int(fields["port"]) if fields.get("port") else None,
            database=fields.get("schema"),
        )
    raise _unknown(name, kind)


def _unknown(name: str, kind: str) -> ConfigurationError:
    return ConfigurationError(
        f"{name} has type {kind!r}; the local stack can read back sqlite and postgres. "
        "The runs themselves work with any database of an installed Airflow provider."
    )

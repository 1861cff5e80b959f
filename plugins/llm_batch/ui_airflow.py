"""What our pages ask of Airflow itself: a run's state and interval, pools, and its public API."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import httpx
from airflow.configuration import conf
from airflow.models.dag import DagModel
from airflow.models.dagrun import DagRun
from airflow.models.pool import Pool
from fastapi import Request
from sqlalchemy import select
from sqlalchemy.orm import Session

from include.actions import Redrive, redrive_params
from include.errors import ConfigurationError, NotThereError, PermanentError, TransientError

FINAL = frozenset({"success", "failed"})


@dataclass(frozen=True)
class AirflowRun:
    """An Airflow run as a page needs it."""

    state: str

    @property
    def is_final(self) -> bool:
        """Whether it has ended."""
        return self.state in FINAL


@dataclass(frozen=True)
class PoolUse:
    """How full the pool is that caps what is in flight; `slots` is None when it has no bound."""

    name: str
    slots: int | None
    used: int
    waiting: int
    counts_deferred: bool


def airflow_run(session: Session, dag_id: str, run_id: str) -> AirflowRun | None:
    """Return an Airflow run, or None when there is none of that id."""
    query = select(DagRun.state).where(DagRun.dag_id == dag_id, DagRun.run_id == run_id)
    state = session.scalars(query).first()
    return None if state is None else AirflowRun(str(state))


def is_alive(session: Session, dag_id: str, run_id: str) -> bool:
    """Whether an Airflow run is queued or running; one that is gone is not."""
    found = airflow_run(session, dag_id, run_id)
    return found is not None and not found.is_final


def is_paused(session: Session, dag_id: str) -> bool:
    """Whether the DAG is paused: a run that is triggered waits."""
    query = select(DagModel.is_paused).where(DagModel.dag_id == dag_id)
    return bool(session.scalars(query).first())


def pool_use(session: Session) -> PoolUse | None:
    """Return the use of `[llm_batch] pool`; None when it is not set or there is no such pool."""
    name = conf.get("llm_batch", "pool", fallback=None)
    found = session.scalars(select(Pool).where(Pool.pool == name)).first() if name else None
    if found is None:
        return None
    stats = Pool.slots_stats(session=session)[str(found.pool)]
    used = stats["running"] + stats["queued"]
    return PoolUse(
        name=str(found.pool),
        slots=None if found.slots == -1 else found.slots,
        used=used + (stats["deferred"] if found.include_deferred else 0),
        waiting=stats["scheduled"],
        counts_deferred=found.include_deferred,
    )


async def trigger_redrive(request: Request, plan: Redrive) -> str:
    """Start an Airflow run over the partition with `redrive` set; return its run id.

    Through Airflow's public API as the user who asks: it checks their permission, validates the
    params and writes its audit log. The logical date is the moment, as a partition's own is taken.
    """
    run = plan.run
    # Airflow shows microseconds, and takes one run for each logical date.
    moment = datetime.now(UTC)
    if run.interval_end > moment:
        moment = run.interval_end + timedelta(microseconds=moment.microsecond + 1)
    body = {
        "logical_date": moment.isoformat(),
        "data_interval_start": run.interval_start.isoformat(),
        "data_interval_end": run.interval_end.isoformat(),
        "conf": redrive_params(run),
        "note": plan.note,
    }
    created = await _call(request, "POST", f"/dags/{run.dag_id}/dagRuns", body)
    return str(created["dag_run_id"])


async def fail_run(request: Request, dag_id: str, run_id: str) -> None:
    """End an Airflow run as failed, through Airflow's public API as the user who asks."""
    body = {"state": "failed", "note": "Cancelled from the page of its LLM batches."}
    try:
        await _call(request, "PATCH", f"/dags/{dag_id}/dagRuns/{quote(run_id, safe='')}", body)
    except NotThereError:
        return  # deleted in Airflow: nothing of it can wake up


async def _call(request: Request, method: str, path: str, body: dict[str, Any]) -> Any:
    from airflow.api_fastapi.main import app

    names = ("authorization", "cookie")
    headers = {name: request.headers[name] for name in names if name in request.headers}
    # Airflow's audit log tells the UI from other callers by the referer.
    headers["referer"] = str(request.url)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app),
        base_url=f"{request.url.scheme}://{request.url.netloc}",
    ) as client:
        answer = await client.request(method, f"/api/v2{path}", json=body, headers=headers)
    if answer.is_success:
        return answer.json()
    said = _detail(answer)
    if answer.status_code >= 500:
        raise TransientError(f"Airflow could not do it now (HTTP {answer.status_code}): {said}")
    if answer.status_code in {401, 403}:
        raise PermanentError(f"Airflow does not let you do this: {said}")
    if answer.status_code == 404:
        raise NotThereError(f"Airflow has no {path}: {said}")
    raise ConfigurationError(f"Airflow refused (HTTP {answer.status_code}): {said}")


def _detail(answer: httpx.Response) -> str:
    try:
        return str(answer.json().get("detail", ""))[:500]
    except (ValueError, AttributeError):
        return answer.reason_phrase

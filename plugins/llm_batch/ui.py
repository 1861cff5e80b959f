"""The pages "LLM batches" in Airflow's UI: over all jobs, of a DAG, of a run, and what to do there.

Airflow shows them in an iframe: as a page of its navigation, and as a tab of every DAG and run
(Airflow 3.3.2 cannot show a tab for some DAGs only). `ui_access` says who may do what.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from airflow.api_fastapi.common.db.common import SessionDep
from airflow.api_fastapi.core_api.security import GetUserDep
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from sqlalchemy.engine import Engine
from starlette.exceptions import HTTPException as AnyHTTPException

from include import actions, dashboard
from include.errors import ConfigurationError, LLMBatchError, PermanentError
from include.failure_rows import failed_rows
from include.ledger_records import Batch
from llm_batch import connections, ui_access, ui_actions, ui_overview, ui_pages
from llm_batch.ui_access import CanRead, CanReadRows, DagId, Id, LoggedIn, OptionalId, RunId
from llm_batch.ui_pages import found_run
from llm_batch.ui_render import error_page, page

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
STATIC = {"llm_batch.css": "text/css", "llm_batch.js": "text/javascript"}
CHUNK = 1 << 20  # bytes of a download at a time
KINDS = Literal["requests", "output", "errors", "outcomes"]

app = FastAPI(
    title="LLM batches",
    docs_url=None,
    redoc_url=None,
    openapi_url=None,
    dependencies=[LoggedIn],
)
app.middleware("http")(ui_access.with_headers)
app.include_router(ui_actions.router)


# All jobs, and one DAG


@app.get("/jobs")
@app.get("/jobs/live")
def jobs_page(
    request: Request, user: GetUserDep, session: SessionDep, until: date | None = None
) -> Response:
    """Show every job whose DAG the user may read."""
    with ui_pages.ledger() as connection:
        allowed = ui_access.readable(user)
        places = [one for one in dashboard.jobs(connection) if one.dag_id in allowed]
        if not places:
            return page("empty.html", dag_id=None)
        values = ui_overview.overview(connection, session, places, until)
        history = actions.history_on(
            connection, dag_ids=sorted({one.dag_id for one in places}), limit=10
        )
    return page(_template("jobs", request), until=until, dag_id=None, history=history, **values)


@app.get("/dag", dependencies=[CanRead])
@app.get("/dag/live", dependencies=[CanRead])
def dag_page(
    request: Request, dag_id: DagId, session: SessionDep, until: date | None = None
) -> Response:
    """Show the jobs of one DAG, and its newest runs."""
    with ui_pages.ledger() as connection:
        places = [one for one in dashboard.jobs(connection) if one.dag_id == dag_id]
        if not places:
            return page("empty.html", dag_id=dag_id)
        values = ui_overview.overview(connection, session, places, until)
        latest = ui_overview.latest(connection, dag_id)
        history = actions.history_on(connection, dag_ids=[dag_id], limit=10)
    return page(
        _template("dag", request),
        until=until,
        dag_id=dag_id,
        latest=latest,
        history=history,
        **values,
    )


def _template(name: str, request: Request) -> str:
    return f"{name}_live.html" if request.url.path.endswith("/live") else f"{name}.html"


# One run


@app.get("/run", dependencies=[CanRead])
@app.get("/run/live", dependencies=[CanRead])
def run_page(
    request: Request,
    user: GetUserDep,
    session: SessionDep,
    dag_id: DagId,
    run_id: RunId,
    ledger_run: OptionalId = None,
    said: Annotated[int | None, Query(ge=1)] = None,
) -> Response:
    """Show one Airflow run's batches; `ledger_run` chooses among several of the ledger."""
    with ui_pages.ledger() as connection:
        runs, airflow = ui_pages.find_run(connection, session, dag_id, run_id)
        if not runs:
            return page("no_run.html", dag_id=dag_id, run_id=run_id, airflow=airflow)
        chosen = [one for one in runs if one.run_id == ledger_run] or runs
        ordered = [chosen[0], *(one for one in runs if one is not chosen[0])]
        values = ui_pages.run_page(connection, session, ordered, airflow)
    return page(
        _template("run", request),
        dag_id=dag_id,
        run_id=run_id,
        ledger_run=ledger_run,
        said=next((one for one in values["history"] if one.action_id == said), None),
        may_cancel=ui_access.may_cancel(user, dag_id),
        may_redrive=ui_access.may_redrive(user, dag_id),
        may_read_rows=ui_access.may_read_rows(user, dag_id),
        **values,
    )


@app.get("/failures", dependencies=[CanRead])
def failures_page(user: GetUserDep, dag_id: DagId, ledger_run: Id) -> Response:
    """Show failed rows of a run; keys and messages only to who may read the DAG's data."""
    run = found_run(dag_id, ledger_run)
    spec = ui_pages.pinned(run)
    with_text = ui_access.may_read_rows(user, dag_id)
    place = connections.target(spec) if spec else None
    found = (
        failed_rows(place, spec, run.run_id, with_text=with_text)
        if spec and isinstance(place, Engine)
        else None
    )
    return page(
        "failures.html",
        dag_id=dag_id,
        run=run,
        spec=spec,
        found=found,
        with_text=with_text,
        now=datetime.now(UTC),
    )


@app.get("/artifact", dependencies=[CanRead, CanReadRows])
def artifact(dag_id: DagId, ledger_run: Id, submission_id: Id, kind: KINDS) -> Response:
    """Download one file of a batch."""
    run = found_run(dag_id, ledger_run)
    batch = ui_pages.writable_ledger().batch(submission_id)
    if batch.run_id != run.run_id:
        raise HTTPException(404, "The run has no such batch.")
    path = _artifact_path(batch, kind)
    files = connections.artifacts()
    if path is None or not files.exists(path):
        raise HTTPException(404, f"Batch {batch.batch_id} has no file of {kind}.")
    name = f"{batch.job}-round{batch.round}-shard{batch.shard}-{kind}{Path(path).suffix}"
    return StreamingResponse(
        _chunks(files.open(path)),
        media_type="application/octet-stream",
        headers={"Content-Disposition": f'attachment; filename="{name}"'},
    )


def _artifact_path(batch: Batch, kind: str) -> str | None:
    stem = batch.request_file.removesuffix(".jsonl")
    paths = {
        "requests": batch.request_file,
        "output": f"{stem}.output.jsonl",
        "errors": f"{stem}.error.jsonl",
        "outcomes": batch.outcomes_file,
    }
    return paths[kind]


def _chunks(stream: Any) -> Iterator[bytes]:
    with stream:
        while chunk := stream.read(CHUNK):
            yield chunk


# What pages are made of, and errors


@app.get("/static/{name}")
def static(name: str) -> Response:
    """Return the style sheet or the script."""
    if name not in STATIC:
        raise HTTPException(404, "There is no such file.")
    return Response(
        (HERE / "static" / name).read_bytes(),
        media_type=STATIC[name],
        headers={"Cache-Control": "private, max-age=31536000, immutable"},
    )


@app.exception_handler(AnyHTTPException)
async def _http_error(_request: Request, error: AnyHTTPException) -> Response:
    return error_page(error.status_code, str(error.detail))


@app.exception_handler(RequestValidationError)
async def _bad_request(_request: Request, error: RequestValidationError) -> Response:
    wrong = ", ".join(sorted({str(one["loc"][-1]) for one in error.errors()}))
    return error_page(422, f"The address of this page is not valid: look at {wrong}.")


@app.exception_handler(ui_pages.LedgerNotReadyError)
async def _not_ready(_request: Request, error: ui_pages.LedgerNotReadyError) -> Response:
    if "no tables" in str(error):
        return page("empty.html", dag_id=None)
    return error_page(503, str(error))


@app.exception_handler(LLMBatchError)
async def _told_error(_request: Request, error: LLMBatchError) -> Response:
    is_refusal = isinstance(error, ConfigurationError | PermanentError)
    return error_page(409 if is_refusal else 503, str(error))


@app.exception_handler(sa.exc.SQLAlchemyError)
async def _database_error(_request: Request, error: sa.exc.SQLAlchemyError) -> Response:
    log.error("A page of LLM batches could not be made.", exc_info=error)
    return error_page(
        503,
        f"A database could not be read ({type(error).__name__}). The API server's log says more.",
    )

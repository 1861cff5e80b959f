"""Cancel, close and redrive: a question that shows what would happen, and the form that does it."""

from __future__ import annotations

from typing import Annotated, Any

from airflow.api_fastapi.common.db.common import SessionDep
from airflow.api_fastapi.core_api.security import GetUserDep
from airflow.api_fastapi.logging.decorators import action_logging
from airflow.utils.session import create_session
from anyio import from_thread, to_thread
from fastapi import APIRouter, Depends, Form, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from include import actions, closing
from include.actions import Actor
from include.ledger_records import Run
from llm_batch import connections, ui_access, ui_airflow, ui_pages
from llm_batch.ui_access import CanCancel, CanRead, CanRedrive, DagId, Id, OptionalId
from llm_batch.ui_pages import found_run
from llm_batch.ui_render import at, page

router = APIRouter()


@router.get("/cancel", dependencies=[CanRead, CanCancel])
def ask_cancel(
    request: Request,
    user: GetUserDep,
    dag_id: DagId,
    ledger_run: Id,
    submission_id: OptionalId = None,
) -> Response:
    """Ask whether to cancel, with what it would do."""
    run = found_run(dag_id, ledger_run)
    plan = actions.plan_cancel(ui_pages.writable_ledger(), run.run_id, submission_id)
    purpose = f"cancel {run.run_id} {submission_id or ''}"
    return _question(request, user, "cancel.html", purpose, plan=plan, submission_id=submission_id)


@router.post(
    "/cancel",
    dependencies=[CanRead, CanCancel, Depends(action_logging(event="llm_batch_cancel"))],
)
async def cancel(
    request: Request,
    user: GetUserDep,
    dag_id: DagId,
    ledger_run: Id,
    token: Annotated[str, Form(max_length=1_000)],
    submission_id: OptionalId = None,
) -> Response:
    """Cancel a batch or a run, and go back to the run's page."""
    ui_access.check_form(request, user, f"cancel {ledger_run} {submission_id or ''}", token)
    run = await to_thread.run_sync(found_run, dag_id, ledger_run)

    def end_run(other_dag: str, airflow_run: str) -> None:
        with create_session() as session:
            is_alive = ui_airflow.is_alive(session, other_dag, airflow_run)
        if is_alive:  # one that has succeeded stays so
            from_thread.run(ui_airflow.fail_run, request, other_dag, airflow_run)

    def act() -> actions.Action:
        ledger = ui_pages.writable_ledger()
        plan = actions.plan_cancel(ledger, run.run_id, submission_id)
        return actions.cancel(plan, ledger, connections.batch_api, _actor(user), end_run=end_run)

    return _back(run, await to_thread.run_sync(act))


@router.get("/close", dependencies=[CanRead, CanCancel])
def ask_close(
    request: Request, user: GetUserDep, session: SessionDep, dag_id: DagId, ledger_run: Id
) -> Response:
    """Ask whether to close a run, with what it would do."""
    run = found_run(dag_id, ledger_run)
    plan = ui_pages.plan_close(session, run)
    return _question(request, user, "close.html", f"close {run.run_id}", plan=plan)


@router.post(
    "/close",
    dependencies=[CanRead, CanCancel, Depends(action_logging(event="llm_batch_close"))],
)
def close(
    request: Request,
    user: GetUserDep,
    session: SessionDep,
    dag_id: DagId,
    ledger_run: Id,
    token: Annotated[str, Form(max_length=1_000)],
) -> Response:
    """Close a run, and go back to its page."""
    ui_access.check_form(request, user, f"close {ledger_run}", token)
    plan = ui_pages.plan_close(session, found_run(dag_id, ledger_run))
    ledger = ui_pages.writable_ledger()
    places = closing.Places(ledger, connections.artifacts(), connections.submission)
    return _back(plan.run, closing.close(plan, places, _actor(user)))


@router.get("/redrive", dependencies=[CanRead, CanRedrive])
def ask_redrive(
    request: Request, user: GetUserDep, session: SessionDep, dag_id: DagId, ledger_run: Id
) -> Response:
    """Ask whether to redrive, with what it would cost."""
    run = found_run(dag_id, ledger_run)
    plan = _plan_redrive(run)
    return _question(
        request,
        user,
        "redrive.html",
        f"redrive {run.run_id}",
        plan=plan,
        is_paused=ui_airflow.is_paused(session, dag_id),
    )


@router.post(
    "/redrive",
    dependencies=[CanRead, CanRedrive, Depends(action_logging(event="llm_batch_redrive"))],
)
async def redrive(
    request: Request,
    user: GetUserDep,
    dag_id: DagId,
    ledger_run: Id,
    token: Annotated[str, Form(max_length=1_000)],
) -> Response:
    """Trigger a run over the partition's failed rows, and go back to the run's page."""
    ui_access.check_form(request, user, f"redrive {ledger_run}", token)
    run = await to_thread.run_sync(found_run, dag_id, ledger_run)

    def trigger(plan: actions.Redrive) -> str:
        return from_thread.run(ui_airflow.trigger_redrive, request, plan)

    def act() -> actions.Action:
        plan = _plan_redrive(run)
        return actions.redrive(plan, ui_pages.writable_ledger(), _actor(user), trigger=trigger)

    return _back(run, await to_thread.run_sync(act))


def _plan_redrive(run: Run) -> actions.Redrive:
    job = connections.job_now(run.job)
    return actions.plan_redrive(ui_pages.writable_ledger(), run.run_id, job)


def _question(
    request: Request, user: Any, template: str, purpose: str, **values: Any
) -> HTMLResponse:
    # The cookie and the token in the form must be of one response.
    carrier = Response()
    token = ui_access.form_token(request, carrier, user, purpose)
    run = values["plan"].run
    asked = page(template, token=token, run=run, dag_id=run.dag_id, **values)
    asked.raw_headers += [one for one in carrier.raw_headers if one[0] == b"set-cookie"]
    return asked


def _actor(user: Any) -> Actor:
    return Actor(str(user.get_name()), "ui")


def _back(run: Run, done: actions.Action) -> RedirectResponse:
    there = at(
        "run",
        dag_id=run.dag_id,
        run_id=run.dag_run_id,
        ledger_run=run.run_id,
        said=done.action_id,
    )
    return RedirectResponse(there, status_code=303)

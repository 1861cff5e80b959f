"""What somebody on call changes: cancel, close, redrive, erase. Each says it, and asks."""

from __future__ import annotations

import argparse
import getpass
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeVar

from include import actions, closing, overview
from include.actions import Action, ActionKind, Actor, Cancellation
from include.errors import LLMBatchError
from include.figures import counted, money, noun
from include.ledger import Ledger
from include.overview import plain
from include.text_table import text_table
from llm_batch import airflow_runs, connections
from llm_batch.answer import DECLINED, FAILED, LOOK, OK, Answer

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

Plan = TypeVar("Plan")

SHORT = 12  # characters of a run id that are shown


def cancel(options: argparse.Namespace, engine: Engine) -> Answer:
    """Cancel one run, one batch of it, or every open run, after a question."""
    ledger = Ledger(engine)
    plans = _plans(options, engine, ledger)
    if not plans:
        return Answer([], "No run is open: there is nothing to cancel.")
    told = _told(plans, options.width)
    if not _agreed(options, told, "Cancel?"):
        return Answer([_plan_data(one) for one in plans], f"{told}\n\n{_nothing()}", DECLINED)
    lines, data, code = [], [], OK
    for plan in plans:
        try:
            done = _cancel(plan, ledger, _actor(options))
        except LLMBatchError as error:
            # The others are cancelled all the same: each goes on costing until then.
            code = FAILED
            lines.append(f"{plan.run}: {error}")
            data.append(_plan_data(plan) | {"error": str(error)})
        else:
            lines.append(f"{plan.run}: {_outcome(done)}")
            data.append(_plan_data(plan) | {"action": _action_data(done)})
    return Answer(data, "\n".join(lines), code)


def _plans(options: argparse.Namespace, engine: Engine, ledger: Ledger) -> list[Cancellation]:
    if options.all:
        opened = overview.open_runs(engine, options.job)
        return actions.plan_cancel_all(ledger, [one["run_id"] for one in opened])
    run = overview.find_run(engine, options.run)
    submission = None
    if options.batch:
        batch = ledger.batch_by_id(options.batch)
        submission = options.batch if batch is None else batch.submission_id
    return [actions.plan_cancel(ledger, run.run_id, submission)]


def _told(plans: Sequence[Cancellation], width: int) -> str:
    header = ("run", "job", "partition", "batches", "requests", "answered", "open", "paid", "saves")
    rows = [
        (
            one.run.run_id[:SHORT],
            one.run.job,
            one.run.interval_start,
            len(one.batches),
            one.requests,
            one.answered,
            one.open,
            one.paid_usd,
            one.saved_usd,
        )
        for one in plans
    ]
    is_whole = any(one.is_whole_run for one in plans)
    then = (
        "Their Airflow runs are marked as failed, and their batches cancelled at the API. What "
        "is answered is kept: it is collected, not paid again, when the partition runs again."
        if is_whole
        else "The batch is cancelled at the API. Its run goes on: what is answered is collected, "
        "the rest goes to the next round."
    )
    return f"{text_table(header, rows, width=width)}\n\n{then}"


def _cancel(plan: Cancellation, ledger: Ledger, actor: Actor) -> Action:
    end_run = airflow_runs.fail_run
    return actions.cancel(plan, ledger, connections.batch_api, actor, end_run=end_run)


def close(options: argparse.Namespace, engine: Engine) -> Answer:
    """End one run for good, after a question."""
    ledger = Ledger(engine)
    run = overview.find_run(engine, options.run)

    def plan_close() -> closing.Closing:
        return closing.plan_close(ledger, run.run_id, is_alive=airflow_runs.is_alive)

    plan, is_agreed = _decided(options, plan_close, closing.Closing.text, "Close?")
    data: dict[str, Any] = plan.as_dict()
    if not is_agreed:
        return Answer(data, f"{plan.text()}\n{_nothing()}", DECLINED)
    places = closing.Places(ledger, connections.artifacts(), connections.submission)
    done = closing.close(plan, places, _actor(options))
    return Answer(data | {"action": _action_data(done)}, f"{plan.run}: {_outcome(done)}")


def redrive(options: argparse.Namespace, engine: Engine) -> Answer:
    """Send the failed rows of one partition again, after a question."""
    ledger = Ledger(engine)
    run = overview.run_at(engine, options.job, options.day)

    def plan_redrive() -> actions.Redrive:
        return actions.plan_redrive(ledger, run.run_id, connections.job_now(run.job))

    plan, is_agreed = _decided(options, plan_redrive, _redrive_text, "Redrive?")
    data: dict[str, Any] = {
        "run_id": run.run_id,
        "rows": plan.rows,
        "cost_usd": _usd(plan.cost_usd),
    }
    if not is_agreed:
        return Answer(data, f"{_redrive_text(plan)}\n{_nothing()}", DECLINED)
    actor = _actor(options)

    def trigger(plan: actions.Redrive) -> str:
        return airflow_runs.trigger_redrive(plan, who=actor.name)

    done = actions.redrive(plan, ledger, actor, trigger=trigger)
    lines = [f"{plan.run}: {_outcome(done)}"]
    if airflow_runs.is_paused(run.dag_id):
        lines.append(
            f"DAG {run.dag_id} is paused: the run waits until `airflow dags unpause {run.dag_id}`."
        )
    return Answer(data | {"action": _action_data(done)}, "\n".join(lines))


def _redrive_text(plan: actions.Redrive) -> str:
    cost = money(plan.cost_usd)
    if plan.is_changed:
        rows = counted(plan.rows, "row is", "rows are")
        return (
            f"{plan.run}: its job asks something else by now, so {rows} sent, loaded ones too, "
            f"about {cost}."
        )
    failed = counted(plan.rows, "failed row is", "failed rows are")
    return f"{plan.run}: {failed} sent again, about {cost}. Rows that are loaded are left out."


def erase(options: argparse.Namespace, engine: Engine) -> Answer:
    """Delete one row's data wherever this project has put it, after a question."""
    from include import erasure
    from llm_batch.housekeeping import housekeeping

    keeping = housekeeping(apply=True)
    ledger = Ledger(engine)

    def traces() -> list[erasure.Trace]:
        return erasure.traces(options.job, options.key, ledger, keeping.artifacts)

    def told(found: Sequence[erasure.Trace]) -> str:
        return _erase_text(options.job, len(found))

    if not ledger.runs(options.job, limit=1):
        return Answer({"runs": []}, f"The ledger knows no run of job {options.job}.")
    found, is_agreed = _decided(options, traces, told, "Erase?")
    data: dict[str, Any] = {"runs": [one.run.run_id for one in found]}
    if not is_agreed:
        return Answer(data, f"{told(found)}\n{_nothing()}", DECLINED)
    runs = [one.run for one in found] or ledger.runs(options.job, limit=1)
    with ExitStack() as records:
        for run in runs:
            records.enter_context(actions.audited(ledger, run, ActionKind.ERASE, _actor(options)))
        done = erasure.erase(found, keeping, connections.target, job=options.job, key=options.key)
    erased = (
        f"Erased: {counted(done.rows, 'line')} of results and failures, "
        f"{counted(done.files, 'file')} at the provider, "
        f"the artifacts of {counted(done.runs, 'run')}."
    )
    lines = [erased, *(f"Left: {one}" for one in done.left)]
    return Answer(data | asdict(done), "\n".join(lines), LOOK if done.left else OK)


def _erase_text(job: str, runs: int) -> str:
    return (
        f"{counted(runs, 'run')} of job {job} {noun(runs, 'has', 'have')} this row. Artifacts and "
        "files at the provider are deleted, and the row's lines in results and failures. Delete it "
        "in the source first: what is in the source is sent again."
    )


def _decided(
    options: argparse.Namespace,
    plan: Callable[[], Plan],
    told: Callable[[Plan], str],
    question: str,
) -> tuple[Plan, bool]:
    """Plan, tell, and ask; return the plan, and whether it shall be done.

    After a yes it is planned again, which raises when it cannot be done any more: people think for
    as long as they like, and runs go on meanwhile.
    """
    found = plan()
    if options.yes:
        return found, True
    return (plan(), True) if _agreed(options, told(found), question) else (found, False)


def _agreed(options: argparse.Namespace, told: str, question: str) -> bool:
    """Ask whoever sits at the terminal; nobody there means no."""
    if options.yes:
        return True
    if options.json or not sys.stdin.isatty():
        return False
    print(told, file=sys.stderr)
    return input(f"{question} [y/N] ").strip().lower() in {"y", "yes"}


def _nothing() -> str:
    return "Nothing was done. Say --yes to do it."


def _actor(options: argparse.Namespace) -> Actor:
    name = options.who or f"{getpass.getuser()}@{socket.gethostname()}"
    return Actor(name, "cli")


def _outcome(done: Action) -> str:
    return f"{done.kind} {done.outcome} by {done.who}. {done.detail or 'Nothing was at the API.'}"


def _plan_data(plan: Cancellation) -> dict[str, Any]:
    return {
        "run_id": plan.run.run_id,
        "batches": [one.batch_id for one in plan.batches],
        "requests": plan.requests,
        "answered": plan.answered,
        "open": plan.open,
        "paid_usd": _usd(plan.paid_usd),
        "saved_usd": _usd(plan.saved_usd),
    }


def _action_data(done: Action) -> dict[str, Any]:
    return {name: plain(value) for name, value in asdict(done).items()}


def _usd(amount: Decimal | None) -> str | None:
    return None if amount is None else format(amount, "f")

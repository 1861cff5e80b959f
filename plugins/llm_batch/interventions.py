"""What somebody on call changes: cancel, close, redrive, erase. Each says it, and asks."""

from __future__ import annotations

import argparse
import getpass
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from decimal import Decimal
from typing import TYPE_CHECKING, Any

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
    plan = closing.plan_close(ledger, run.run_id, is_alive=airflow_runs.is_alive)
    data: dict[str, Any] = plan.as_dict()
    if not _agreed(options, plan.text(), "Close?"):
        return Answer(data, f"{plan.text()}\n{_nothing()}", DECLINED)
    places = closing.Places(ledger, connections.artifacts(), connections.submission)
    done = closing.close(plan, places, _actor(options))
    return Answer(data | {"action": _action_data(done)}, f"{plan.run}: {_outcome(done)}")


def redrive(options: argparse.Namespace, engine: Engine) -> Answer:
    """Send the failed rows of one partition again, after a question."""
    ledger = Ledger(engine)
    run = overview.run_at(engine, options.job, options.day)
    plan = actions.plan_redrive(ledger, run.run_id, connections.job_now(run.job))
    told = _redrive_text(plan)
    data: dict[str, Any] = {
        "run_id": run.run_id,
        "rows": plan.rows,
        "cost_usd": _usd(plan.cost_usd),
    }
    if not _agreed(options, told, "Redrive?"):
        return Answer(data, f"{told}\n{_nothing()}", DECLINED)
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
    found = erasure.traces(options.job, options.key, Ledger(engine), keeping.artifacts)
    told = (
        f"{counted(len(found), 'run')} of job {options.job} {noun(len(found), 'has', 'have')} this "
        "row. Artifacts and files at the provider are deleted, and the row's lines in results and "
        "failures. Delete it in the source first: what is in the source is sent again."
    )
    data: dict[str, Any] = {"runs": [one.run.run_id for one in found]}
    runs = [one.run for one in found] or keeping.ledger.runs(options.job, limit=1)
    if not runs:
        return Answer(data, f"The ledger knows no run of job {options.job}.")
    if not _agreed(options, told, "Erase?"):
        return Answer(data, f"{told}\n{_nothing()}", DECLINED)
    with ExitStack() as records:
        for run in runs:
            records.enter_context(
                actions.audited(keeping.ledger, run, ActionKind.ERASE, _actor(options))
            )
        done = erasure.erase(found, keeping, connections.target, job=options.job, key=options.key)
    told = (
        f"Erased: {counted(done.rows, 'line')} of results and failures, "
        f"{counted(done.files, 'file')} at the provider, "
        f"the artifacts of {counted(done.runs, 'run')}."
    )
    lines = [told, *(f"Left: {one}" for one in done.left)]
    return Answer(data | asdict(done), "\n".join(lines), LOOK if done.left else OK)


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

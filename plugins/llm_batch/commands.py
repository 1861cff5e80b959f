"""The commands of `python -m llm_batch`; each returns an `Answer`."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from include import actions, ledger_database, overview
from include.figures import counted
from include.ledger import Ledger
from include.ledger_records import Batch, Run
from include.overview import plain
from include.report import RunReport, run_report
from include.text_table import printable, text_table
from llm_batch import connections, interventions
from llm_batch.answer import LOOK, OK, Answer

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine, RowMapping

    from include.actions import Action
    from include.audit_report import AuditReport, Promise

SHORT = 12  # characters of a run id that are shown: enough to type
EVENTS = 20  # of a run's history
NO_RUNS = "The ledger has no runs yet."


def status(options: argparse.Namespace) -> Answer:
    """Tell what runs, what it has cost today, and what needs a look."""
    engine = _ledger_engine()
    jobs = overview.job_statuses(engine, options.job)
    opened = overview.open_runs(engine, options.job)
    notices = overview.notices(engine, options.job)
    parts = [_jobs_table(jobs, options.width) if jobs else NO_RUNS]
    if opened:
        parts.append(_open_runs_table(opened, options.width))
    parts.append(_notices(notices))
    data = {
        "jobs": [_json(asdict(one)) for one in jobs],
        "open_runs": [_json(dict(one)) for one in opened],
        "needs_a_look": [asdict(one) for one in notices],
    }
    return Answer(data, "\n\n".join(parts), LOOK if notices else OK)


def _jobs_table(jobs: Sequence[overview.JobStatus], width: int) -> str:
    now = datetime.now(UTC)
    header = ("job", "open", "at the API", "requests", "done", "oldest", "last done", "today")
    rows = [
        (
            one.job,
            one.open_runs,
            one.in_flight,
            one.requests,
            one.done,
            None if one.oldest is None else now - one.oldest,
            one.last_done,
            "unknown" if one.today_usd is None else one.today_usd,
        )
        for one in jobs
    ]
    return text_table(header, rows, width=width)


def _open_runs_table(opened: Sequence[RowMapping], width: int) -> str:
    now = datetime.now(UTC)
    header = ("open run", "job", "partition", "mode", "age", "rows", "round", "batches")
    rows = [
        (
            one["run_id"][:SHORT],
            one["job"],
            one["interval_start"],
            one["mode"],
            now - one["created_at"],
            one["rows"],
            one["round"],
            f"{one['collected']} of {one['batches']} collected",
        )
        for one in opened
    ]
    return text_table(header, rows, width=width)


def _notices(notices: Sequence[overview.Notice]) -> str:
    if not notices:
        return "Nothing needs a look."
    lines = [f"- {printable(f'{one.about} {one.what}')}.\n  Do: {one.then}" for one in notices]
    return "\n".join(("Needs a look:", *lines))


def batches(options: argparse.Namespace) -> Answer:
    """List what is at the API, or the newest batches of all."""
    found = overview.batches(_ledger_engine(), job=options.job, every=options.all)
    now = datetime.now(UTC)
    rows = [
        (
            one.batch_id or f"submission {one.submission_id[:SHORT]}",
            one.job,
            one.round,
            one.shard,
            one.state,
            one.api_status,
            f"{one.done_requests:,} of {one.requests:,}",
            one.failed_requests,
            None if one.submitted_at is None else now - one.submitted_at,
            one.run_id[:SHORT],
        )
        for one in found
    ]
    header = ("batch", "job", "round", "shard", "state", "status", "done", "failed", "age", "run")
    nothing = "No batch." if options.all else "Nothing is at the API."
    text = text_table(header, rows, width=options.width) if rows else nothing
    return Answer([_json(asdict(one)) for one in found], text)


def runs(options: argparse.Namespace) -> Answer:
    """List the newest runs."""
    found = overview.runs(_ledger_engine(), job=options.job, limit=options.limit)
    header = (
        *("run", "job", "partition", "mode", "state", "rows", "loaded", "failed", "reused"),
        *("estimate", "cost"),
    )
    rows = [
        (
            one.run_id[:SHORT],
            one.job,
            one.interval_start,
            one.mode,
            one.state,
            one.rows,
            one.loaded,
            one.failed,
            one.reused,
            one.estimate_usd,
            one.cost_usd,
        )
        for one in found
    ]
    text = text_table(header, rows, width=options.width) if rows else NO_RUNS
    return Answer([_run_data(one) for one in found], text)


def show(options: argparse.Namespace) -> Answer:
    """Tell all about one run."""
    engine = _ledger_engine()
    run, ledger = overview.find_run(engine, options.run), Ledger(engine)
    report, rounds = run_report(run, ledger), ledger.rounds(run.run_id)
    found, history = ledger.batches(run.run_id), ledger.history(run.run_id)
    done = actions.history(ledger, run_id=run.run_id)[::-1]  # oldest first, as the history
    parts = [
        _about(run, report),
        *([_batches_table(found, options.width)] if found else []),
        _history_table(history[-EVENTS:], found, options.width),
        *([_actions_table(done, options.width)] if done else []),
    ]
    data = {
        "run": _run_data(run),
        "report": report.as_dict(),
        "rounds": [_json(asdict(one)) for one in rounds],
        "batches": [_json(asdict(one)) for one in found],
        "history": [_json(dict(one)) for one in history],
        "actions": [_json(asdict(one)) for one in done],
    }
    return Answer(data, "\n\n".join(parts))


def _about(run: Run, report: RunReport) -> str:
    return (
        f"{report.text()}\n{run.state}, mode {run.mode}, generation {run.generation}, Airflow run "
        f"{printable(run.dag_run_id)} of DAG {printable(run.dag_id)}\n"
        f"artifacts {connections.artifacts().uri(run.directory)}"
    )


def _batches_table(found: Sequence[Batch], width: int) -> str:
    header = (
        *("round", "shard", "batch", "state", "status", "requests", "succeeded"),
        *("again", "failed", "missing", "cost"),
    )
    rows = [
        (
            one.round,
            one.shard,
            one.batch_id,
            one.state,
            one.api_status,
            one.requests,
            one.succeeded,
            one.retry,
            one.failed,
            one.missing,
            one.cost_usd,
        )
        for one in found
    ]
    return text_table(header, rows, width=width)


def _history_table(history: Sequence[RowMapping], found: Sequence[Batch], width: int) -> str:
    places = {one.submission_id: f"{one.round}.{one.shard}" for one in found}
    rows = [
        (
            f"{one['at']:%F %T}",
            places.get(one["submission_id"]),
            one["was"],
            one["became"],
            one["detail"],
        )
        for one in history
    ]
    return text_table(("at (UTC)", "round.shard", "was", "became", "detail"), rows, width=width)


def _actions_table(done: Sequence[Action], width: int) -> str:
    rows = [(f"{one.at:%F %T}", one.who, one.kind, one.outcome, one.detail) for one in done]
    return text_table(("at (UTC)", "who", "did", "outcome", "detail"), rows, width=width)


def costs(options: argparse.Namespace) -> Answer:
    """Tell what a month has cost, by job, or by day of one job."""
    from include.cost_table import cost_json, cost_table
    from include.costs import costs_by_day, costs_by_job
    from include.price_doubts import price_doubts

    ledger = Ledger(_ledger_engine())
    lines = (
        costs_by_day(ledger, options.job, options.month)
        if options.job
        else costs_by_job(ledger, options.month)
    )
    text = cost_table("day" if options.job else "job", lines) if lines else "Nothing was collected."
    doubts = price_doubts((line.model for line in lines), datetime.now(UTC).date())
    text = "\n\n".join([text, *(["\n".join(doubts)] if doubts else [])])
    return Answer(json.loads(cost_json(lines)), text)


def cancel(options: argparse.Namespace) -> Answer:
    """Stop the spend of a run, of one batch, or of all."""
    return interventions.cancel(options, _ledger_engine())


def close(options: argparse.Namespace) -> Answer:
    """End a run that nobody will finish."""
    return interventions.close(options, _ledger_engine())


def redrive(options: argparse.Namespace) -> Answer:
    """Send the failed rows of a partition again."""
    return interventions.redrive(options, _ledger_engine())


def erase(options: argparse.Namespace) -> Answer:
    """Delete one row's data on request."""
    return interventions.erase(options, _ledger_engine())


def audit(options: argparse.Namespace) -> Answer:
    """Hold the newest runs against every invariant that needs no simulator."""
    from include.audit_report import audit_report

    engine = _ledger_engine()
    chosen = (
        [overview.find_run(engine, options.run)]
        if options.run
        else overview.runs(engine, job=options.job, limit=options.limit)
    )
    report = audit_report(
        chosen, Ledger(engine), connections.artifacts(), connections.target, connections.batch_api
    )
    data = asdict(report) | {"holds": report.holds}
    return Answer(data, _audit_text(report, options.width), OK if report.holds else LOOK)


def _audit_text(report: AuditReport, width: int) -> str:
    from include.audit_report import ONLY_TESTS

    rows = [
        (one.invariant, one.text, "holds" if one.holds else "BROKEN") for one in report.promises
    ]
    rows += [(name, text, "tests only") for name, text in ONLY_TESTS.items()]
    rows.sort(key=lambda row: int(row[0][1:]))
    why = Counter(_first_words(reason) for reason in report.skipped.values())
    skipped = "".join(f"; {number} not: {reason}" for reason, number in why.items())
    parts = [
        text_table(("", "promise", ""), rows, width=width),
        f"{counted(len(report.runs), 'run was', 'runs were')} looked at{skipped}.",
    ]
    parts += [_broken(one) for one in report.promises if not one.holds]
    return "\n\n".join(parts)


def _first_words(reason: str) -> str:
    return "their artifacts are gone" if reason.startswith("Artifact ") else reason


def _broken(promise: Promise) -> str:
    lines = [f"- {printable(one)}" for one in promise.findings]
    return "\n".join((f"{promise.invariant} is BROKEN:", *lines, f"  Do: {promise.mend}"))


def doctor(options: argparse.Namespace) -> Answer:
    """Look at everything that a run needs."""
    from include.health import Level
    from llm_batch.doctor import examine

    checks = examine()
    bad = [one for one in checks if one.level == Level.BAD]
    warnings = [one for one in checks if one.level == Level.WARNING]
    rows = [(one.level, one.name, one.found) for one in checks]
    parts = [text_table(("", "what", "found"), rows, width=options.width)]
    mends = [f"- {one.name}: {one.mend}" for one in (*bad, *warnings)]
    if mends:
        parts.append("\n".join(("To mend:", *mends)))
    parts.append(
        f"{counted(len(checks), 'check')}, {len(bad)} bad, {counted(len(warnings), 'warning')}."
        + ("" if bad else " Runs can start.")
    )
    return Answer([asdict(one) for one in checks], "\n\n".join(parts), LOOK if bad else OK)


def migrate(_options: argparse.Namespace) -> Answer:
    """Bring the ledger to this release's tables."""
    engine = connections.ledger_engine()
    ledger_database.migrate(ledger_database.prepare(engine))
    where = engine.url.render_as_string(hide_password=True)
    head = ledger_database.HEAD
    return Answer(
        {"ledger": where, "migration": head}, f"The ledger {where} is at migration {head}."
    )


def _ledger_engine() -> Engine:
    """Return the ledger's engine, which is at this release's migration."""
    engine = connections.ledger_engine()
    ledger_database.check(engine)
    return engine


def _run_data(run: Run) -> dict[str, Any]:
    """Return a run as JSON, without the text of its spec."""
    return {name: value for name, value in _json(asdict(run)).items() if name != "spec"}


def _json(values: dict[str, Any]) -> dict[str, Any]:
    return {name: plain(value) for name, value in values.items()}

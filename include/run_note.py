"""What a run came to in a few lines: the note that people see first on an Airflow run."""

from __future__ import annotations

from include.figures import counted, money
from include.ledger_records import Run, RunState
from include.report import RunReport

SIGN = "LLM batches: "  #: how our notes begin; a note that does not is a person's
LONGEST = 1000  # characters; Airflow keeps no more
REASONS_SHOWN = 5


def note(run: Run, report: RunReport) -> str:
    """Return rows, problems, requests and money of a run, at most `LONGEST` characters."""
    lines = (_rows(run, report), _problems(report), _requests(report), _money(report))
    text = "  \n".join(filter(None, lines))  # two blanks: a line break in Markdown
    return f"{SIGN}{text}"[:LONGEST]


def is_ours(text: str | None) -> bool:
    """Tell whether a note is missing, or one that may be written anew."""
    return not text or text.startswith(SIGN)


def _rows(run: Run, report: RunReport) -> str:
    if run.state != RunState.DONE:
        return f"nothing loaded yet of {counted(report.rows, 'row')}"
    loaded = f"{report.loaded:,} of {counted(report.rows, 'row')} loaded, {report.failed:,} failed"
    more = [
        f"{number:,} {name}"
        for name, number in (("reused", report.reused), ("shared", report.shared))
        if number
    ]
    return ", ".join([loaded, *more])


def _problems(report: RunReport) -> str:
    shown = list(report.reasons.items())[:REASONS_SHOWN]
    return "problems: " + ", ".join(f"{name} {n}" for name, n in shown) if shown else ""


def _requests(report: RunReport) -> str:
    counts = (
        (report.requests, "request"),
        (report.batches, "batch"),
        (report.rounds, "round"),
    )
    return ", ".join(counted(number, what) for number, what in counts)


def _money(report: RunReport) -> str:
    return (
        f"cost {money(report.cost_usd)}, estimate {money(report.estimate_usd)}, "
        f"real-time {money(report.realtime_usd)}"
    )

"""`python -m llm_batch`: what somebody on call needs, from a terminal.

Exit codes: 0 all is well · 1 something needs a look · 2 the command line is wrong · 3 it could not
be done, the message says why · 4 nothing was done, because nobody said yes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from datetime import UTC, datetime, timedelta

from include.errors import LLMBatchError
from llm_batch.answer import FAILED, Answer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, print its answer, return its exit code."""
    # Connections that are kept in Airflow's database are found only by a process of this kind.
    os.environ.setdefault("_AIRFLOW_PROCESS_CONTEXT", "server")
    options = _parser().parse_args(arguments)
    from llm_batch import commands  # needs seconds; --help does not need it

    options.width = _width()
    try:
        # Whatever a library prints must not get between the lines of an answer.
        with redirect_stdout(sys.stderr):
            answer: Answer = getattr(commands, options.command)(options)
    except LLMBatchError as error:
        _say_failure(str(error), as_json=options.json)
        return FAILED
    except KeyboardInterrupt:
        return 130
    print(json.dumps(answer.data, indent=2) if options.json else answer.text)
    return answer.code


def _say_failure(message: str, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": message}))
    print(message, file=sys.stderr)


def _width() -> int:
    from include.text_table import WIDEST

    return shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDEST


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llm_batch", description="Look after batch jobs from a terminal."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, told: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=told, description=told)
        command.add_argument("--json", action="store_true", help="for machines")
        return command

    for name, told in (
        ("status", "what runs, what it has cost today, and what needs a look"),
        ("batches", "what is at the API now"),
        ("runs", "the newest runs"),
    ):
        add(name, told).add_argument("--job", help="only this job")
    batches = commands.choices["batches"]
    batches.add_argument("--all", action="store_true", help="also those that are collected")
    runs = commands.choices["runs"]
    runs.add_argument("--limit", type=int, default=20, help="how many (20)")
    show = add("show", "one run: its counts, rounds, batches and history")
    show.add_argument("run", help="the beginning of a run id")
    costs = add("costs", "what a month has cost: by job, or by day of one job")
    costs.add_argument("--month", default=f"{datetime.now(UTC):%Y-%m}", help="2026-11 (this one)")
    costs.add_argument("--job", help="by day of this job")
    _add_interventions(add)
    audit = add("audit", "whether every promise holds for runs that are done")
    audit.add_argument("run", nargs="?", help="the beginning of a run id; default: the newest runs")
    audit.add_argument("--job", help="only this job")
    audit.add_argument("--limit", type=int, default=20, help="how many of the newest runs (20)")
    add("doctor", "whether everything that a run needs is there, and how to mend it")
    add("migrate", "bring the ledger to this release's tables")
    return parser


def _add_interventions(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    cancel = add("cancel", "stop the spend of a run, of one batch of it, or of all open runs")
    which = cancel.add_mutually_exclusive_group(required=True)
    which.add_argument("run", nargs="?", help="the beginning of a run id")
    which.add_argument("--all", action="store_true", help="every open run")
    cancel.add_argument("--batch", metavar="ID", help="only this batch of the run")
    cancel.add_argument("--job", help="with --all: only this job")
    close = add("close", "end a run that was replaced, or one of the queue that cannot go on")
    close.add_argument("run", help="the beginning of a run id")
    redrive = add("redrive", "send the failed rows of one partition again")
    redrive.add_argument("job", help="the name of the job")
    redrive.add_argument("day", type=_moment, help="2026-11-04, or a time: 2026-11-04T13:00")
    erase = add("erase", "delete one row's data: artifacts, files at the provider, results")
    erase.add_argument("job", help="the name of the job")
    erase.add_argument("key", nargs="+", help="the row's key, one value for each key column")
    for command in (cancel, close, redrive, erase):
        command.add_argument("--yes", action="store_true", help="do not ask")
        command.add_argument("--who", help="the name on record (default: user@host)")


def _moment(text: str) -> datetime:
    """Return a time inside the partition; of a day its noon, which every time zone shares."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no day like 2026-11-01") from None
    if len(text) == len("2026-11-01"):
        moment += timedelta(hours=12)
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment


if __name__ == "__main__":
    sys.exit(main())

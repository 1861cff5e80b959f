"""`python -m include.local_stack`: the product on one machine, from the command line."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from decimal import Decimal, InvalidOperation
from pathlib import Path
from types import FrameType
from typing import NoReturn

from include.errors import LLMBatchError
from include.local_stack import commands
from include.local_stack.backfill import REPROCESS, How


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0 only when every row is accounted for."""
    options = _parser().parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return _run(options)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    except LLMBatchError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    home: Path = options.home.resolve()
    if options.command == "up":
        return commands.up(home, options.port, options.database or None)
    if options.command == "load-commits":
        return commands.load_commits(home, options.csv)
    if options.command == "load-tickets":
        return commands.load_tickets(home)
    if options.command == "on-call":
        return commands.on_call(home, options.arguments)
    if options.command == "clean":
        return commands.clean(home)
    if options.command == "redrive":
        days = commands.days_of(options.job, options.day, options.day)
        return commands.backfill(commands.Order(days, None, home, redrive=True))
    days = commands.days_of(options.job, options.first, options.last)
    order = commands.Order(days, options.model or None, home)
    return commands.demo(order) if options.command == "demo" else _backfill(order, options)


def _backfill(order: commands.Order, options: argparse.Namespace) -> int:
    if options.do != "run":
        return commands.change_backfill(order.home, order.days.job, options.do)
    how = How(options.reprocess, backwards=options.backwards, max_active_runs=options.runs)
    order = replace(order, how=how, budget=options.budget, dry_run=options.dry_run)
    return commands.backfill(order)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m include.local_stack", description=__doc__)
    chosen = parser.add_subparsers(dest="command", required=True)
    for name, told in (
        ("demo", "start everything, process some days, show the result, stop everything"),
        ("backfill", "process some days on the stack that `up` started"),
    ):
        command = chosen.add_parser(name, help=told, description=told)
        command.add_argument("--job", default="ticket_triage", help="a folder of include/jobs")
        command.add_argument("--from", dest="first", type=_day, default=date(2026, 11, 1))
        command.add_argument("--to", dest="last", type=_day, default=date(2026, 11, 3))
        command.add_argument("--model", default="", help="another model than the job's")
        if name == "backfill":
            _add_backfill(command)
    told = "send the failed rows of one day again, on the stack that `up` started"
    redrive = chosen.add_parser("redrive", help=told, description=told)
    redrive.add_argument("--job", default="ticket_triage", help="a folder of include/jobs")
    redrive.add_argument("--day", type=_day, required=True)
    told = "run `python -m llm_batch` on the stack that `up` started"
    on_call = chosen.add_parser("on-call", help=told, description=told)
    on_call.add_argument("arguments", nargs=argparse.REMAINDER, help="status, show RUN, ...")
    up = chosen.add_parser("up", help="start everything and stay until Ctrl-C")
    up.add_argument("--port", type=int, default=commands.UI_PORT)
    up.add_argument("--database", default="", help="SQLAlchemy URL of Airflow's metadata")
    load = chosen.add_parser("load-commits", help="load a CSV of commits into source_db")
    load.add_argument("--csv", type=Path, required=True)
    chosen.add_parser("load-tickets", help="load the sample tickets into source_db")
    chosen.add_parser("clean", help="delete databases, artifacts, logs and the simulator's memory")
    for command in chosen.choices.values():
        command.add_argument("--home", type=Path, default=commands.DEFAULT_HOME)
    return parser


def _add_backfill(command: argparse.ArgumentParser) -> None:
    told = "pause: begin no more runs; resume; cancel: also end those that run, and their batches"
    command.add_argument(
        "--do", choices=("run", "pause", "resume", "cancel"), default="run", help=told
    )
    told = "rows, requests, tokens and money per interval; nothing is sent"
    command.add_argument("--dry-run", action="store_true", help=told)
    told = "US dollars for all days together: refused before the start, and kept while it runs"
    command.add_argument("--budget", type=_dollars, default=None, help=told)
    told = "which days run that have a run already"
    command.add_argument("--reprocess", choices=REPROCESS, default="completed", help=told)
    command.add_argument("--backwards", action="store_true", help="the last day first")
    command.add_argument("--runs", type=int, default=How().max_active_runs, help="at once")


def _dollars(text: str) -> Decimal | None:
    if not text:
        return None
    try:
        found = Decimal(text)
    except InvalidOperation:
        found = Decimal(-1)
    if not found.is_finite() or found < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of dollars like 25 or 2.50")
    return found


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no day like 2026-11-01") from None


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

"""What jobs cost: `python -m include.local_stack.costs --job JOB --month 2026-11`.

The ledger is that of `AIRFLOW_CONN_LLM_BATCH_DB`, or of the stack that `make up` keeps in `.demo`.
It is only read, and the answer says which one it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import URL

from include import ledger_database
from include.calendar_month import Month
from include.cost_table import cost_json, cost_table
from include.costs import CostLine, costs_by_day, costs_by_job
from include.errors import ConfigurationError, LLMBatchError
from include.ledger import Ledger
from include.local_stack.commands import DEFAULT_HOME, caller_environment
from include.local_stack.databases import url_of
from include.price_doubts import price_doubts


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what a job, or every job, has cost in a month."""
    options = _parser().parse_args(arguments)
    try:
        sys.stdout.write(f"{_answer(options)}\n")
    except LLMBatchError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _answer(options: argparse.Namespace) -> str:
    url, month = _ledger_url(), options.month or str(Month.of(datetime.now(UTC)))
    ledger, place = _ledger(url), url.render_as_string(hide_password=True)
    if options.job:
        lines, first = costs_by_day(ledger, options.job, month), f"{options.job}, {month}"
    else:
        lines, first = costs_by_job(ledger, month), f"all jobs, {month}"
    if options.json:
        return cost_json(lines)
    if not lines:
        return f"{first}: no batch was collected in the ledger {place}."
    parts = [cost_table(first, lines), f"From the ledger {place}.", *_doubts(lines)]
    return "\n\n".join(parts)


def _doubts(lines: Sequence[CostLine]) -> list[str]:
    told = price_doubts((line.model for line in lines), datetime.now(UTC).date())
    return ["\n".join(told)] if told else []


def _ledger_url() -> URL:
    url = url_of(caller_environment(DEFAULT_HOME), "llm_batch_db")
    if url.get_backend_name() == "sqlite" and not Path(str(url.database)).exists():
        raise ConfigurationError(
            f"There is no ledger at {url.database}: no run has begun with it. When `make up` was "
            "started with AIRFLOW_CONN_LLM_BATCH_DB exported, export the same here."
        )
    return url


def _ledger(url: URL) -> Ledger:
    engine = sa.create_engine(url)
    ledger_database.check(engine)
    return Ledger(engine)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m include.local_stack.costs", description=__doc__
    )
    parser.add_argument("--job", default="", help="one job by day; without it, every job")
    parser.add_argument("--month", default="", help="such as 2026-11; this month unless given")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    return parser


if __name__ == "__main__":
    sys.exit(main())

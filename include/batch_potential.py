"""What could be batched, and what it would save: `python -m include.batch_potential usage.csv`.

Reads a log of requests or an export of usage or costs (`include.usage_log` tells which columns),
adds the calls up by category and model, and prices them in real time and as batches. Whether a
call can wait a day is taken from its latency class, or from `--waits` and `--interactive`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from pathlib import Path

from include import cost
from include.cost import Usage
from include.endpoints import ENDPOINTS
from include.errors import LLMBatchError
from include.figures import dollars
from include.usage_log import Call, read_calls

MOST_CATEGORIES = 1_000  # a column with more distinct values is no category
OTHER = "(other categories)"
DISCOUNT = Decimal("0.5")  # of amounts whose model has no price of its own
WAITS = frozenset(
    {
        "async", "asynchronous", "background", "batch", "bulk", "flex", "low", "nightly",
        "offline", "scheduled",
    }
)  # fmt: skip
INTERACTIVE = frozenset(
    {
        "chat", "high", "interactive", "online", "priority", "realtime", "real-time", "sync",
        "synchronous", "user",
    }
)  # fmt: skip
HEADERS = (
    "category", "model", "can it wait", "requests", "tokens in", "tokens out", "real-time",
    "as batches", "saving",
)  # fmt: skip


class Verdict(StrEnum):
    """Whether calls could be batched."""

    WAITS = "yes"  #: They tolerate a day.
    UNKNOWN = "not known"  #: Nothing says whether they do.
    INTERACTIVE = "no"  #: Somebody waits for them.
    NOT_OFFERED = "no such batch"  #: The Batch API does not take this endpoint.
    BATCHED = "is batched"  #: They are in batches already.


@dataclass
class Line:
    """The sum of some calls. Money in US dollars; None when a model has no known price."""

    category: str
    model: str
    verdict: Verdict
    requests: int = 0
    usage: Usage = field(default_factory=Usage)
    amount: Decimal | None = None  # what an export of costs says

    def add(self, call: Call) -> None:
        """Take some calls in."""
        self.requests += call.requests
        self.usage += call.usage
        if call.amount is not None:
            self.amount = (self.amount or Decimal(0)) + call.amount

    @property
    def realtime_usd(self) -> Decimal | None:
        """What the calls cost in real time."""
        if self.amount is None:
            return cost.cost(self.usage, self.model, batch=False)
        return self.amount / self._share if self.verdict is Verdict.BATCHED else self.amount

    @property
    def batch_usd(self) -> Decimal | None:
        """What they would cost as batches."""
        if self.amount is None:
            return cost.cost(self.usage, self.model)
        return self.amount if self.verdict is Verdict.BATCHED else self.amount * self._share

    @property
    def saving_usd(self) -> Decimal | None:
        """What batching would save from now on; 0 for what cannot be batched, or is already."""
        if self.verdict not in {Verdict.WAITS, Verdict.UNKNOWN}:
            return Decimal(0)
        if self.realtime_usd is None or self.batch_usd is None:
            return None
        return self.realtime_usd - self.batch_usd

    @property
    def _share(self) -> Decimal:
        found = cost.price(self.model)
        return DISCOUNT if found is None or not found.batch_discount else found.batch_discount


class Potential:
    """Adds calls up. Memory: one line per category, model and verdict."""

    def __init__(self, waits: Iterable[str] = (), interactive: Iterable[str] = ()) -> None:
        self._waits, self._interactive = frozenset(waits), frozenset(interactive)
        self._lines: dict[tuple[str, str, Verdict], Line] = {}
        self._categories: set[str] = set()

    def add(self, call: Call) -> None:
        """Take some calls in."""
        verdict = self._verdict(call)
        category = self._category(call.category)
        key = (category, call.model, verdict)
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = Line(*key)
        line.add(call)

    def lines(self) -> list[Line]:
        """Return the lines, those that save most first."""
        return sorted(
            self._lines.values(),
            key=lambda line: (-(line.saving_usd or 0), line.category, line.model, line.verdict),
        )

    def _verdict(self, call: Call) -> Verdict:
        if call.is_batch:
            return Verdict.BATCHED
        if not _is_offered(call.endpoint):
            return Verdict.NOT_OFFERED
        if call.category in self._interactive:
            return Verdict.INTERACTIVE
        if call.category in self._waits or call.latency in WAITS:
            return Verdict.WAITS
        return Verdict.INTERACTIVE if call.latency in INTERACTIVE else Verdict.UNKNOWN

    def _category(self, name: str) -> str:
        if name in self._categories:
            return name
        if len(self._categories) >= MOST_CATEGORIES:
            return OTHER
        self._categories.add(name)
        return name


def _is_offered(endpoint: str) -> bool:
    """Tell whether the Batch API takes an endpoint, given as a URL, a path or one word."""
    if not endpoint:
        return True
    path = "/v1/" + endpoint.partition("/v1/")[2] if "/v1/" in endpoint else endpoint
    return path.partition("?")[0].rstrip("/") in ENDPOINTS or "/" not in endpoint


def potential_table(lines: Sequence[Line]) -> str:
    """Return the lines as a table, with what batching would save below."""
    rows = [HEADERS, *map(_cells, lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [_row(row, widths) for row in rows]
    for verdict, told in (
        (Verdict.WAITS, "Batching what can wait saves"),
        (Verdict.UNKNOWN, "Batching what may be able to wait saves up to"),
    ):
        ours = [line for line in lines if line.verdict is verdict]
        if ours:
            table.append(f"{told} {_total(ours)}.")
    return "\n".join(table)


def potential_json(lines: Sequence[Line]) -> str:
    """Return the lines as JSON, money as decimal text."""
    return json.dumps([_plain(line) for line in lines], indent=2)


def _plain(line: Line) -> dict[str, str | int | None]:
    amounts = {name: getattr(line, name) for name in ("realtime_usd", "batch_usd", "saving_usd")}
    return {
        "category": line.category,
        "model": line.model,
        "can_wait": line.verdict.value,
        "requests": line.requests,
        "input_tokens": line.usage.input,
        "cached_tokens": line.usage.cached,
        "output_tokens": line.usage.output,
        **{name: None if usd is None else format(usd, "f") for name, usd in amounts.items()},
    }


def _total(lines: Sequence[Line]) -> str:
    known = [line.saving_usd for line in lines if line.saving_usd is not None]
    total = dollars(sum(known, Decimal(0)))
    return total if len(known) == len(lines) else f"{total}, and more for models without a price"


def _cells(line: Line) -> tuple[str, ...]:
    numbers = (line.requests, line.usage.input, line.usage.output)
    amounts = (line.realtime_usd, line.batch_usd, line.saving_usd)
    return (
        line.category or "-",
        line.model,
        line.verdict.value,
        *(f"{number:,}" for number in numbers),
        *map(dollars, amounts),
    )


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    left = [cell.ljust(width) for cell, width in zip(cells[:3], widths[:3], strict=True)]
    right = [cell.rjust(width) for cell, width in zip(cells[3:], widths[3:], strict=True)]
    return "  ".join([*left, *right]).rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what could be batched."""
    options = _parser().parse_args(arguments)
    found = Potential(options.waits, options.interactive)
    try:
        for call in read_calls(options.file):
            found.add(call)
        lines = found.lines()
    except LLMBatchError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    show = potential_json if options.json else potential_table
    sys.stdout.write(f"{show(lines)}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m include.batch_potential", description=__doc__)
    parser.add_argument("file", type=Path, help="CSV, JSON lines, or a page of the usage API")
    for name, told in (("waits", "can wait a day"), ("interactive", "must be answered at once")):
        parser.add_argument(
            f"--{name}", action="append", default=[], metavar="CATEGORY", help=f"it {told}"
        )
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    return parser


if __name__ == "__main__":
    sys.exit(main())

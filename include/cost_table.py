"""Costs as a table for people and as JSON for machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from decimal import Decimal
from typing import Any

from include.costs import CostLine, total
from include.figures import money

HEADERS = (
    "", "model", "batches", "requests", "tokens in", "cached", "tokens out", "cost", "real-time",
    "saved",
)  # fmt: skip


def cost_table(first: str, lines: Sequence[CostLine]) -> str:
    """Return `lines` and their sum as a table whose first column is called `first`."""
    rows: list[tuple[str, ...]] = [(first, *HEADERS[1:])]
    rows += [_cells(line) for line in (*lines, total(list(lines)))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_row(row, widths) for row in rows)


def cost_json(lines: Sequence[CostLine]) -> str:
    """Return `lines` as JSON, money as decimal text."""
    plain = [{**asdict(line), "saved_usd": line.saved_usd} for line in lines]
    return json.dumps(plain, indent=2, default=_text)


def _text(value: Any) -> str:
    return format(value, "f") if isinstance(value, Decimal) else str(value)


def _cells(line: CostLine) -> tuple[str, ...]:
    counts = (
        line.batches, line.requests, line.input_tokens, line.cached_tokens, line.output_tokens,
    )  # fmt: skip
    amounts = (line.cost_usd, line.realtime_usd, line.saved_usd)
    return (line.what, line.model, *(f"{n:,}" for n in counts), *map(money, amounts))


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    left = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
    right = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
    return "  ".join([*left, *right]).rstrip()

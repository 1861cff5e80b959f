"""The tables of a run of the bench, for the terminal and for docs/performance.md."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from include.bench.measurement import Measurement
from include.bench.steps import STEPS

HEAD = ("", "CPU s", "of it server", "wall s", "MB/CPU s", "peak MB", "x limit")
GROWTH_HEAD = ("product", "rows", "CPU s", "krows/CPU s", "peak MB")


@dataclass(frozen=True)
class Result:
    """The medians of one step's contenders, and the product's growth by number of rows."""

    step: str
    rows: int
    contenders: Mapping[str, Measurement]
    growth: Mapping[int, Measurement]


@dataclass(frozen=True)
class Run:
    """Everything that one call of the bench has found."""

    results: Sequence[Result]
    rows: int
    runs: int
    seed: int
    skipped: Mapping[str, str]


def tables(run: Run) -> str:
    """Return all tables as Markdown that is readable in a terminal."""
    parts = [_step(result) for result in run.results]
    growing = [result for result in run.results if len(result.growth) > 1]
    if growing:
        parts.append(f"### Growth\n\n{_table(GROWTH_HEAD, _growth(growing))}")
    parts += [f"Not measured: {name} ({why})." for name, why in run.skipped.items()]
    return "\n\n".join(parts)


def _step(result: Result) -> str:
    step = STEPS[result.step]
    title = step.title.format(rows=result.rows, tenth=result.rows // 10)
    said = f"Limit: {step.limit}. Plain: {step.plain}. To reach: {step.target}."
    limit = result.contenders["limit"].total
    notes = next(iter(result.contenders.values())).notes
    rows = [
        (name, *_numbers(found), f"{found.total / limit:.1f}", *_notes(found))
        for name, found in result.contenders.items()
    ]
    return f"### {title}\n\n{said}\n\n{_table((*HEAD, *notes), rows)}"


def _numbers(found: Measurement) -> tuple[str, ...]:
    speed = f"{found.size / found.total / 1e6:,.0f}" if found.size and found.total else "-"
    server = f"{found.server:.2f}" if found.server else "-"
    return (f"{found.total:.2f}", server, f"{found.wall:.2f}", speed, f"{found.memory:,.0f}")


def _notes(found: Measurement) -> tuple[str, ...]:
    return tuple(f"{value:,.0f}" for value in found.notes.values())


def _growth(results: Sequence[Result]) -> list[tuple[str, ...]]:
    return [
        (
            result.step,
            f"{rows:,}",
            f"{found.total:.2f}",
            f"{rows / found.total / 1_000:,.0f}" if found.total else "-",
            f"{found.memory:,.0f}",
        )
        for result in results
        for size, found in sorted(result.growth.items())
        for rows in [size // STEPS[result.step].share]
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        [
            _line(head, widths),
            "|" + "|".join("-" * (width + 2) for width in widths) + "|",
            *(_line(row, widths) for row in rows),
        ]
    )


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
    return "| " + " | ".join(padded) + " |"


def document(run: Run) -> str:
    """Return docs/performance.md."""
    return "\n".join(_document(run)) + "\n"


def _document(run: Run) -> Iterator[str]:
    yield "# Performance"
    yield ""
    yield EXPLANATION.strip()
    yield ""
    yield "## The last run"
    yield ""
    yield (
        f"{datetime.now(UTC):%Y-%m-%d}, {_machine()}, Python {platform.python_version()}, "
        f"{run.rows:,} rows, medians of {run.runs} runs, seed {run.seed}."
    )
    yield ""
    yield tables(run)


def _machine() -> str:
    cpus = os.cpu_count() or 1
    model = ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else ""
    return f"{cpus} cores, {model or platform.machine()}, {sys.platform}"


EXPLANATION = """
`make bench` writes this page anew with `make bench BENCH=--write`. It makes its input from a seed,
runs each step of the product as the product runs it (the real modules, each in a process of its
own), and prints what it cost. `make bench BENCH=--quick` takes a minute and says less. A full run
leaves 10 GB of input under `.bench`, which may be deleted.

## How to read it

Each step stands between two others that do the same work on the same input in the same run:

- *limit* is the least that the step could do: copy its output, parse its input, or let the
  database take ready bytes. Nothing can be faster in this language on this machine, and the limit
  keeps no promise: it finds no duplicate, checks no schema, writes no index.
- *plain* is what a first version would look like, and most others do look like.

**Compare within one table only.** The contenders take turns, so a busy machine slows all of them;
the column *x limit* is what stays the same from machine to machine.

- *CPU s*: user and system time after the imports; for PostgreSQL client and server together, the
  server's share beside it.
- *peak MB*: the highest memory of the whole process, interpreter and libraries (about 60 MB)
  included.
- *Growth*: the product alone with a tenth, all and three times the rows. The memory must stay
  flat; the CPU must grow as the rows do.
- *loop lag*: the longest time in which the event loop of a triggerer could do nothing else.
- *calls a poll*: HTTP calls for all waiting batches together, each time they are looked at.

What each step does with its time, and why it is not closer to its limit:

- **build** encodes the constant parts of a body once and the row's values alone. A quarter of what
  is left is two digests: of each request (its `custom_id`) and of each file, by which anybody can
  tell that it is still the one that the ledger speaks of.
- **collect** parses the usual line with a type that accepts nothing but a complete answer, so that
  one call both reads and judges it; every other line goes a long way that knows all cases. Then
  it checks the answer against the schema and finds the request. The table has ten batches in one
  process, one after the other, whose freed memory is not all found again; in a run each is a task
  of its own, whose peak is that of the smallest size below.
- **embeddings** are asked for in base64, which is a quarter of the bytes: one call parses a line
  and decodes its vector into float32 bytes, and no number ever becomes a Python object. No vector
  is held: the place of its line is kept, and the line is read again when its row is written, so the
  memory does not grow with the vectors. The outcomes file has them as fixed-size bytes, which
  Parquet writes in a third of the time of a list; they become lists when they are loaded. A list of
  numbers is read as well, for servers without base64: its 1,536 numbers are parsed twice.
- **load** streams CSV to a staging table and merges it with one statement; six columns more than
  the limit and the index by which later runs find what is loaded. Most of the time is the
  server's. A second load of the same rows writes nothing.
- **wait** lists 100 batches a call for everybody who waits, and decodes them without the SDK's
  models, which would hold the event loop up for 50 ms a page.
"""

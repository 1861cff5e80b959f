"""Logs and exports of API usage, read as a stream: one record per call or per line of an export.

Three forms are told apart by their columns, in CSV (any size), JSON lines and pages of JSON as the
organisation's usage API answers them (API reference, "Usage" and "Costs"):

- a log of requests: `model`, input and output tokens, and what else it has;
- a usage export: the same with `num_model_requests`, and `batch` for what is a batch already;
- a costs export: `amount_value` and `line_item`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, TextIO

from include.cost import Usage
from include.errors import ConfigurationError

# For each thing that is wanted, the columns that may hold it; the first one that is there counts.
NAMES: Mapping[str, tuple[str, ...]] = {
    "model": ("model", "model_id", "snapshot_id"),
    "input": ("input_tokens", "prompt_tokens", "n_context_tokens_total", "tokens_in"),
    "cached": ("input_cached_tokens", "cached_tokens", "cached_input_tokens"),
    "output": ("output_tokens", "completion_tokens", "n_generated_tokens_total", "tokens_out"),
    "requests": ("num_model_requests", "requests", "n_requests"),
    "endpoint": ("endpoint", "url", "path", "operation"),
    "category": ("category", "tag", "feature", "use_case", "project_name", "project_id", "project"),
    "latency": ("latency_class", "latency", "priority", "service_tier", "mode"),
    "batch": ("batch", "is_batch"),
    "amount": ("amount_value", "amount", "cost_usd", "cost"),
    "line_item": ("line_item", "item"),
}
TRUE = frozenset({"true", "1", "yes", "batch"})
NOTHING = Usage()
SHOWN = 30  # characters of a wrong value in a message


@dataclass(frozen=True)
class Call:
    """Some calls of one kind. `amount` is what they cost, when the file says it itself."""

    model: str
    category: str = ""
    endpoint: str = ""
    latency: str = ""
    is_batch: bool = False
    requests: int = 1
    usage: Usage = NOTHING
    amount: Decimal | None = None


def read_calls(path: Path) -> Iterator[Call]:
    """Yield what a file says of calls, in its order; memory does not grow with a CSV or JSONL.

    Raises `ConfigurationError` that names the file, the line and the column.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            yield from _calls(path, stream)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read as UTF-8 text: {error}.") from None


def _calls(path: Path, stream: TextIO) -> Iterator[Call]:
    first = stream.read(1)
    stream.seek(0)
    if first == "{" and path.suffix == ".json":
        yield from _of_records(path, _of_page(path, stream))
    elif first in {"{", "["}:
        yield from _of_records(path, _of_lines(path, stream))
    else:
        yield from _of_csv(path, stream)


def _of_csv(path: Path, stream: TextIO) -> Iterator[Call]:
    reader = csv.reader(stream)
    with _places(path, lambda: reader.line_num):
        header = [name.strip().lower() for name in next(reader, [])]
        call = _reader(header)
        width = len(header)
        for row in reader:
            if not row:
                continue
            if len(row) != width:
                raise ValueError(f"has {len(row)} fields, the header has {width}")
            yield call(row)


def _of_records(path: Path, records: Iterable[tuple[int, Mapping[str, Any]]]) -> Iterator[Call]:
    known: dict[tuple[str, ...], Callable[[list[str]], Call]] = {}
    number = 0
    with _places(path, lambda: number):
        for place, record in records:
            number = place
            flat = _flat(record)
            names = tuple(flat)
            if names not in known:
                known[names] = _reader(list(names))
            yield known[names](list(flat.values()))


def _flat(record: Mapping[str, Any]) -> dict[str, str]:
    """Return a record's values as text; `amount: {value: 1}` becomes `amount_value`."""
    flat: dict[str, str] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            flat |= {f"{name}_{part}".lower(): str(inner) for part, inner in value.items()}
        else:
            flat[name.lower()] = "" if value is None else str(value)
    return flat


def _of_lines(path: Path, stream: TextIO) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise ConfigurationError(f"{path}, line {number}: expected one JSON object.")
        yield number, record


def _of_page(path: Path, stream: TextIO) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the results of a page of the usage API; its number counts results, not lines."""
    try:
        page = json.load(stream)
        buckets = page.get("data", [page])
        results = [result for one in buckets for result in one.get("results", [one])]
    except (ValueError, TypeError, AttributeError):
        raise ConfigurationError(
            f"{path} is no page of the usage API: expected data with buckets of results."
        ) from None
    yield from enumerate(results, 1)


@contextmanager
def _places(path: Path, number: Callable[[], int]) -> Iterator[None]:
    try:
        yield
    except (ValueError, csv.Error) as error:
        raise ConfigurationError(f"{path}, line {number()}: {error}.") from None


def _reader(header: list[str]) -> Callable[[list[str]], Call]:
    """Return what makes a `Call` of the values under these columns."""
    at = {
        want: next((header.index(name) for name in names if name in header), -1)
        for want, names in NAMES.items()
    }
    if at["line_item"] >= 0 and at["amount"] >= 0:
        return lambda row: _of_costs(row, at)
    missing = [want for want in ("model", "input", "output") if at[want] < 0]
    if missing:
        wanted = "; ".join(f"{want} ({' or '.join(NAMES[want])})" for want in missing)
        raise ValueError(
            f"there is no column for {wanted}; found {', '.join(header)[:200] or 'no header'}"
        )
    return lambda row: _of_usage(row, at)


def _of_usage(row: list[str], at: Mapping[str, int]) -> Call:
    return Call(
        model=_text(row, at, "model") or "unknown",
        category=_text(row, at, "category"),
        endpoint=_text(row, at, "endpoint"),
        latency=_text(row, at, "latency").lower(),
        is_batch=_text(row, at, "batch").lower() in TRUE,
        requests=_count(row, at, "requests", 1),
        usage=Usage(
            input=_count(row, at, "input"),
            cached=_count(row, at, "cached"),
            output=_count(row, at, "output"),
        ),
    )


def _of_costs(row: list[str], at: Mapping[str, int]) -> Call:
    item = _text(row, at, "line_item")
    text = _text(row, at, "amount")
    try:
        amount = Decimal(text or "0")
    except InvalidOperation:
        raise ValueError(f"amount must be a number of dollars, found {text[:SHOWN]!r}") from None
    return Call(
        model=item.partition(",")[0].strip() or "unknown",
        category=_text(row, at, "category"),
        is_batch="batch" in item.lower(),
        requests=0,
        amount=amount,
    )


def _text(row: list[str], at: Mapping[str, int], want: str) -> str:
    return row[at[want]].strip() if at[want] >= 0 else ""


def _count(row: list[str], at: Mapping[str, int], want: str, default: int = 0) -> int:
    text = _text(row, at, want)
    if not text:
        return default
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise ValueError(f"{want} must be a whole number of 0 or more, found {text[:SHOWN]!r}")
    return number

"""What a run costs: before it starts from an estimate, afterwards from the usage of every line.

Money is exact (`Decimal`, US dollars). An unknown model has no price: None, never 0.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from include.errors import ConfigurationError
from include.figures import money

PRICES = Path(__file__).with_name("prices.yaml")
OVERRIDE_VARIABLE = "AIRFLOW__LLM_BATCH__PRICES"
MILLION = Decimal(1_000_000)
OUTPUT_LIMITS = ("max_output_tokens", "max_completion_tokens", "max_tokens")
DEFAULT_OUTPUT_LIMIT = 1_000  # tokens a request, for a job that sets no limit
# Billed input tokens by estimated ones, and the share of its limit that an answer uses, before
# anything is known: expected, low, upper. Four bytes a token is right for English text; other
# languages take up to twice as many.
FIRST_GUESSES = (
    (Decimal(1), Decimal("0.5")),
    (Decimal("0.75"), Decimal("0.05")),
    (Decimal(2), Decimal(1)),
)
PARTS = ("input", "cached_input", "output")
ORIGIN = ("source", "as_of", "verified")

_SNAPSHOT = re.compile(r"-\d{4}-\d{2}-\d{2}$")


def known_total(amounts: Iterable[Decimal | None]) -> Decimal | None:
    """Return a sum of money; None, never 0, when one of the amounts is unknown."""
    found = list(amounts)
    return None if None in found else sum((one for one in found if one), Decimal(0))


@dataclass(frozen=True)
class Price:
    """Dollars per million tokens in real time; a batch costs `batch_discount` of it.

    It was compared with the page `source` on the day `as_of`, unless it is not verified.
    """

    input: Decimal
    cached_input: Decimal
    output: Decimal
    batch_discount: Decimal
    source: str = ""
    as_of: date | None = None
    is_verified: bool = True

    @property
    def is_free(self) -> bool:
        """Whether nothing is paid for any token."""
        return not (self.input or self.cached_input or self.output)


@dataclass(frozen=True)
class Usage:
    """Tokens as the API bills them; cached ones are part of input, reasoning ones of output."""

    input: int = 0
    cached: int = 0
    output: int = 0
    reasoning: int = 0

    def __add__(self, other: Usage) -> Usage:
        """Return the sum of both."""
        return Usage(
            self.input + other.input,
            self.cached + other.cached,
            self.output + other.output,
            self.reasoning + other.reasoning,
        )


@dataclass(frozen=True)
class Calibration:
    """What earlier runs of a job really used."""

    input_ratio: Decimal  # billed input tokens by estimated ones
    output_tokens: Decimal  # a request, on average
    cached_share: Decimal = Decimal(0)  # of the billed input tokens

    @classmethod
    def of(cls, usage: Usage, *, requests: int, estimated_input: int) -> Calibration | None:
        """Return the calibration of past runs, or None when they say nothing."""
        if requests <= 0 or estimated_input <= 0 or usage.input <= 0:
            return None
        return cls(
            Decimal(usage.input) / estimated_input,
            Decimal(usage.output) / requests,
            Decimal(usage.cached) / usage.input,
        )


@dataclass(frozen=True)
class LearnedUsage:
    """The calibration of some batches together, and of each by itself: how far they spread."""

    together: Calibration
    each: tuple[Calibration, ...]


@dataclass(frozen=True)
class Estimate:
    """US dollars that something will cost, as far as can be told before."""

    low: Decimal
    expected: Decimal
    upper: Decimal

    def __str__(self) -> str:
        return f"{money(self.expected)} ({money(self.low)} to {money(self.upper)})"


def price(model: str) -> Price | None:
    """Return the price of `model`; a dated snapshot costs what its model costs.

    Raises `ConfigurationError` when a price file cannot be used.
    """
    prices = _prices(os.environ.get(OVERRIDE_VARIABLE, ""))
    return prices.get(model) or prices.get(_SNAPSHOT.sub("", model))


def cost(usage: Usage, model: str, *, batch: bool = True, is_told: bool = True) -> Decimal | None:
    """Return the dollars of `usage`, in a batch or in real time; None for an unknown model.

    None as well when a part of the usage is not told, unless the model is free.
    """
    found = price(model)
    if found is None or not (is_told or found.is_free):
        return None
    cached = min(usage.cached, usage.input)
    total = (usage.input - cached) * found.input
    total += cached * found.cached_input + usage.output * found.output
    return total / MILLION * (found.batch_discount if batch else 1)


def estimate(
    model: str,
    *,
    input_tokens: int,
    requests: int,
    params: Mapping[str, Any],
    learned: LearnedUsage | None = None,
) -> Estimate | None:
    """Return the dollars that a batch of `requests` will cost, or None for an unknown model.

    With `learned`, the expected figure is what earlier batches used together, low and upper are
    the cheapest and the dearest of them. Before anything is known, answers are taken to use half
    of the request's token limit (or of 1,000 tokens); see `FIRST_GUESSES` for low and upper.
    """
    if price(model) is None:
        return None
    expected, *others = _calibrations(params, learned)
    amounts = [_amount(model, input_tokens, requests, one) for one in (expected, *others)]
    return Estimate(min(amounts), amounts[0], max(amounts))


def _calibrations(params: Mapping[str, Any], learned: LearnedUsage | None) -> list[Calibration]:
    if learned is not None:
        return [learned.together, *learned.each]
    limit = _output_limit(params)
    return [Calibration(input_ratio, limit * share) for input_ratio, share in FIRST_GUESSES]


def _amount(model: str, input_tokens: int, requests: int, by: Calibration) -> Decimal:
    billed = input_tokens * by.input_ratio
    usage = Usage(
        input=round(billed),
        cached=round(billed * by.cached_share),
        output=round(requests * by.output_tokens),
    )
    amount = cost(usage, model)
    if amount is None:
        raise AssertionError(f"{model} has lost its price")
    return amount


def _output_limit(params: Mapping[str, Any]) -> Decimal:
    limits = (params[name] for name in OUTPUT_LIMITS if isinstance(params.get(name), int))
    return Decimal(next(limits, DEFAULT_OUTPUT_LIMIT))


@lru_cache(maxsize=8)
def _prices(override: str) -> Mapping[str, Price]:
    prices = _read(PRICES)
    return {**prices, **_read(Path(override))} if override else prices


def _read(path: Path) -> dict[str, Price]:
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"Price file {path} cannot be read: {error}.") from error
    if not isinstance(data, dict) or not isinstance(data.get("models"), dict):
        raise ConfigurationError(f"Price file {path} needs `models`: a mapping of model to price.")
    discount = _dollars(path, "batch_discount", data.get("batch_discount", "0.5"))
    usual = {name: data.get(name) for name in ("source", "as_of")}
    return {
        str(name): _price(path, name, part, usual, discount)
        for name, part in data["models"].items()
    }


def _price(
    path: Path, model: object, part: object, usual: dict[str, Any], discount: Decimal
) -> Price:
    if not isinstance(part, dict) or not set(PARTS) <= set(part) <= {*PARTS, *ORIGIN}:
        raise ConfigurationError(
            f"Price file {path}, model {model}: expected {', '.join(PARTS)}, and if need be "
            f"{', '.join(ORIGIN)}."
        )
    dollars = {name: _dollars(path, f"{model}.{name}", part[name]) for name in PARTS}
    origin = usual | part
    return Price(
        **dollars,
        batch_discount=discount,
        source=str(origin["source"] or ""),
        as_of=_day(path, f"{model}.as_of", origin["as_of"]),
        is_verified=origin.get("verified", True) is True,
    )


def _day(path: Path, where: str, value: object) -> date | None:
    """Return a day; YAML has made one of `2026-11-20` already, but not of a text."""
    if value is None or type(value) is date:
        return value
    try:
        return date.fromisoformat(str(value))
    except ValueError:
        raise ConfigurationError(
            f"Price file {path}, {where}: expected a day such as 2026-11-20."
        ) from None


def _dollars(path: Path, where: str, value: object) -> Decimal:
    try:
        found = Decimal(str(value))
    except InvalidOperation:
        found = Decimal(-1)
    if not found.is_finite() or found < 0:
        raise ConfigurationError(
            f'Price file {path}, {where}: expected a decimal number such as "0.25".'
        )
    return found

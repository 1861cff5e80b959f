"""What a run costs: before it starts from an estimate, afterwards from the usage of every line.

Money is exact (`Decimal`, US dollars). An unknown model has no price: None, never 0.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from include.errors import BudgetExceededError, ConfigurationError

PRICES = Path(__file__).with_name("prices.yaml")
OVERRIDE_VARIABLE = "AIRFLOW__LLM_BATCH__PRICES"
MILLION = Decimal(1_000_000)
OUTPUT_LIMITS = ("max_output_tokens", "max_completion_tokens", "max_tokens")
DEFAULT_OUTPUT_LIMIT = 1_000  # tokens a request, for a job that sets no limit
OUTPUT_SHARE = Decimal("0.5")  # of the limit that an answer uses, before anything is known
PARTS = ("input", "cached_input", "output")

_SNAPSHOT = re.compile(r"-\d{4}-\d{2}-\d{2}$")


@dataclass(frozen=True)
class Price:
    """Dollars per million tokens in real time; a batch costs `batch_discount` of it."""

    input: Decimal
    cached_input: Decimal
    output: Decimal
    batch_discount: Decimal


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

    @classmethod
    def of(cls, usage: Usage, *, requests: int, estimated_input: int) -> Calibration | None:
        """Return the calibration of past runs, or None when they say nothing."""
        if requests <= 0 or estimated_input <= 0 or usage.input <= 0:
            return None
        return cls(Decimal(usage.input) / estimated_input, Decimal(usage.output) / requests)


def price(model: str) -> Price | None:
    """Return the price of `model`; a dated snapshot costs what its model costs.

    Raises `ConfigurationError` when a price file cannot be used.
    """
    prices = _prices(os.environ.get(OVERRIDE_VARIABLE, ""))
    return prices.get(model) or prices.get(_SNAPSHOT.sub("", model))


def cost(usage: Usage, model: str, *, batch: bool = True) -> Decimal | None:
    """Return the dollars of `usage`, in a batch or in real time; None for an unknown model."""
    found = price(model)
    if found is None:
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
    calibration: Calibration | None = None,
) -> Decimal | None:
    """Return the dollars that a batch of `requests` will cost, or None for an unknown model.

    Answers are taken to use half of the request's token limit (or of 1,000 tokens), unless
    earlier runs say better.
    """
    if calibration is None:
        calibration = Calibration(Decimal(1), _likely_output(params))
    usage = Usage(
        input=round(input_tokens * calibration.input_ratio),
        output=round(requests * calibration.output_tokens),
    )
    return cost(usage, model)


def check_budget(estimated: Decimal | None, budget: Decimal | None, *, job: str) -> None:
    """Raise `BudgetExceededError` when the estimate is above the budget.

    A budget cannot be kept without a price: then it raises `ConfigurationError`.
    """
    if budget is None:
        return
    if estimated is None:
        raise ConfigurationError(
            f"Job {job} has a budget of ${budget}, but the price of its model is unknown. "
            f"Add the model to a price file and name that in {OVERRIDE_VARIABLE}."
        )
    if estimated > budget:
        raise BudgetExceededError(
            f"Job {job} would cost about ${estimated:.2f}, over its budget of ${budget}. Nothing "
            "was submitted. Raise budget.max_usd, or take a smaller sample or another model."
        )


def _likely_output(params: Mapping[str, Any]) -> Decimal:
    limits = (params[name] for name in OUTPUT_LIMITS if isinstance(params.get(name), int))
    return Decimal(next(limits, DEFAULT_OUTPUT_LIMIT)) * OUTPUT_SHARE


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
    return {str(name): _price(path, name, part, discount) for name, part in data["models"].items()}


def _price(path: Path, model: object, part: object, discount: Decimal) -> Price:
    if not isinstance(part, dict) or set(part) != set(PARTS):
        raise ConfigurationError(
            f"Price file {path}, model {model}: expected exactly {', '.join(PARTS)}."
        )
    dollars = {name: _dollars(path, f"{model}.{name}", part[name]) for name in PARTS}
    return Price(**dollars, batch_discount=discount)


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

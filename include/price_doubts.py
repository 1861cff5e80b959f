"""Why a price may be wrong: nobody has compared it with the provider's page, or not for long."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date, timedelta

from include import cost

OLD = timedelta(days=180)  # prices of models that exist have changed about twice a year


def price_doubts(models: Iterable[str], today: date) -> list[str]:
    """Return a sentence for each model whose price is not verified or old; [] is good.

    Raises `ConfigurationError` when a price file cannot be used.
    """
    return [told for model in sorted(set(models)) if (told := _doubt(model, today))]


def _doubt(model: str, today: date) -> str | None:
    price = cost.price(model)
    if price is None:
        return None
    page = f" Compare it with {price.source}." if price.source else ""
    if not price.is_verified:
        return f"The price of {model} is not verified.{page}"
    if price.as_of is not None and today - price.as_of > OLD:
        return f"The price of {model} is of {price.as_of}.{page}"
    return None

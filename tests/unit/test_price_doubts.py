"""Prices say where they are from, and which of them nobody should trust any more."""

from __future__ import annotations

import re
from datetime import date, timedelta
from pathlib import Path

import pytest
import yaml

from include import cost
from include.errors import ConfigurationError
from include.health import Check, Level, price_checks
from include.price_doubts import OLD, price_doubts

TODAY = date(2026, 11, 20)
PRICE = 'input: "1", cached_input: "1", output: "2"'
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def own_prices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A price file whose day is today, with a model that has a page and a day of its own."""
    path = tmp_path / "own.yaml"
    path.write_text(
        f"source: contract 7\nas_of: {TODAY}\nmodels:\n"
        f"  usual: {{{PRICE}}}\n"
        f"  edge: {{{PRICE}, as_of: {TODAY - OLD}}}\n"
        f"  old: {{{PRICE}, source: invoice, as_of: '{TODAY - OLD - timedelta(days=1)}'}}\n"
        f"  guessed: {{{PRICE}, verified: false}}\n"
    )
    monkeypatch.setenv(cost.OVERRIDE_VARIABLE, str(path))
    return path


def test_a_model_has_the_source_and_day_of_its_file_or_its_own(own_prices: Path) -> None:
    """One line of a price file can be newer than the others."""
    usual, old = cost.price("usual"), cost.price("old")

    assert usual is not None
    assert old is not None
    assert (usual.source, usual.as_of, usual.is_verified) == ("contract 7", TODAY, True)
    assert (old.source, old.as_of) == ("invoice", TODAY - OLD - timedelta(days=1))


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("usual", []),
        ("edge", []),
        ("no such model", []),
        ("old", ["The price of old is of 2026-05-23. Compare it with invoice."]),
        ("guessed", ["The price of guessed is not verified. Compare it with contract 7."]),
    ],
)
def test_what_is_old_or_not_verified_is_told(own_prices: Path, model: str, told: list[str]) -> None:
    """Half a year is the limit; an unknown price is told elsewhere."""
    assert price_doubts([model, model], TODAY) == told


def test_the_doctor_names_doubtful_prices(own_prices: Path) -> None:
    """A warning: runs go on, but budgets and costs may be wrong."""
    (good,) = price_checks(["usual", "edge"], TODAY)
    (doubtful,) = price_checks(["usual", "guessed", "mine"], TODAY)

    assert good == Check("prices", Level.OK, "2 models, compared lately")
    assert doubtful.level == Level.WARNING
    assert "mine has no price" in doubtful.found
    assert "guessed is not verified" in doubtful.found
    assert cost.OVERRIDE_VARIABLE in doubtful.mend


def test_a_day_that_is_none_is_an_error(own_prices: Path) -> None:
    """A price file is data that people write: what is wrong is named."""
    own_prices.write_text(f"models: {{m: {{{PRICE}, as_of: last week}}}}")
    cost._prices.cache_clear()

    with pytest.raises(ConfigurationError, match=r"own\.yaml, m\.as_of"):
        cost.price("m")


def test_the_page_about_money_lists_what_is_not_verified() -> None:
    """Every shipped price has a page and a day, and the docs say which were never compared."""
    models = yaml.safe_load(cost.PRICES.read_text())["models"]
    prices = {name: cost.price(name) for name in models}
    sentence = re.search(r"`verified: false` .*: today (.*?)\. ", (DOCS / "money.md").read_text())

    assert all(one and one.source.startswith("https://") and one.as_of for one in prices.values())
    assert sentence is not None
    assert re.findall("`([^`]+)`", sentence[1]) == [
        name for name, one in prices.items() if one and not one.is_verified
    ]

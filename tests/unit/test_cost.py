"""Money: exact, known before and after, and never invented."""

from __future__ import annotations

import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from include.cost import (
    OVERRIDE_VARIABLE,
    Calibration,
    Usage,
    check_budget,
    cost,
    estimate,
    price,
)
from include.errors import BudgetExceededError, ConfigurationError


def test_cost_is_exact() -> None:
    """Cached input has its own price, reasoning is output, a batch costs half."""
    usage = Usage(input=1_000_003, cached=400_000, output=70_001, reasoning=9)

    realtime = cost(usage, "gpt-5.2-mini", batch=False)

    assert realtime == (
        Decimal(600_003) * Decimal("0.25")
        + Decimal(400_000) * Decimal("0.025")
        + Decimal(70_001) * Decimal("2.00")
    ) / Decimal(1_000_000)
    assert cost(usage, "gpt-5.2-mini") == realtime / 2


def test_snapshot_costs_what_its_model_costs() -> None:
    """`gpt-4o-mini-2024-07-18` is `gpt-4o-mini`; another suffix is another model."""
    assert price("gpt-4o-mini-2024-07-18") == price("gpt-4o-mini")
    assert price("gpt-4o-mini-audio") is None


def test_unknown_model_has_no_cost() -> None:
    """Unknown is None, never 0; a free model costs 0."""
    usage = Usage(input=5, output=5)

    assert cost(usage, "my-model") is None
    assert estimate("my-model", input_tokens=1, requests=1, params={}) is None
    assert cost(usage, "omni-moderation-latest") == 0


def test_usages_add_up() -> None:
    """The usage of a run is the sum of its lines."""
    assert Usage(1, 2, 3, 4) + Usage(10, 20, 30, 40) == Usage(11, 22, 33, 44)


def test_own_prices_replace_and_add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of the override wins; other models keep their price."""
    path = tmp_path / "prices.yaml"
    path.write_text(
        'batch_discount: "1"\nmodels:\n  mine: {input: "1", cached_input: "1", output: "2"}\n'
    )
    monkeypatch.setenv(OVERRIDE_VARIABLE, str(path))

    assert cost(Usage(input=1_000_000, output=1_000_000), "mine") == 3
    assert price("gpt-5.2-mini") is not None


@pytest.mark.parametrize(
    "text",
    [
        "models: 3",
        "[",
        'models: {m: {input: "1"}}',
        'models: {m: {input: "1", cached_input: "x", output: "1"}}',
        'models: {m: {input: "1", cached_input: "-1", output: "1"}}',
        "models: {m: {input: .nan, cached_input: 1, output: 1}}",
    ],
)
def test_unusable_price_file_is_named(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong price file is an error, not a wrong bill."""
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    monkeypatch.setenv(OVERRIDE_VARIABLE, str(path))

    with pytest.raises(ConfigurationError, match=r"prices\.yaml"):
        price("gpt-5.2-mini")


def test_estimate_takes_half_of_the_output_limit() -> None:
    """Before anything is known, 10 requests of at most 300 tokens use 1,500."""
    found = estimate(
        "gpt-5.2-mini", input_tokens=2_000, requests=10, params={"max_output_tokens": 300}
    )

    assert found == cost(Usage(input=2_000, output=1_500), "gpt-5.2-mini")


def test_estimate_learns_from_earlier_runs() -> None:
    """Real usage replaces the guess."""
    learned = Calibration.of(Usage(input=3_000, output=400), requests=10, estimated_input=2_000)

    found = estimate("gpt-5.2-mini", input_tokens=200, requests=1, params={}, calibration=learned)

    assert found == cost(Usage(input=300, output=40), "gpt-5.2-mini")
    assert Calibration.of(Usage(), requests=0, estimated_input=0) is None


def test_budget_is_kept() -> None:
    """Up to the budget is fine, above it nothing starts, and no price means no start either."""
    check_budget(Decimal(25), Decimal(25), job="j")
    check_budget(None, None, job="j")

    with pytest.raises(BudgetExceededError, match=r"Job j would cost about \$25\.01"):
        check_budget(Decimal("25.01"), Decimal(25), job="j")
    with pytest.raises(ConfigurationError, match="price of its model is unknown"):
        check_budget(None, Decimal(25), job="j")


def test_import_is_light() -> None:
    """DAG files may import prices: no pyarrow, pandas or openai comes with them."""
    code = "import sys, include.cost; print({'pyarrow', 'pandas', 'openai'} & set(sys.modules))"

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "set()"

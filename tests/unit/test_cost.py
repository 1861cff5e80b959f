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
    LearnedUsage,
    Usage,
    cost,
    estimate,
    known_total,
    price,
)
from include.errors import ConfigurationError


def test_cost_is_exact() -> None:
    """Cached input has its own price, reasoning is output, a batch costs half."""
    usage = Usage(input=1_000_003, cached=400_000, output=70_001, reasoning=9)

    realtime = cost(usage, "gpt-5-mini", batch=False)

    assert realtime == (
        Decimal(600_003) * Decimal("0.25")
        + Decimal(400_000) * Decimal("0.025")
        + Decimal(70_001) * Decimal("2.00")
    ) / Decimal(1_000_000)
    assert cost(usage, "gpt-5-mini") == realtime / 2


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
    assert price("gpt-5-mini") is not None


@pytest.mark.parametrize(
    "text",
    [
        "models: 3",
        "[",
        'models: {m: {input: "1"}}',
        'models: {m: {input: "1", cached_input: "x", output: "1"}}',
        'models: {m: {input: "1", cached_input: "-1", output: "1"}}',
        'models: {m: {input: "1", cached_input: "1", output: "1", day: "2026-11-20"}}',
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
        price("gpt-5-mini")


def test_estimate_takes_half_of_the_output_limit() -> None:
    """Before anything is known, 10 requests of at most 300 tokens use 1,500; upper is the limit."""
    found = estimate(
        "gpt-5-mini", input_tokens=2_000, requests=10, params={"max_output_tokens": 300}
    )

    assert found is not None
    assert found.expected == cost(Usage(input=2_000, output=1_500), "gpt-5-mini")
    assert found.upper == cost(Usage(input=4_000, output=3_000), "gpt-5-mini")
    assert found.low < found.expected < found.upper


def test_estimate_learns_from_earlier_batches() -> None:
    """Real usage replaces the guess; the cheapest and the dearest batch are low and upper."""
    small = _calibration(Usage(input=1_000, output=100), requests=5)
    large = _calibration(Usage(input=2_000, output=300), requests=5)
    learned = LearnedUsage(_calibration(Usage(input=3_000, output=400), 10, 2_000), (small, large))

    found = estimate("gpt-5-mini", input_tokens=200, requests=1, params={}, learned=learned)

    assert found is not None
    assert found.expected == cost(Usage(input=300, output=40), "gpt-5-mini")
    assert found.low == cost(Usage(input=200, output=20), "gpt-5-mini")
    assert found.upper == cost(Usage(input=400, output=60), "gpt-5-mini")
    assert Calibration.of(Usage(), requests=0, estimated_input=0) is None


def test_estimate_learns_what_is_cached() -> None:
    """A prompt that is served from the cache half of the time is half as dear there."""
    half = _calibration(Usage(input=2_000, cached=1_000), requests=5)

    found = estimate(
        "gpt-5-mini",
        input_tokens=500,
        requests=1,
        params={},
        learned=LearnedUsage(half, (half,)),
    )

    assert found is not None
    assert found.expected == cost(Usage(input=1_000, cached=500), "gpt-5-mini")


def _calibration(used: Usage, requests: int, estimated: int = 1_000) -> Calibration:
    found = Calibration.of(used, requests=requests, estimated_input=estimated)
    assert found is not None
    return found


def test_import_is_light() -> None:
    """DAG files may import prices: no pyarrow, pandas or openai comes with them."""
    code = "import sys, include.cost; print({'pyarrow', 'pandas', 'openai'} & set(sys.modules))"

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "set()"


def test_a_sum_with_an_unknown_amount_is_unknown() -> None:
    """It is never 0, nor the sum of the others; of nothing it is 0."""
    assert known_total([Decimal("0.1"), Decimal(0), Decimal("0.2")]) == Decimal("0.3")
    assert known_total([Decimal("0.1"), None]) is None
    assert known_total([]) == 0

"""A small first batch is judged by what it tells of the job, not by what passes."""

from __future__ import annotations

import json
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest

from include.canary import after_canary, canary_of, figures_of
from include.run_policy import Canary

CANARY = Canary(requests=50)


def batch(requests: int, shard: int = 1, **values: Any) -> Any:
    return SimpleNamespace(requests=requests, shard=shard, **values)


def test_the_first_file_of_a_large_round_is_the_canary() -> None:
    """The others are submitted after it."""
    first, second, third = batch(50), batch(60, 2), batch(1, 3)

    after = after_canary([first, second, third], CANARY)

    assert canary_of([first, second, third], CANARY) is first
    assert after == [second, third]


@pytest.mark.parametrize("canary", [Canary(), CANARY])
def test_a_small_round_goes_at_once(canary: Canary) -> None:
    """Without the key, or with at most twice its requests, nothing is held back."""
    both = [batch(50), batch(50, 2)]

    assert canary_of(both, canary) is None
    assert after_canary(both, canary) == both
    assert after_canary([], canary) == []


def test_a_round_of_one_file_has_no_canary() -> None:
    """It was built before the job had one: were it the canary, the round would have no batch."""
    only = batch(500)

    assert canary_of([only], CANARY) is None
    assert after_canary([only], CANARY) == [only]


def test_what_passes_by_itself_is_not_judged() -> None:
    """Ten answers count: eight good ones, two that the schema refuses; 40 have expired."""
    reasons = {"batch_expired": 38, "server_error": 2, "invalid_answer": 2}
    canary = batch(50, succeeded=8, cost_usd=Decimal("0.5"), reasons=json.dumps(reasons))

    figures = figures_of(canary)

    assert (figures.judged, figures.failed, figures.failure_rate) == (10, 2, Decimal("0.2"))
    assert figures.cost_per_row == Decimal("0.05")
    assert str(figures) == "2 of 10 answers failed (20.0%: invalid_answer 2), $0.050000 a row"


def test_nothing_judged_is_no_failure() -> None:
    """A canary that expired as a whole says nothing; its cost by row is unknown."""
    figures = figures_of(
        batch(50, succeeded=0, cost_usd=Decimal(0), reasons='{"batch_expired": 50}')
    )

    assert (figures.failure_rate, figures.cost_per_row) == (0, None)

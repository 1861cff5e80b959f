"""A backfill's price is known before it starts, and its budget holds for all its runs together."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import pytest

from include import pipeline, run_mode, spend_limits
from include.backfill_estimate import IntervalEstimate, check_limit, estimate_intervals
from include.errors import BudgetExceededError, ConfigurationError
from include.estimates import Estimates
from include.ledger_records import Batch, Run
from include.simulator.process import Simulator
from include.spend_limits import SpendLimit
from tests.faults.world import World, job

ROWS = 12
NO_PRICE = {"request": {**job().request.model_dump(), "model": "nobody-has-priced-this"}}


def days(folder: Path, simulator: Simulator, count: int) -> list[World]:
    """Days with the same rows in one source, one ledger and one target."""
    worlds = [World(folder, simulator, day) for day in range(count)]
    for world in worlds:
        world.fill(ROWS, text=f"day {world.day}")
    return worlds


def estimate(world: World) -> IntervalEstimate:
    """What a dry run says of a world's day."""
    interval = (world.partition.start, world.partition.end)
    estimates = Estimates(world.ledger(), world.spec)
    (found,) = estimate_intervals(world.spec, [interval], world.source(), world.target(), estimates)
    return found


def joined(world: World, limit: SpendLimit) -> Run:
    """The world's run, opened and put under a limit."""
    run = world._opened(world.ledger(), run_mode.NORMAL)
    spend_limits.join(world.ledger(), run, limit)
    return run


def test_a_dry_run_counts_what_would_be_sent(tmp_path: Path, simulator: Simulator) -> None:
    """Rows, requests and batches are those of the bill of the run that follows."""
    (world,) = days(tmp_path, simulator, 1)

    found = estimate(world)

    assert simulator.requests() == []
    assert not (tmp_path / "artifacts").exists()
    assert world.ledger().runs() == []
    report = world.run()
    bill = simulator.bill()
    assert (found.rows, found.requests, found.batches) == (ROWS, bill["requests"], bill["batches"])
    assert found.cost_usd == report.estimate_usd


def test_a_dry_run_of_a_done_day_is_free(tmp_path: Path, simulator: Simulator) -> None:
    """What is loaded would be reused: no request, no dollar."""
    (world,) = days(tmp_path, simulator, 1)
    world.run()

    found = estimate(world)

    assert (found.rows, found.reused, found.requests) == (ROWS, ROWS, 0)
    assert found.cost_usd == 0


def test_a_backfill_over_its_budget_is_refused(tmp_path: Path, simulator: Simulator) -> None:
    """The sum of all days counts, and a model without a price cannot keep a budget."""
    found = [estimate(world) for world in days(tmp_path, simulator, 2)]
    one_day = found[0].cost_usd or Decimal(0)

    check_limit(found, 2 * one_day)
    with pytest.raises(BudgetExceededError, match="Nothing was started"):
        check_limit(found, 2 * one_day - Decimal("0.000001"))
    unpriced = World(tmp_path, simulator, spec=job(**NO_PRICE))
    with pytest.raises(ConfigurationError, match="price of its model is unknown"):
        check_limit([estimate(unpriced)], Decimal(100))


def test_a_budget_holds_over_all_runs(tmp_path: Path, simulator: Simulator) -> None:
    """The day that would go over it sends nothing; with a larger one it goes on, paid once."""
    first, second, third = days(tmp_path, simulator, 3)
    for world in (first, second, third):
        joined(world, SpendLimit("backfill", Decimal(1)))
    spent = sum((world.run().cost_usd or Decimal(0) for world in (first, second)), Decimal(0))
    joined(third, SpendLimit("backfill", spent + Decimal("0.000001")))

    with pytest.raises(BudgetExceededError, match="spend_limit backfill"):
        third.run()

    assert simulator.bill()["requests"] == 2 * ROWS
    joined(third, SpendLimit("backfill", 2 * spent))
    third.run()
    assert simulator.bill()["requests"] == 3 * ROWS


def test_two_runs_cannot_both_take_the_last_of_a_budget(
    tmp_path: Path, simulator: Simulator
) -> None:
    """Of two builds at once, exactly one gets its round; what is on its way counts as spent."""
    worlds = days(tmp_path, simulator, 2)
    price = estimate(worlds[0]).cost_usd or Decimal(0)
    runs = [joined(world, SpendLimit("backfill", price * Decimal("1.5"))) for world in worlds]
    for world, run in zip(worlds, runs, strict=True):
        pipeline.extract(run, world.ledger(), world.artifacts(), world.source)

    def build(at: int) -> list[Batch] | str:
        world = World(tmp_path, simulator, at)
        ledger = world.ledger()
        try:
            return pipeline.build(
                ledger.run(runs[at].run_id), 1, ledger, world.artifacts(), world.target,
                most_shards=9,
            )  # fmt: skip
        except BudgetExceededError:
            return "refused"
        finally:
            world.close()

    with ThreadPoolExecutor() as threads:
        found = list(threads.map(build, range(2)))

    assert found.count("refused") == 1


def test_other_runs_do_not_count(tmp_path: Path, simulator: Simulator) -> None:
    """What runs outside of the backfill spend, and what a run spent before it joined, is free."""
    first, second = days(tmp_path, simulator, 2)
    first.run()
    price = estimate(second).cost_usd or Decimal(0)

    joined(second, SpendLimit("backfill", price))

    second.run()


def test_a_limit_needs_a_price(tmp_path: Path, simulator: Simulator) -> None:
    """A run whose model has no price is refused when it joins, before anything is sent."""
    world = World(tmp_path, simulator, spec=job(**NO_PRICE))

    with pytest.raises(ConfigurationError, match="nobody-has-priced-this"):
        joined(world, SpendLimit("backfill", Decimal(1)))


@pytest.mark.parametrize(
    "param", [{}, {"name": "x"}, {"name": "", "max_usd": 1}, {"name": "x", "max_usd": -1}, "x", 3]
)
def test_a_wrong_param_is_told(param: object) -> None:
    """The message shows the form that is expected."""
    with pytest.raises(ConfigurationError, match='"max_usd": 50'):
        SpendLimit.of(param)


def test_a_limit_comes_back_from_its_param() -> None:
    """Its dollars go through JSON without becoming a float."""
    limit = SpendLimit("backfill", Decimal("0.10"))

    assert SpendLimit.of(limit.as_param()) == limit
    assert SpendLimit.of(None) is None

"""Runs with a canary, against the bill: what is judged is never sent again, the rest only after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal
from itertools import count
from pathlib import Path

import pytest

from include import spending
from include.calendar_month import Month
from include.errors import BudgetExceededError, CanaryError, ConfigurationError
from include.ledger_database import reading
from include.ledger_records import now
from include.simulator.process import Simulator
from include.spend_limits import SpendLimit
from tests.faults.audit import bill_of, full_audit
from tests.faults.world import QUICK, World, thrifty_job

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("quick_retries")]

ROWS, BODIES, CANARY = 10, 6, 2  # rows, their different requests, and those that go first
DAYS = count()
LIMIT = SpendLimit("all days", Decimal(1))
PATIENT = replace(QUICK, lease=600.0)  # seconds: nobody is taken for dead
NO_ANSWER = {"fault": "refusal", "fraction": 1.0, "metadata": {"shard": "1", "round": "1"}}
LENIENT = {"canary": {"requests": CANARY, "max_failure_rate": 1}}


@pytest.fixture
def make(service: Simulator, tmp_path: Path) -> Iterator[Callable[[], World]]:
    """Make worlds of one day and one folder: processes that work on the same partition."""
    made: list[World] = []
    day = next(DAYS)

    def one() -> World:
        made.append(World(tmp_path, service, day, thrifty_job(), policy=PATIENT))
        return made[-1]

    one().fill(ROWS, bodies=BODIES)
    yield one
    service.clear_faults()
    for world in made:
        world.close()


@pytest.fixture
def stopped(make: Callable[[], World], service: Simulator) -> World:
    """A world whose run was stopped by its canary."""
    world = make()
    service.add_faults(NO_ANSWER)
    with pytest.raises(CanaryError, match="2 of 2 answers failed"):
        world.run()
    service.clear_faults()
    return world


def billed(world: World) -> int:
    """The requests that the API has billed for all runs of a world."""
    return sum(bill_of(world, run_id)[0] for run_id in set(world.run_ids))


def again(world: World) -> None:
    """The next run begins with `extract`: a cleared run, or the next one of the partition."""
    world._is_open = False


def test_judging_again_says_the_same(stopped: World) -> None:
    """However often `judge` or the whole run is cleared: the canary alone has been paid for."""
    for clear in (lambda _world: None, again, again):
        clear(stopped)
        with pytest.raises(CanaryError):
            stopped.run()

    assert len(set(stopped.run_ids)) == 1
    assert billed(stopped) == CANARY


def test_a_canary_that_is_allowed_more_is_not_sent_again(stopped: World) -> None:
    """The rest goes; the rows of the canary, and those that share its requests, have failed."""
    stopped.spec = thrifty_job(**LENIENT)
    again(stopped)

    report = stopped.run()

    assert (report.loaded, report.failed, report.shared) == (6, 4, 4)
    assert billed(stopped) == BODIES
    assert full_audit(stopped) == []


def in_flight(world: World) -> tuple[Decimal, Decimal]:
    """What counts as in flight under the world's limit, and in this month."""
    with reading(world.ledger().engine) as connection:
        month = spending.of_month(connection, world.spec.name, Month.of(now()))
        return spending.of_limit(connection, LIMIT.name).in_flight, month.in_flight


@pytest.fixture
def stopped_under_limit(make: Callable[[], World], service: Simulator) -> World:
    """A world whose run is under a spend limit, and was stopped by its canary."""
    world = make()
    world.limit = LIMIT
    service.add_faults(NO_ANSWER)
    with pytest.raises(CanaryError):
        world.run()
    service.clear_faults()
    return world


def test_what_a_canary_holds_back_is_not_in_flight(stopped_under_limit: World) -> None:
    """Other days of the backfill have its money, until it is allowed more and goes on."""
    world = stopped_under_limit
    assert in_flight(world) == (0, 0)

    world.spec = thrifty_job(**LENIENT)
    again(world)
    held = []
    world.on_judged = lambda: held.append(in_flight(world))
    world.run()

    assert len(held) == 1
    assert min(held[0]) > 0
    assert in_flight(world) == (0, 0)


def test_a_stopped_run_goes_on_within_its_limit_only(stopped_under_limit: World) -> None:
    """When others have spent the money meanwhile, nothing is sent until the limit is raised."""
    world = stopped_under_limit
    world.spec, world.limit = thrifty_job(**LENIENT), replace(LIMIT, max_usd=Decimal("0.000001"))
    again(world)

    with pytest.raises(BudgetExceededError, match="spend_limit all days"):
        world.run()

    assert billed(world) == CANARY
    assert in_flight(world) == (0, 0)
    world.limit = LIMIT
    again(world)
    world.run()
    assert billed(world) == BODIES


def test_nothing_is_redriven_while_a_canary_has_stopped_the_run(stopped: World) -> None:
    """Its rows have not failed yet: a redrive would send them beside the run."""
    again(stopped)

    with pytest.raises(ConfigurationError, match="not finished"):
        stopped.run(mode="redrive")

    assert billed(stopped) == CANARY


def test_a_mended_request_is_a_run_of_its_own(stopped: World) -> None:
    """Its own canary goes first; the rest of the run that was stopped is never sent."""
    request = {**stopped.spec.request.model_dump(exclude_none=True), "prompt": "Mended: {{ body }}"}
    stopped.spec = thrifty_job(request=request)
    again(stopped)

    report = stopped.run()

    assert (report.loaded, report.failed) == (ROWS, 0)
    assert [bill_of(stopped, one)[0] for one in stopped.run_ids] == [CANARY, BODIES]


def test_force_and_redrive_have_a_canary_of_their_own(
    make: Callable[[], World], service: Simulator
) -> None:
    """A redrive sends each failed request once, canary first; force sends every request again."""
    world = make()
    service.add_faults({"fault": "refusal", "fraction": 1.0})
    world.spec = thrifty_job(**LENIENT)
    assert world.run().failed == ROWS
    service.clear_faults()

    redriven = world.run(mode="redrive")
    forced = world.run(mode="force")

    assert (redriven.loaded, forced.loaded) == (ROWS, ROWS)
    assert [bill_of(world, one)[0] for one in world.run_ids] == [BODIES] * 3
    shards = [[b.requests for b in world.ledger().batches(one)] for one in world.run_ids]
    assert shards == [[CANARY, BODIES - CANARY]] * 3
    assert full_audit(world) == []


def test_two_workers_share_one_canary(make: Callable[[], World]) -> None:
    """Two Airflow runs of a partition at once: canary and rest are paid for once."""
    worlds = [make(), make()]
    worlds[0].ledger()

    with ThreadPoolExecutor() as threads:
        reports = list(threads.map(lambda world: world.run(), worlds))

    assert len({one for world in worlds for one in world.run_ids}) == 1
    assert [one.loaded for one in reports] == [ROWS, ROWS]
    assert billed(worlds[0]) == BODIES
    assert full_audit(worlds[0]) == []

"""What a look at a batch leads to, and what it leaves in the ledger."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from itertools import count
from pathlib import Path

import pytest
import sqlalchemy as sa

from include import ledger_tables as tables
from include import pipeline, run_mode
from include.ledger_records import Batch, BatchState, now
from include.local_stack.rest import wait_until
from include.simulator.process import Simulator
from include.waiting import Verdict, WaitPolicy, look
from tests.faults.audit import bill_of
from tests.faults.world import World

DAYS = count()  # of worlds on one simulator
PATIENCE = 60.0  # seconds
GET = {"method": "GET", "path": "/batches/"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    """A simulator whose batches take no time, unless they are held."""
    state = tmp_path_factory.mktemp("simulator")
    with Simulator.start(state, instant=True) as simulator:
        yield simulator


class Waiter:
    """One submitted batch of three rows, which is in progress until `let_go`."""

    def __init__(self, world: World) -> None:
        self.world = world
        world.fill(3)
        self.ledger = world.ledger()
        run = world._opened(self.ledger, run_mode.NORMAL)
        run = pipeline.extract(run, self.ledger, world.artifacts(), world.source)
        (self.built,) = pipeline.build(
            run, 1, self.ledger, world.artifacts(), world.target, most_shards=9
        )
        world.simulator.add_faults({"fault": "stuck"})
        world.submit(self.built, self.ledger)
        world.simulator.clear_faults()  # the batch keeps it

    def let_go(self) -> None:
        """Let the batch end."""
        assert self.world.simulator.release() == 1

    @property
    def batch(self) -> Batch:
        return self.ledger.batch(self.built.submission_id)

    def said_before(self, time: timedelta) -> None:
        """Let the ledger have the API's latest answer from that time ago."""
        earlier = now() - time
        with self.ledger.engine.begin() as connection:
            connection.execute(sa.update(tables.batch).values(progress_at=earlier))

    def look(self, policy: WaitPolicy | None = None) -> Verdict:
        return look(self.batch, self.ledger, self.world.api(), policy or WaitPolicy())

    def cancels(self) -> int:
        """How often the API was asked to cancel a batch."""
        calls: dict[str, int] = self.world.simulator.batches()["calls"]
        return calls.get("POST /v1/batches/{id}/cancel", 0)

    def look_until_over(self, policy: WaitPolicy | None = None) -> None:
        wait_until("the end of the batch", PATIENCE, lambda: self.is_over(policy), interval=0.02)

    def is_over(self, policy: WaitPolicy | None = None) -> bool:
        return self.look(policy) is Verdict.OVER


@pytest.fixture
def waiter(service: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Waiter]:
    monkeypatch.setattr("include.batch_api.FIRST_PAUSE", 0.0)
    world = World(tmp_path, service, next(DAYS))
    yield Waiter(world)
    world.close()
    service.clear_faults()
    service.release()


def test_a_batch_is_waited_for_and_ends(waiter: Waiter) -> None:
    """WAIT while it is not final, then OVER with the final status and counts."""
    assert waiter.look() is Verdict.WAIT
    waiter.let_go()
    waiter.look_until_over()

    batch = waiter.batch
    assert (batch.state, batch.api_status) == (BatchState.ENDED, "completed")
    assert (batch.done_requests, batch.failed_requests) == (3, 0)


def test_an_ended_batch_is_not_asked_about_again(waiter: Waiter) -> None:
    """The ledger knows: no call is made."""
    waiter.let_go()
    waiter.look_until_over()
    retrieves = waiter.world.simulator.batches()["retrieves"]

    assert waiter.look() is Verdict.OVER
    assert waiter.world.simulator.batches()["retrieves"] == retrieves


@pytest.mark.parametrize("fault", ["fail_before", "reset_before"])
def test_a_poll_that_fails_is_no_verdict(waiter: Waiter, fault: str) -> None:
    """WAIT, and nothing is recorded: the next poll may know more."""
    (rule,) = waiter.world.simulator.add_faults({"fault": fault, **GET})

    assert waiter.look() is Verdict.WAIT
    assert waiter.world.simulator.fired(rule["id"]) == 5
    assert waiter.batch.state == BatchState.SUBMITTED
    waiter.world.simulator.clear_faults()
    waiter.let_go()
    waiter.look_until_over()


def test_a_batch_that_the_api_does_not_know_for_long_is_lost(waiter: Waiter) -> None:
    """404 for as long as the policy says: OVER, so that its rows go round again."""
    waiter.world.simulator.add_faults({"fault": "fail_before", "status": 404, **GET})
    policy = WaitPolicy(lost_minutes=10)

    assert waiter.look(policy) is Verdict.WAIT
    assert waiter.look(policy) is Verdict.WAIT
    waiter.said_before(timedelta(minutes=10))
    assert waiter.look(policy) is Verdict.OVER
    assert (waiter.batch.state, waiter.batch.api_status) == (BatchState.ENDED, "lost")


def test_a_batch_that_is_unknown_for_a_moment_is_paid_once(waiter: Waiter) -> None:
    """One 404, as of a batch that was just made: its rows are not sent beside it."""
    world = waiter.world
    world.simulator.add_faults({"fault": "fail_before", "status": 404, "times": 1, **GET})
    world.wait = WaitPolicy()
    waiter.let_go()

    world.run()

    (run_id,) = world.run_ids
    assert [one.api_status for one in waiter.ledger.batches(run_id)] == ["completed"]
    assert bill_of(world, run_id)[0] == 3


def test_a_batch_that_is_unknown_at_its_deadline_is_lost(waiter: Waiter) -> None:
    """Nobody waits longer for it than for any other."""
    waiter.world.simulator.add_faults({"fault": "fail_before", "status": 404, **GET})

    assert waiter.look(WaitPolicy(deadline_hours=0.0)) is Verdict.OVER


def test_the_deadline_counts_from_the_submission(waiter: Waiter) -> None:
    """Neither a restart nor a retry moves it."""
    policy = WaitPolicy(deadline_hours=2.0, cancel_hours=0.5)

    deadline = policy.deadline(waiter.batch)

    assert waiter.batch.submitted_at is not None
    assert deadline == waiter.batch.submitted_at + timedelta(hours=2)
    assert policy.last_call(waiter.batch) == deadline + timedelta(minutes=30)
    waiter.look()
    assert policy.deadline(waiter.batch) == deadline


def test_past_the_deadline_it_is_cancelled_once(waiter: Waiter) -> None:
    """The cancel is asked for, the batch ends as cancelled and can be collected."""
    policy = WaitPolicy(deadline_hours=0.0, cancel_hours=9.0)
    before = waiter.cancels()

    waiter.look_until_over(policy)

    assert waiter.batch.api_status == "cancelled"
    assert waiter.cancels() == before + 1


def test_a_batch_that_does_not_end_is_given_up(waiter: Waiter) -> None:
    """After the last call it is OVER whatever the API says, and is called abandoned."""
    assert waiter.look(WaitPolicy(deadline_hours=0.0, cancel_hours=0.0)) is Verdict.OVER
    assert (waiter.batch.state, waiter.batch.api_status) == (BatchState.ENDED, "abandoned")

"""Twelve shards, a token limit with room for two: all go through, in order, at no extra cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from include import pipeline, run_mode
from include.ledger_records import BatchState, Run
from include.local_stack.rest import wait_until
from include.simulator.process import Simulator
from tests.faults.world import QUICK, World, job

pytestmark = pytest.mark.faults

SHARDS = 12
PATIENCE = 120.0  # seconds
TIMES = {"seconds_validating": 0.05, "seconds_in_progress": 0.3, "seconds_finalizing": 0.05}
POLICY = replace(QUICK, lease=600.0, busy_pause=0.3)


def drain(world: World, *, meanwhile: Callable[[], None] = lambda: None) -> Run:
    """Send every shard of round 1 its own way at once; return the run."""
    ledger = world.ledger()
    run = pipeline.open_run(
        ledger, world.spec, world.partition, mode=run_mode.NORMAL, dag_id="d", dag_run_id="r"
    )
    run = pipeline.extract(run, ledger, world.artifacts(), world.source)
    batches = pipeline.build(run, 1, ledger, world.artifacts(), world.target, most_shards=1024)
    assert len(batches) == SHARDS
    with ThreadPoolExecutor(SHARDS) as pool:
        shards = pool.map(lambda batch: world.shard(batch, ledger), batches)
        meanwhile()
        list(shards)
    assert {one.state for one in ledger.batches(run.run_id)} == {BatchState.COLLECTED}
    assert pipeline.settle(run, 1, ledger, world.api(), POLICY).succeeded == SHARDS * 5
    return run


def on_their_way(world: World, run: Run) -> Iterator[list[int]]:
    """The shards at the API, or about to be, after each change of one of them."""
    shards = {one.submission_id: one.shard for one in world.ledger().batches(run.run_id)}
    under_way: list[int] = []
    for event in world.ledger().history(run.run_id):
        shard = shards.get(event["submission_id"])
        if shard is not None and event["became"] == BatchState.SUBMITTING:
            under_way.append(shard)
        if shard is not None and event["became"] == BatchState.ENDED:
            under_way.remove(shard)
        yield list(under_way)


def test_a_known_limit_is_kept_without_a_refusal(tmp_path: Path) -> None:
    """With `limits.enqueued_tokens`, shards wait for their turn: one create each, in order."""
    with Simulator.start(tmp_path / "simulator", **TIMES) as simulator:
        limits = {"requests_per_batch": 5, "enqueued_tokens": 2 * tokens_of_a_shard(tmp_path)}
        world = World(tmp_path, simulator, spec=job(limits=limits), policy=POLICY)
        world.fill(SHARDS * 5)

        run = drain(world)

        counts = simulator.batches()
    steps = list(on_their_way(world, run))
    turns = list(dict.fromkeys(shard for step in steps for shard in step))
    assert turns == sorted(turns)
    assert len(turns) == SHARDS
    assert max(map(len, steps)) <= 2
    assert (counts["creates"], counts["uploads"]) == (SHARDS, SHARDS)
    assert len(counts["batches"]) == SHARDS


@pytest.mark.parametrize("mode", ["at_create", "later"])
def test_an_unknown_limit_costs_no_upload_and_no_round(tmp_path: Path, mode: str) -> None:
    """The API refuses for its limit: every shard is sent again from the same uploaded file."""
    with Simulator.start(tmp_path / "simulator", **TIMES) as simulator:
        (rule, _) = simulator.add_faults(
            {"fault": "token_limit", "enqueued_tokens": 60, "mode": mode},
            {"fault": "stuck", "nth": 1},
        )

        def until_one_is_refused() -> None:
            """However slow the others are, the first one is still enqueued when they come."""
            wait_until("a refusal", PATIENCE, lambda: simulator.fired(rule["id"]), interval=0.05)
            simulator.release()

        world = World(
            tmp_path, simulator, spec=job(limits={"requests_per_batch": 5}), policy=POLICY
        )
        world.fill(SHARDS * 5)

        drain(world, meanwhile=until_one_is_refused)

        counts = simulator.batches()
        assert simulator.fired(rule["id"]) > 0
        assert simulator.bill()["requests"] == SHARDS * 5
    assert counts["uploads"] == SHARDS


def tokens_of_a_shard(folder: Path) -> int:
    """The ledger's own estimate for five of the notes."""
    scratch = folder / "scratch"
    scratch.mkdir()
    with Simulator.start(scratch / "simulator", instant=True) as simulator:
        world = World(scratch, simulator, spec=job(limits={"requests_per_batch": 5}))
        world.fill(5)
        ledger = world.ledger()
        run = pipeline.open_run(
            ledger, world.spec, world.partition, mode=run_mode.NORMAL, dag_id="d", dag_run_id="r"
        )
        run = pipeline.extract(run, ledger, world.artifacts(), world.source)
        (batch,) = pipeline.build(run, 1, ledger, world.artifacts(), world.target, most_shards=1024)
        return batch.input_tokens + 2  # later rows have one digit more

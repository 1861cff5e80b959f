"""Twelve shards, a token limit with room for two: all go through, in order, at no extra cost."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from include import pipeline
from include.ledger_records import BatchState
from include.simulator.process import Simulator
from tests.faults.world import QUICK, World, job

pytestmark = pytest.mark.faults

SHARDS = 12
TIMES = {"seconds_validating": 0.05, "seconds_in_progress": 0.3, "seconds_finalizing": 0.05}
POLICY = replace(QUICK, lease=60.0, busy_pause=0.3)


def drain(world: World) -> list[dict[str, Any]]:
    """Send every shard of round 1 its own way at once; return the server's batches."""
    ledger = world.ledger()
    run = pipeline.open_run(
        ledger, world.spec, world.partition, mode=pipeline.NORMAL, dag_id="d", dag_run_id="r"
    )
    run = pipeline.extract(run, ledger, world.artifacts(), world.source)
    batches = pipeline.build(run, 1, ledger, world.artifacts(), world.target, most_shards=1024)
    assert len(batches) == SHARDS
    with ThreadPoolExecutor(SHARDS) as pool:
        list(pool.map(lambda batch: world.shard(batch, ledger), batches))
    assert {one.state for one in ledger.batches(run.run_id)} == {BatchState.COLLECTED}
    assert pipeline.settle(run, 1, ledger, world.api(), POLICY).succeeded == SHARDS * 5
    made: list[dict[str, Any]] = world.simulator.batches()["batches"]
    return made


def shard_numbers(batches: list[dict[str, Any]]) -> list[int]:
    return [int(one["metadata"]["shard"]) for one in batches]


def test_a_known_limit_is_kept_without_a_refusal(tmp_path: Path) -> None:
    """With `limits.enqueued_tokens`, shards wait for their turn: one create each, in order."""
    with Simulator.start(tmp_path / "simulator", **TIMES) as simulator:
        limits = {"requests_per_batch": 5, "enqueued_tokens": 2 * tokens_of_a_shard(tmp_path)}
        world = World(tmp_path, simulator, spec=job(limits=limits), policy=POLICY)
        world.fill(SHARDS * 5)

        made = drain(world)

        counts = simulator.batches()
    places = list(enumerate(shard_numbers(made), 1))  # two may be on their way at once
    assert max(abs(place - number) for place, number in places) <= 1
    assert (len(made), counts["creates"], counts["uploads"]) == (SHARDS, SHARDS, SHARDS)


@pytest.mark.parametrize("mode", ["at_create", "later"])
def test_an_unknown_limit_costs_no_upload_and_no_round(tmp_path: Path, mode: str) -> None:
    """The API refuses for its limit: every shard is sent again from the same uploaded file."""
    with Simulator.start(tmp_path / "simulator", **TIMES) as simulator:
        (rule,) = simulator.add_faults(
            {"fault": "token_limit", "enqueued_tokens": 60, "mode": mode}
        )
        world = World(
            tmp_path, simulator, spec=job(limits={"requests_per_batch": 5}), policy=POLICY
        )
        world.fill(SHARDS * 5)

        drain(world)

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
            ledger, world.spec, world.partition, mode=pipeline.NORMAL, dag_id="d", dag_run_id="r"
        )
        run = pipeline.extract(run, ledger, world.artifacts(), world.source)
        (batch,) = pipeline.build(run, 1, ledger, world.artifacts(), world.target, most_shards=1024)
        return batch.input_tokens + 2  # later rows have one digit more

"""Random schedules of faults over runs of three rounds; the seed in a failure repeats it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from include.simulator.process import Simulator
from tests.faults.audit import Result, full_audit, result_of
from tests.faults.conftest import Tally
from tests.faults.effects import EXIT_AFTER, EXIT_BEFORE, EXIT_LATE, Effects, Said, finished
from tests.faults.world import World, job

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("quick_retries")]

ROWS = 22
SHARDS = 5
SEEDS, FAST_SEEDS, BLOCK = 200, 10, 25
POST = {"method": "POST", "path": "/batches$"}
# Without any other fault some rows need a second round, and some of these a third one.
ROUNDS: list[dict[str, Any]] = [
    {"fault": "line_error", "status": 500, "fraction": 0.5, "metadata": {"round": "1"}},
    {"fault": "line_error", "status": 429, "fraction": 0.4, "seed": 5, "metadata": {"round": "2"}},
]
CALL_FAULTS: list[dict[str, Any]] = [
    {"fault": "fail_before", "status": 500},
    {"fault": "fail_before", "status": 429, "retry_after": 0},
    {"fault": "fail_after", "status": 503},
    {"fault": "reset_before"},
    {"fault": "reset_after"},
    {"fault": "stall_before", "seconds": 0.35},
    {"fault": "stall_after", "seconds": 0.35},
]
DOWNLOAD_FAULTS: list[dict[str, Any]] = [
    {"fault": "truncate"},
    {"fault": "truncate", "content_length": False},
]
SERVICE_FAULTS: list[dict[str, Any]] = [
    {"fault": "token_limit", "enqueued_tokens": 0},
    {"fault": "token_limit", "enqueued_tokens": 0, "mode": "later"},
    {"fault": "rate_limit", "creates": 0, "per_seconds": 1},
    {"fault": "file_not_found", "seconds": 0.1},
]
# These cost their rows a round; a third round is left in any case.
BATCH_FAULTS: list[dict[str, Any]] = [
    {"fault": "expire"},
    {"fault": "expire", "fraction": 0.0},
    {"fault": "fail_batch"},
    {"fault": "output_lost"},
    {"fault": "output_lost", "mode": "empty"},
    {"fault": "batch_lost"},
]
HARMLESS: list[dict[str, Any]] = [
    {"fault": "long_ids"},
    {"fault": "omit_nulls"},
    {"fault": "empty_ids"},
    {"fault": "counts_lie", "completed": 7, "total": -3},
    {"fault": "file_shape", "bom": True, "crlf": True, "no_final_newline": True},
]
LINE_FAULTS: list[dict[str, Any]] = [
    {"fault": name, "fraction": 0.3}
    for name in (
        "drop_line",
        "torn_line",
        "schema_invalid",
        "duplicate_line",
        "foreign_line",
        "body_as_string",
        "line_separator",
        "nan",
        "nul",
        "lone_surrogate",
        "in_error_file",
    )
]
LINE_FAULTS += [{"fault": "line_error", "status": status, "fraction": 0.3} for status in (408, 503)]


def _schedule(seed: int) -> tuple[list[dict[str, Any]], Effects]:
    """Return the rules for the simulator, and a crash of our own."""
    draw = random.Random(seed)

    def some(kinds: list[dict[str, Any]], most: int, **more: Any) -> list[dict[str, Any]]:
        picked = draw.choices(kinds, k=draw.randint(0, most))
        return [{**one, **more, "seed": draw.randrange(1000)} for one in picked]

    rules = [
        {**one, "nth": draw.randint(1, 60), "times": 1} for one in some(CALL_FAULTS, 3, path="/v1/")
    ]
    rules += [{**one, "nth": draw.randint(1, 6)} for one in some(CALL_FAULTS, 2, **POST)]
    rules += [{**one, "nth": draw.randint(1, 9)} for one in some(DOWNLOAD_FAULTS, 2)]
    rules += some(SERVICE_FAULTS, 1, times=2)
    rules += [
        {**one, "nth": draw.randint(1, SHARDS), "metadata": {"round": draw.choice("12")}}
        for one in some(BATCH_FAULTS, 2)
    ]
    rules += [{**one, "probability": 0.5} for one in some(HARMLESS, 2)]
    rules += [{**one, "metadata": {"round": draw.choice("12")}} for one in some(LINE_FAULTS, 3)]
    is_forgotten = any(rule["fault"] == "batch_lost" for rule in rules)
    if is_forgotten:
        # A batch that the API forgets at once and whose answer is lost as well: nobody can know.
        rules = [{**one, "method": "GET"} if "path" in one else one for one in rules]
    # Ids that no earlier schedule had: batches keep their rules, and count for them, for ever.
    rules = [{**one, "id": f"{seed}-{number}"} for number, one in enumerate(rules)]
    kind = draw.choice([EXIT_BEFORE, EXIT_AFTER, EXIT_LATE])
    n = draw.randint(1, 20 if kind == EXIT_LATE else 200)
    return rules, Effects(0 if is_forgotten else n, kind)


def _world(folder: Path, service: Simulator, day: int, effects: Effects, inner: Any) -> World:
    home = folder / f"day-{day}"
    home.mkdir()
    world = World(home, service, day, job(), effects.transport(inner), create_timeout=0.25)
    world.fill(ROWS)
    world.close()
    world.prepare = effects.prepare
    return world


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Simulator]:
    """A simulator for a block of seeds: its books stay short."""
    with Simulator.start(tmp_path / "simulator", instant=True) as simulator:
        yield simulator


def _without_faults(folder: Path, service: Simulator, inner: Any, said: Said) -> Result:
    nothing = Effects(0, EXIT_AFTER)
    service.add_faults(*ROUNDS)
    world = finished(_world(folder, service, 0, nothing, inner), nothing, inner, said)
    result = result_of(world)
    assert not full_audit(world, str(said))
    assert sum(name.startswith("round-1/") for name in result.files) == SHARDS
    assert any(name.startswith("round-3/") for name in result.files)
    assert len(result.results) == ROWS
    world.close()
    return result


@pytest.mark.parametrize("block", range(SEEDS // BLOCK), ids=lambda block: f"from {block * BLOCK}")
def test_random_schedules(
    *,
    block: int,
    tmp_path: Path,
    service: Simulator,
    network: httpx2.HTTPTransport,
    said: Said,
    tally: Tally,
    all_faults: bool,
) -> None:
    """Whatever passes goes wrong: nothing is lost or paid twice, and the tables are the same."""
    if block and not all_faults:
        pytest.skip("a part of --all-faults")
    like = _without_faults(tmp_path, service, network, said)
    first = block * BLOCK
    fired = 0
    for seed in range(first, first + (BLOCK if all_faults else FAST_SEEDS)):
        rules, effects = _schedule(seed)
        said.lines.clear()
        service.clear_faults()
        added = service.add_faults(*ROUNDS, *rules)[len(ROUNDS) :]
        world = _world(tmp_path, service, seed + 1, effects, network)
        story = f"seed {seed}: {rules}, {effects.kind} at effect {effects.n}"
        try:
            finished(world, effects, network, said)
            counts = {one["id"]: one for one in service.faults()}
            service.clear_faults()
            findings = full_audit(world, str(said), like=like, first_round_only=True)
        except Exception as error:
            raise AssertionError(f"{story}\n{said}") from error
        for rule in added:
            tally.add(
                f"random: {rule['fault']}",
                fired=counts[rule["id"]]["fired"],
                rows=ROWS * (counts[rule["id"]]["fired"] > 0),
                findings=findings if rule is added[0] else [],
            )
            fired += counts[rule["id"]]["fired"]
        tally.add("random: process exit", fired=effects.fired, rows=ROWS, findings=findings)
        fired += effects.fired
        world.close()
        assert not findings, f"{story}\n{findings}\n{said}"
    assert fired > FAST_SEEDS

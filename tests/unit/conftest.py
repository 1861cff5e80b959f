"""A run of the real steps on a simulator that answers at once; a module may have another one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from include.simulator.process import Simulator
from tests.faults.world import World

ROWS = 8  # two files of five and three


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    """A simulator for all worlds of a module."""
    with Simulator.start(tmp_path_factory.mktemp("simulator"), instant=True) as simulator:
        yield simulator


@pytest.fixture(scope="module")
def days() -> Iterator[int]:
    """Days of the worlds of a module: no two have the same on one simulator."""
    return count()


@pytest.fixture
def world(service: Simulator, tmp_path: Path, days: Iterator[int]) -> Iterator[World]:
    """A partition of eight rows, nothing done yet."""
    world = World(tmp_path, service, next(days))
    world.fill(ROWS)
    yield world
    world.close()

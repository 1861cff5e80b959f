"""The inputs of all steps, made once for each size and seed."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path

from include.bench.measurement import BenchError, Place
from include.bench.steps import STEPS, Step

VERSION = 2  # of what the generators write


def place_of(home: Path, rows: int, seed: int) -> Place:
    """Return the folder for one size."""
    return Place(home / f"{rows}-{seed}-v{VERSION}", rows, seed)


def ready(name: str, place: Place) -> None:
    """Write the input of a step, unless it is there. Raises `BenchError` when that fails."""
    step = STEPS[name]
    if step.input_of is not None:
        ready(step.input_of, place)
    done = place.folder / f"{step.module}.ready"
    if done.exists():
        return
    place.folder.mkdir(parents=True, exist_ok=True)
    # In a process of its own: what is made here must not be part of anybody's memory.
    process = multiprocessing.get_context("spawn").Process(target=_prepare, args=(step, place))
    process.start()
    process.join()
    if process.exitcode:
        raise BenchError(f"the input of {name} could not be made")
    done.touch()


def _prepare(step: Step, place: Place) -> None:
    step.prepare(place)


def clear_scratch(place: Place) -> None:
    """Remove what contenders have written."""
    shutil.rmtree(place.folder / "scratch", ignore_errors=True)
    for folder in ("chat", "embeddings", "embeddings_numbers"):
        shutil.rmtree(place.folder / folder / "collected", ignore_errors=True)

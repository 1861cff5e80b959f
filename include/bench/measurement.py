"""One measured piece of work in a process of its own: CPU, wall clock, peak memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Self

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 1_800.0  # seconds that one piece of work may take
Notes = Mapping[str, float]


class BenchError(RuntimeError):
    """A contender did not finish; the message has the end of what it said."""


@dataclass(frozen=True)
class Place:
    """Where a contender finds its input and may write: the folder of one input size."""

    folder: Path
    rows: int
    seed: int

    def scratch(self) -> Path:
        """Return a folder for output, which later contenders overwrite."""
        folder = self.folder / "scratch"
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@dataclass(frozen=True)
class Task:
    """What is measured. `size` is the bytes that it moves, `outside` CPU seconds of a server."""

    run: Callable[[], Notes | None]
    size: int
    outside: Callable[[], float] = lambda: 0.0


@dataclass(frozen=True)
class Measurement:
    """CPU seconds of the work (imports before it excluded), and the rest."""

    cpu: float
    wall: float  # seconds
    memory: float  # MB, the peak of the whole process
    size: int  # bytes
    server: float = 0.0  # CPU seconds of a database server
    notes: Notes = field(default_factory=dict)

    @property
    def total(self) -> float:
        """CPU seconds on both sides."""
        return self.cpu + self.server

    @classmethod
    def middle(cls, runs: list[Self]) -> Measurement:
        """Return the medians of several runs of the same work."""
        names = runs[0].notes.keys()
        return Measurement(
            cpu=median(one.cpu for one in runs),
            wall=median(one.wall for one in runs),
            memory=median(one.memory for one in runs),
            size=runs[0].size,
            server=median(one.server for one in runs),
            notes={name: median(one.notes[name] for one in runs) for name in names},
        )


def measured(task: Task) -> Measurement:
    """Run a piece of work in this process."""
    outside, cpu, wall = task.outside(), _cpu(), time.perf_counter()
    notes = task.run() or {}
    cpu, wall = _cpu() - cpu, time.perf_counter() - wall
    return Measurement(cpu, wall, _peak(), task.size, task.outside() - outside, notes)


def in_own_process(step: str, contender: str, place: Place) -> Measurement:
    """Run a contender in a process of its own. Raises `BenchError` when it does not finish."""
    words = [step, contender, str(place.folder), str(place.rows), str(place.seed)]
    done = subprocess.run(
        [sys.executable, "-m", "include.bench.contender", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    if done.returncode:
        raise BenchError(f"{step}, {contender}: {done.stderr.strip()[-2_000:]}")
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def as_json(found: Measurement) -> str:
    """Return what `in_own_process` reads."""
    return json.dumps(asdict(found))


def _cpu() -> float:
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime


def _peak() -> float:
    """Return the peak in MB. `ru_maxrss` would count the parent that we were forked from."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)

"""A run in a process of its own: `python -m tests.faults.one_run FOLDER URL DAY JOB`.

JOB is `plain` or `thrifty`.

Its calls carry its process id, so that the simulator can kill it at a chosen one.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from include import batch_api
from include.simulator.process import Simulator
from tests.faults.world import World, job, thrifty_job

JOBS = {"plain": job, "thrifty": thrifty_job}


def main(folder: Path, url: str, day: int, name: str) -> None:
    """Do the run, or what an earlier process has left of it."""
    logging.basicConfig(level=logging.INFO)
    batch_api.FIRST_PAUSE = 0.002
    simulator = Simulator(folder, [])
    simulator.url = url
    headers = {"x-llm-batch-pid": str(os.getpid())}
    world = World(folder, simulator, day, JOBS[name](), headers=headers)
    world.run()
    print(*world.run_ids)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])

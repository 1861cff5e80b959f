"""A drain in a process of its own: `python -m tests.faults.one_drain FOLDER SIMULATOR DATABASE`.

Its calls carry its process id, so that the simulator can kill it at a chosen one.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from include import batch_api
from include.simulator.process import Simulator
from tests.faults.queue_world import QueueWorld


def main(folder: Path, service: str, database: str) -> None:
    """Take what waits, and do everything that is open, as Airflow would try it again."""
    logging.basicConfig(level=logging.INFO)
    batch_api.FIRST_PAUSE = 0.002
    simulator = Simulator(folder, [])
    simulator.url = service
    headers = {"x-llm-batch-pid": str(os.getpid())}
    world = QueueWorld(folder, simulator, headers=headers, url=database)
    world.drain()
    for run in world.open_runs():
        world.process(run)
    print(world.application().statistics())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])

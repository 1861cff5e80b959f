"""An application in a process of its own: `python -m tests.faults.one_writer DATABASE FIRST LAST`.

Puts its requests a few at a time, the last few twice, as after an answer that was lost.
"""

from __future__ import annotations

import sys
import time

from include.request_queue import RequestQueue
from tests.faults.queue_world import request

AT_ONCE = 25
PAUSE = 0.02  # seconds, so that drains find something new each time


def main(database: str, first: int, last: int) -> None:
    """Put the requests from `first` up to `last`, which is not one of them."""
    queue, put = RequestQueue(database), 0
    for start in range(first, last, AT_ONCE):
        some = [request(number) for number in range(start, min(start + AT_ONCE, last))]
        put += queue.put_many(some) + queue.put_many(some[:3])
        time.sleep(PAUSE)
    print(put)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

"""`python -m include.bench.contender STEP CONTENDER FOLDER ROWS SEED`: one measured process."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from include.bench.measurement import Place, as_json, measured
from include.bench.steps import STEPS


def main(words: Sequence[str]) -> None:
    """Print one measurement as JSON."""
    step, contender, folder, rows, seed = words
    place = Place(Path(folder), int(rows), int(seed))
    make = STEPS[step].contenders()[contender]
    print(as_json(measured(make(place))))


if __name__ == "__main__":
    main(sys.argv[1:])

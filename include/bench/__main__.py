"""`python -m include.bench`: what each step costs, against its limit and the plain way."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from include.bench import postgres, report
from include.bench.inputs import clear_scratch, place_of, ready
from include.bench.measurement import ROOT, BenchError, Measurement, Place, in_own_process
from include.bench.steps import STEPS

DOCUMENT = ROOT / "docs" / "performance.md"
PRODUCT = "product"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the page if asked to."""
    options = _options(arguments)
    try:
        run = bench(options, lambda text: print(text, file=sys.stderr, flush=True))
    except BenchError as error:
        print(error, file=sys.stderr)
        return 1
    print(report.tables(run))
    if options.write:
        DOCUMENT.write_text(report.document(run), encoding="utf-8")
    return 0


def bench(options: argparse.Namespace, say: Callable[[str], None]) -> report.Run:
    """Run the chosen steps. Raises `BenchError` when one of them fails."""
    skipped = {}
    steps = [name for name in STEPS if not options.only or name in options.only]
    if "postgres" in steps and (why := postgres.create()):
        steps.remove("postgres")
        skipped["postgres"] = why
    try:
        results = [_step(name, options, say) for name in steps]
    finally:
        if "postgres" in steps:
            postgres.drop()
    return report.Run(results, options.rows, options.runs, options.seed, skipped)


def _step(name: str, options: argparse.Namespace, say: Callable[[str], None]) -> report.Result:
    rows = STEPS[name].rows or options.rows
    place = _ready(name, rows, options, say)
    found: dict[str, list[Measurement]] = {one: [] for one in STEPS[name].contenders()}
    for _ in range(options.runs):
        for contender, runs in found.items():
            runs.append(_measured(name, contender, place, say))
    middle = {one: Measurement.middle(runs) for one, runs in found.items()}
    growth = {rows: middle[PRODUCT]}
    for other in (int(rows * times) for times in STEPS[name].growth if options.growth):
        if other not in growth:
            place = _ready(name, other, options, say)
            growth[other] = _measured(name, PRODUCT, place, say)
    return report.Result(name, rows, middle, growth)


def _ready(name: str, rows: int, options: argparse.Namespace, say: Callable[[str], None]) -> Place:
    place = place_of(options.home.resolve(), rows, options.seed)
    say(f"{name}: input of {rows:,} rows")
    ready(name, place)
    return place


def _measured(name: str, contender: str, place: Place, say: Callable[[str], None]) -> Measurement:
    found = in_own_process(name, contender, place)
    clear_scratch(place)
    say(f"  {contender}: {found.total:.2f} CPU s, {found.wall:.2f} s, {found.memory:.0f} MB")
    return found


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m include.bench", description=__doc__)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--runs", type=int, default=3, help="of each contender; medians are told")
    parser.add_argument("--no-growth", dest="growth", action="store_false", help="one size only")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=list(STEPS), help="steps")
    parser.add_argument("--home", type=Path, default=ROOT / ".bench", help="for its files")
    parser.add_argument("--quick", action="store_true", help="20,000 rows, one run, no growth")
    parser.add_argument("--write", action="store_true", help="write docs/performance.md")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rows, options.runs, options.growth = 20_000, 1, False
    return options


if __name__ == "__main__":
    sys.exit(main())

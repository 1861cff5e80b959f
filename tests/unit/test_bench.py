"""The bench runs all of its contenders on the real modules, and writes its page."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from include.bench import postgres, report
from include.bench.__main__ import bench
from include.bench.inputs import place_of, ready
from include.bench.measurement import BenchError, Measurement, in_own_process
from include.bench.steps import STEPS
from include.bench.texts import tickets


def options(home: Path, *steps: str) -> argparse.Namespace:
    """Return what the command line would give for a tiny run."""
    return argparse.Namespace(
        home=home, rows=400, runs=1, growth=False, seed=1, only=list(steps), write=False
    )


def test_every_contender_runs(tmp_path: Path) -> None:
    """On the same input, each in a process of its own, with a limit to compare with."""
    run = bench(
        options(tmp_path, "build", "embeddings", "embeddings_numbers", "sqlite"), lambda _: None
    )

    assert [result.step for result in run.results] == [
        "build",
        "embeddings",
        "embeddings_numbers",
        "sqlite",
    ]
    for result in run.results:
        assert list(result.contenders) == ["limit", "product", "plain"]
        assert all(one.size > 0 and one.memory > 10 for one in result.contenders.values())
    page = report.document(run)
    assert page.startswith("# Performance\n")
    assert page.count("| product ") == 4


def test_the_same_seed_gives_the_same_rows() -> None:
    """Two machines measure the same work."""
    assert list(tickets(50, 1)) == list(tickets(50, 1))
    assert list(tickets(50, 1)) != list(tickets(50, 2))


def test_a_contender_that_fails_is_told(tmp_path: Path) -> None:
    """Not left out of the table."""
    place = place_of(tmp_path, 10, 1)

    with pytest.raises(BenchError, match="build, product"):
        in_own_process("build", "product", place)


def test_input_is_made_once(tmp_path: Path) -> None:
    """A second run measures at once."""
    place = place_of(tmp_path, 100, 1)
    ready("collect", place)
    written = {path: path.stat().st_mtime_ns for path in place.folder.rglob("*")}

    ready("collect", place)

    assert {path: path.stat().st_mtime_ns for path in place.folder.rglob("*")} == written


def test_medians_are_told() -> None:
    """One slow run does not change a figure."""
    runs = [Measurement(cpu, 1.0, 90.0, 5, 0.5, {"calls": cpu}) for cpu in (1.0, 9.0, 2.0)]

    middle = Measurement.middle(runs)

    assert (middle.total, middle.notes) == (2.5, {"calls": 2.0})


def test_no_database_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page says what was not measured, and why."""
    monkeypatch.setenv(postgres.SERVER, "postgresql://nobody@127.0.0.1:1/none")

    run = bench(options(tmp_path, "postgres"), lambda _: None)

    assert "Not measured: postgres (127.0.0.1: OperationalError" in report.tables(run)


def test_all_steps_say_what_they_measure() -> None:
    """The titles take the number of rows."""
    for step in STEPS.values():
        assert "{" not in step.title.format(rows=1_000, tenth=100)

"""Whole runs into a Parquet dataset, against the simulator."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pandas as pd
import pytest

from include import run_mode
from include.artifacts import Artifacts
from include.audit import Finding, audit
from include.dataset_path import dataset_at
from include.figures import counted
from include.local_stack import showing
from include.local_stack.summary import Summarizer
from include.parquet_layout import FAILURES, RESULTS, part_path
from include.simulator.process import Simulator
from tests.faults.world import TEXT, World, job

ROWS = 12
AGAIN = {"fault": "line_error", "status": 500, "fraction": 0.4, "first_times": 1}
REFUSED = {"fault": "refusal", "fraction": 0.3, "seed": 3}


class DatasetWorld(World):
    """A world whose job has a dataset as its target."""

    def target(self) -> Artifacts:  # type: ignore[override]
        """The dataset's files."""
        return dataset_at(self.spec.target.path)

    def frame(self, kind: str) -> pd.DataFrame:
        """The rows, as pandas finds them."""
        return pd.read_parquet(f"{self.spec.target.path}/{kind}")

    def findings(self) -> list[Finding]:
        """What the audit finds in the last run."""
        return audit(
            self.run_ids[-1],
            self.ledger(),
            self.artifacts(),
            self.target(),
            self.api(),
            skew=timedelta(seconds=5),
        )


@pytest.fixture
def world(tmp_path: Path) -> Iterator[DatasetWorld]:
    """Rows that succeed at once, succeed the second time, and fail."""
    state = tmp_path / "simulator"
    with Simulator.start(state, instant=True, faults=[AGAIN, REFUSED]) as service:
        spec = job(target={"path": f"{tmp_path}/labels"})
        found = DatasetWorld(tmp_path, service, spec=spec)
        found.fill(ROWS)
        yield found
        found.close()


def test_every_row_ends_in_one_file(world: DatasetWorld) -> None:
    """Typed results and failures with their reason; the audit has no finding."""
    report = world.run()

    results, failures = world.frame(RESULTS), world.frame(FAILURES)
    assert report.loaded == len(results) > 0
    assert report.failed == len(failures) > 0
    assert report.rounds == 2
    assert len(set(results["note_id"]) | set(failures["note_id"])) == ROWS
    assert results["score"].dtype == "float64"
    assert set(failures["_reason"]) == {"refusal"}
    assert world.findings() == []


def test_second_run_sends_nothing(world: DatasetWorld) -> None:
    """What is in the dataset is reused, failures as well; not a byte changes."""
    world.run()
    paid = world.simulator.bill()["requests"]
    before = [_bytes(world, kind) for kind in (RESULTS, FAILURES)]

    report = world.run()

    assert (report.reused, report.requests) == (ROWS, 0)
    assert world.simulator.bill()["requests"] == paid
    assert [_bytes(world, kind) for kind in (RESULTS, FAILURES)] == before
    assert world.findings() == []


def test_redrive_sends_the_failed_rows_only(world: DatasetWorld) -> None:
    """Results of the first run stay; a row of the failures that succeeds moves."""
    first = world.run()
    world.simulator.clear_faults()

    report = world.run(mode=run_mode.REDRIVE)

    assert report.requests == first.failed
    assert report.loaded == first.failed
    results = world.frame(RESULTS)
    assert len(results) == ROWS
    assert len(world.frame(FAILURES)) == 0
    assert results.groupby("_run_id").size().to_dict() == {
        world.run_ids[0]: first.loaded, world.run_ids[1]: first.failed,
    }  # fmt: skip
    assert world.findings() == []


def test_load_that_was_killed_is_made_again(world: DatasetWorld) -> None:
    """The run goes on at its load, and pays for nothing."""
    replace, calls = Path.replace, []

    def dying(self: Path, target: Path) -> Path:
        if str(target).endswith("data.parquet"):
            calls.append(target)
            if len(calls) == 2:
                raise SystemExit
        return replace(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", dying)
        with pytest.raises(SystemExit):
            world.run()
    paid = world.simulator.bill()["requests"]

    report = world.run()

    assert world.simulator.bill()["requests"] == paid
    assert report.loaded + report.failed == ROWS
    assert len(world.run_ids) == 1
    assert world.findings() == []


def test_the_audit_finds_rows_that_disappeared(world: DatasetWorld) -> None:
    """A file that is gone takes its rows with it; they are named by position, without text."""
    report = world.run()
    world.target().delete(part_path(RESULTS, world.partition.start))

    (finding,) = world.findings()

    assert finding.invariant == "I1"
    assert f"{counted(report.loaded, 'row is', 'rows are')} in neither" in finding.message
    assert TEXT not in finding.message


def test_the_local_stack_counts_its_keys(world: DatasetWorld) -> None:
    """The summary of a day looks into the files, and says how to read them."""
    world.run()
    run = world.ledger().run(world.run_ids[0])
    summarizer = Summarizer(world.spec, world.ledger(), world.artifacts(), world.target())

    assert summarizer._missing_keys(run) == 0
    assert "read_parquet" in showing.result_rows(world.target(), world.spec)
    assert "read_parquet" in showing.failure_rows(world.target(), world.spec)
    assert showing.failure_reasons(world.target(), world.spec) == {}
    world.target().delete(part_path(FAILURES, world.partition.start))
    assert summarizer._missing_keys(run) == run.failed > 0


def _bytes(world: DatasetWorld, kind: str) -> bytes:
    with world.target().open(part_path(kind, world.partition.start)) as stream:
        return stream.read()

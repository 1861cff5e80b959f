"""Every way in which a batch can end, and every shape of its files: what becomes of the rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from include import run_mode
from include.errors import BudgetExceededError
from include.report import RunReport
from include.simulator.process import Simulator
from tests.faults.audit import bill_of, full_audit, rows_of
from tests.faults.conftest import Tally
from tests.faults.effects import Said, until_done
from tests.faults.world import QUICK, FirstIsLate, World, job

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("quick_retries")]

ROWS = 8  # two request files: 5 + 3 rows
DAYS = count()
FIRST = {"metadata": {"round": "1"}}  # strikes in round 1 only
ONE = {**FIRST, "nth": 1}  # and only the first batch
POST = {"method": "POST", "path": "/batches$"}
CONTENT = {"method": "GET", "path": "/content$"}


class Bench:
    """One world, and the rules that its simulator was given."""

    def __init__(self, world: World, said: Said, tally: Tally) -> None:
        self.world = world
        self.rules: list[dict[str, Any]] = []
        self._said = said
        self._tally = tally
        world.fill(ROWS)

    def add(self, *rules: dict[str, Any]) -> None:
        """Let things go wrong."""
        named = [{**rule, "id": f"{self.world.day}-{n}"} for n, rule in enumerate(rules)]
        self.rules += self.world.simulator.add_faults(*named)

    def run(self, mode: str = run_mode.NORMAL) -> RunReport:
        """Run to the end, see that every fault fired, and audit."""
        report = until_done(self.world, self._said, mode=mode)
        fired = {one["id"]: one["fired"] for one in self.world.simulator.faults()}
        findings = full_audit(self.world, str(self._said))
        for rule in self.rules:
            self._tally.add(rule["fault"], fired=fired[rule["id"]], rows=ROWS, findings=findings)
        assert all(fired[rule["id"]] for rule in self.rules), f"did not fire: {fired}"
        assert not findings, f"{self.rules}\n{findings}\n{self._said}"
        return report

    def results(self) -> list[str]:
        return [row["note_id"] for row in rows_of(self.world, "note_labels")]

    def failures(self) -> list[dict[str, Any]]:
        return rows_of(self.world, "note_labels_failures")

    def billed(self) -> int:
        """Requests that were paid for, in all runs of this world."""
        return sum(bill_of(self.world, run_id)[0] for run_id in set(self.world.run_ids))

    def bodies(self, number: int) -> list[dict[str, Any]]:
        """The requests that were sent in a round of the latest run."""
        batches = self.world.ledger().batches(self.world.run_ids[-1], number)
        paths = [self.world.folder / "artifacts" / one.request_file for one in batches]
        return [json.loads(line) for path in paths for line in path.read_bytes().splitlines()]


@pytest.fixture
def bench(folder: Path, service: Simulator, said: Said, tally: Tally) -> Iterator[Bench]:
    world = World(folder, service, next(DAYS))
    yield Bench(world, said, tally)
    world.close()
    service.clear_faults()


@pytest.fixture(scope="module")
def slow_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    """A simulator whose batches take their time, so that they can be seen on the way."""
    with Simulator.start(
        tmp_path_factory.mktemp("slow"),
        seconds_validating=0.02,
        seconds_in_progress=0.1,
        seconds_finalizing=0.02,
        seconds_cancelling=0.02,
    ) as simulator:
        yield simulator


@pytest.fixture
def slow(folder: Path, slow_service: Simulator, said: Said, tally: Tally) -> Iterator[Bench]:
    world = World(folder, slow_service, next(DAYS))
    yield Bench(world, said, tally)
    world.close()
    slow_service.clear_faults()


def test_a_file_that_is_unknown_for_a_moment_is_not_paid_again(bench: Bench) -> None:
    """Its download answers 404 twice: it is asked for again, and no row goes round again."""
    bench.add({"fault": "fail_before", "status": 404, **CONTENT, "times": 2})

    report = bench.run()

    assert (report.loaded, report.rounds, report.requests) == (ROWS, 1, ROWS)
    assert bench.bodies(2) == []


@pytest.mark.parametrize(
    "rule",
    [
        {"fault": "expire", "fraction": 0.5, **ONE},
        {"fault": "expire", "fraction": 0.0, **ONE},
        {"fault": "fail_batch", **ONE},
        {"fault": "batch_lost", **ONE},
        {"fault": "output_lost", "mode": "null", **ONE},
        {"fault": "output_lost", "mode": "empty", **ONE},
        {"fault": "drop_line", "fraction": 0.4, **FIRST},
        {"fault": "torn_line", "fraction": 0.4, **FIRST},
        {"fault": "nan", "fraction": 0.4, **FIRST},
        {"fault": "schema_invalid", "fraction": 0.4, **FIRST},
        {"fault": "corrupt", "line": 1, "bytes": 40},
        *({"fault": "line_error", "status": s, **FIRST} for s in (408, 409, 429, 500, 503)),
    ],
    ids=str,
)
def test_what_passes_is_sent_again(bench: Bench, rule: dict[str, Any]) -> None:
    """The rows that may succeed go round again, the others do not; all of them are loaded."""
    bench.add({**rule, "times": 1} if rule["fault"] == "corrupt" else rule)

    report = bench.run()

    assert report.loaded == ROWS
    assert report.rounds == 2
    again = len(bench.bodies(2))
    assert again == bench.world.ledger().rounds(report.run_id)[0].retry
    assert report.requests == ROWS + again


@pytest.mark.parametrize(
    "rule",
    [
        {"fault": "long_ids"},
        {"fault": "omit_nulls"},
        {"fault": "empty_ids"},
        {"fault": "counts_lie", "completed": 5, "failed": 3, "total": -2},
        {"fault": "counts_lie", "completed": -5, "total": 100},
        {"fault": "truncate", "nth": 1},
        {"fault": "truncate", "nth": 1, "content_length": False},
        {"fault": "truncate", "nth": 1, "at_bytes": 0, "content_length": False},
        {"fault": "file_shape", "bom": True},
        {"fault": "file_shape", "crlf": True},
        {"fault": "file_shape", "no_final_newline": True},
        {"fault": "body_as_string"},
        {"fault": "line_separator"},
        {"fault": "nul"},
        {"fault": "lone_surrogate"},
        {"fault": "in_error_file"},
        {"fault": "long_line", "fraction": 0.2},
        {"fault": "duplicate_line"},
        {"fault": "foreign_line"},
        {"fault": "fail_before", "method": "GET", "status": 500, "every": 3},
        {"fault": "fail_before", "method": "GET", "status": 429, "retry_after": 0, "every": 3},
        {"fault": "reset_after", "method": "GET", "every": 3},
    ],
    ids=str,
)
def test_what_is_only_odd_costs_no_round(bench: Bench, rule: dict[str, Any]) -> None:
    """Odd objects, odd files and broken polls: every answer that was paid for is used."""
    bench.add(rule)

    report = bench.run()

    assert (report.loaded, report.rounds, report.requests) == (ROWS, 1, ROWS)
    assert bench.billed() == ROWS


def test_lines_that_belong_nowhere_are_counted(bench: Bench) -> None:
    """A second line of a request and a line of a foreign one are quarantined by name."""
    bench.add({"fault": "duplicate_line"}, {"fault": "foreign_line"})

    report = bench.run()

    batches = bench.world.ledger().batches(report.run_id)
    assert sum(one.duplicates for one in batches) == ROWS
    assert sum(one.quarantined for one in batches) == ROWS
    assert report.loaded == ROWS


def test_lines_named_at_validation_fail_and_the_rest_goes_again(bench: Bench) -> None:
    """The API refuses a whole file for one line: that row has failed, the others have not."""
    bench.add({"fault": "fail_batch", "code": "invalid_body", "lines": [2], **ONE})

    report = bench.run()

    (failure,) = bench.failures()
    assert failure["note_id"] == "n0001"
    assert (failure["_reason"], failure["_error_code"]) == ("invalid_request", "invalid_body")
    assert (report.loaded, report.failed) == (ROWS - 1, 1)
    assert len(bench.bodies(2)) == 4
    assert bench.billed() == ROWS - 1


def test_a_file_that_is_always_refused_ends_in_the_failures_table(bench: Bench) -> None:
    """The rounds are bounded: then every row has a reason, the rounds it had, and no bill."""
    bench.add({"fault": "fail_batch"})

    report = bench.run()

    assert (report.loaded, report.failed, report.rounds) == (0, ROWS, 3)
    assert {(one["_reason"], one["_rounds"]) for one in bench.failures()} == {("batch_failed", 3)}
    assert bench.billed() == 0


def test_rows_left_over_keep_their_last_error(bench: Bench) -> None:
    """A row that fails in every round is in the failures table with reason, rounds and error."""
    bench.add({"fault": "line_error", "status": 500, "code": "overloaded", "fraction": 0.4})

    report = bench.run()

    failures = bench.failures()
    assert report.failed == len(failures)
    assert 0 < len(failures) < ROWS
    assert {(one["_reason"], one["_error_code"], one["_rounds"]) for one in failures} == {
        ("server_error", "overloaded", 3)
    }


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ({"fault": "refusal"}, "refusal"),
        ({"fault": "content_filter"}, "content_filter"),
        ({"fault": "line_error", "status": 400}, "invalid_request"),
        ({"fault": "line_error", "status": 404}, "invalid_request"),
    ],
)
def test_what_would_fail_again_is_not_sent_again(
    bench: Bench, rule: dict[str, Any], reason: str
) -> None:
    """Refusals, filters and bad requests fail at once."""
    bench.add({**rule, "fraction": 0.4})

    report = bench.run()

    assert report.rounds == 1
    assert 0 < report.failed < ROWS
    assert {one["_reason"] for one in bench.failures()} == {reason}


def test_a_cut_off_answer_gets_more_room(bench: Bench) -> None:
    """The second round doubles the token limit, the third doubles it again; ids stay."""
    bench.add({"fault": "cut_off", "fraction": 0.4, "first_times": 2})

    report = bench.run()

    limits = [
        {line["body"]["max_completion_tokens"] for line in bench.bodies(n)} for n in (1, 2, 3)
    ]
    assert limits == [{200}, {400}, {800}]
    ids = [{line["custom_id"] for line in bench.bodies(n)} for n in (1, 2, 3)]
    assert ids[2] == ids[1] < ids[0]
    assert report.loaded == ROWS


def test_a_redrive_sends_exactly_the_failed_rows(bench: Bench) -> None:
    """After the cause is mended, the failed rows alone go again, and leave the failures table."""
    bench.add({"fault": "line_error", "status": 400, "fraction": 0.4})
    bench.run()
    failed = {one["_custom_id"] for one in bench.failures()}
    paid = bench.billed()
    bench.world.simulator.clear_faults()
    bench.rules.clear()

    report = bench.run(mode=run_mode.REDRIVE)

    assert {line["custom_id"] for line in bench.bodies(1)} == failed
    assert (report.loaded, report.reused) == (len(failed), ROWS - len(failed))
    assert bench.billed() == paid + len(failed)
    assert len(bench.results()) == ROWS
    assert bench.failures() == []


def test_running_a_done_partition_again_sends_nothing(bench: Bench) -> None:
    """Loaded rows and rows that have failed for good cost nothing a second time."""
    bench.add({"fault": "refusal", "fraction": 0.4})
    bench.run()
    before = (bench.results(), bench.failures(), bench.world.simulator.bill())
    bench.rules.clear()

    report = bench.run()

    assert (report.requests, report.reused) == (0, ROWS)
    assert (bench.results(), bench.failures(), bench.world.simulator.bill()) == before


def test_every_first_answer_is_lost(bench: Bench) -> None:
    """The answer of no POST ever comes back: one batch per request file all the same."""
    bench.add(
        {"fault": "reset_after", **POST},
        {"fault": "line_error", "status": 500, "fraction": 0.4, **FIRST},
    )
    posts = bench.world.simulator.batches()["creates"]

    report = bench.run()

    made = bench.world.simulator.batches()["creates"] - posts
    files = bench.world.ledger().batches(report.run_id)
    assert made == len(files) == len({one.batch_id for one in files}) == 3
    assert bench.world.simulator.fired(bench.rules[0]["id"]) == 3
    assert report.loaded == ROWS


def test_two_runs_of_a_partition_at_once(bench: Bench, said: Said) -> None:
    """A backfill over a partition that is being worked on: the same work, done once."""
    policy = replace(QUICK, lease=600.0)
    worlds = [replace(bench.world, policy=policy, run_ids=[], _engines={}) for _ in range(2)]
    bench.world.ledger()
    start = Barrier(2)

    def work(world: World) -> RunReport:
        start.wait()
        return until_done(world, said)

    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(work, worlds))

    for world in worlds:
        bench.world.run_ids += world.run_ids
        world.close()
    assert not full_audit(bench.world, str(said))
    assert len(reports) == 2
    assert bench.billed() == ROWS
    assert len(bench.results()) == ROWS


def test_an_unknown_status_is_waited_for(slow: Bench) -> None:
    """A status that no documentation names is simply not final."""
    slow.add({"fault": "unknown_status", "status": "paused"})

    report = slow.run()

    assert (report.loaded, report.rounds) == (ROWS, 1)


@pytest.mark.parametrize("status", ["validating", "in_progress", "finalizing"])
def test_a_batch_past_its_deadline_is_cancelled(slow: Bench, status: str) -> None:
    """What it has done by then is kept, the rest goes round again, nothing is paid twice."""
    slow.world.wait = FirstIsLate(has=lambda batch: batch.api_status == status)
    slow.add({"fault": "stuck", "status": status, **ONE})

    report = slow.run()

    first, second, *_ = slow.world.ledger().batches(report.run_id)
    assert first.api_status == "cancelled"
    assert first.retry == {"validating": 5, "finalizing": 0}.get(status, first.retry)
    assert second.api_status == "completed"
    assert len(slow.bodies(2)) == first.retry
    assert report.loaded == ROWS
    assert slow.billed() == ROWS


def test_partial_results_of_a_cancelled_batch_are_kept(slow: Bench) -> None:
    """A part of a slow batch is done at its deadline: it is loaded and not sent again."""
    slow.world.wait = FirstIsLate(has=lambda batch: batch.done_requests > 0)
    slow.add({"fault": "stuck", "seconds": 10.0, **ONE})

    report = slow.run()

    first = slow.world.ledger().batches(report.run_id)[0]
    assert first.api_status == "cancelled"
    assert 0 < first.succeeded < first.requests
    assert first.succeeded + first.retry == first.requests
    assert report.loaded == ROWS
    assert slow.billed() == ROWS


def test_a_batch_that_does_not_even_cancel_is_given_up(slow: Bench) -> None:
    """After the last call its rows go round again; a batch cannot hold a partition for ever."""
    slow.world.wait = FirstIsLate(is_deaf=True)
    slow.add(
        {"fault": "stuck", "status": "validating", **ONE},
        {"fault": "stuck", "status": "cancelling", **ONE},
    )

    report = slow.run()

    first = slow.world.ledger().batches(report.run_id)[0]
    assert first.api_status == "abandoned"
    assert report.loaded == ROWS
    assert slow.billed() == ROWS


def test_the_price_is_the_bill(bench: Bench) -> None:
    """Every answered line is paid for, failed ones too: the ledger has the API's sum, exactly."""
    bench.add(
        {"fault": "line_error", "status": 500, "fraction": 0.3, **FIRST},
        {"fault": "refusal", "fraction": 0.4},
    )

    report = bench.run()

    assert report.cost_usd == bill_of(bench.world, report.run_id)[1]
    assert report.cost_usd > 0


def test_a_run_over_its_budget_sends_nothing(bench: Bench) -> None:
    """The estimate is above the budget: nothing is uploaded, and nothing is on the bill."""
    world = bench.world
    world.spec = job(budget={"max_usd": "0.000001"})
    uploads = world.simulator.batches()["uploads"]

    with pytest.raises(BudgetExceededError, match=r"budget\.max_usd"):
        world.run()

    assert world.simulator.batches()["uploads"] == uploads
    assert world.ledger().batches(world.run_ids[0]) == []
    assert bench.billed() == 0

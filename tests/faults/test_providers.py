"""The same job on every provider: the same rows, the bill's dollars, and nothing paid twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from include.errors import ConfigurationError
from include.job_spec import JobSpec
from include.local_stack.rest import wait_until
from include.provider import AZURE, COMPATIBLE, OPENAI, ProviderProfile
from include.simulator.process import Simulator
from tests.faults.audit import bill_of, full_audit, rows_of
from tests.faults.conftest import Tally
from tests.faults.effects import Said, until_done
from tests.faults.world import FirstIsLate, World, job

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("quick_retries")]

ROWS = 12  # three request files: 5 + 5 + 2 rows
MODEL = "gpt-4o-mini"
DEPLOYMENT = "our-mini"
PROFILES = [OPENAI, replace(AZURE, models={DEPLOYMENT: MODEL}), COMPATIBLE]
POST = {"method": "POST", "path": "/batches$"}
DAYS = count()
PATIENCE = 60.0  # seconds
AT_WORK = ("in_progress", "processing")  # as the providers say it


@pytest.fixture(scope="module", params=PROFILES, ids=lambda profile: profile.name)
def profile(request: pytest.FixtureRequest) -> ProviderProfile:
    found: ProviderProfile = request.param
    return found


@pytest.fixture(scope="module")
def service(
    profile: ProviderProfile, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Simulator]:
    """A simulator that plays the provider, in batches that take a moment."""
    with start(tmp_path_factory.mktemp(profile.name), profile) as simulator:
        yield simulator


def start(state: Path, profile: ProviderProfile, **options: Any) -> Simulator:
    if profile.models:
        options["deployments"] = ",".join(f"{own}={model}" for own, model in profile.models.items())
    if "instant" not in options:
        options["speed"] = 20
    return Simulator.start(state, profile=profile.name, **options)


def job_of(profile: ProviderProfile, **changes: Any) -> JobSpec:
    """The job, with its model by the name that it has at the provider."""
    spec = job(**changes)
    own = next(iter(profile.models), MODEL)
    return spec.model_copy(update={"request": spec.request.model_copy(update={"model": own})})


@pytest.fixture
def world(folder: Path, service: Simulator, profile: ProviderProfile) -> Iterator[World]:
    made = World(folder, service, next(DAYS), job_of(profile), profile=profile)
    made.fill(ROWS)
    yield made
    made.close()
    # A stalled call outlives its client, and must not use up a rule of the next test.
    wait_until("the end of all calls", PATIENCE, lambda: all_ended(service), interval=0.05)
    service.clear_faults()


def all_ended(service: Simulator) -> bool:
    """Whether no call for batches is under way."""
    calls = [one for one in service.requests() if one["path"].endswith("/batches")]
    return all(one["seconds"] for one in calls)


def test_a_job_with_errors_comes_to_the_same(world: World, said: Said, tally: Tally) -> None:
    """Whatever way error lines are written: what may pass goes again, the rest fails for good."""
    ids = {"seed": 3, "fraction": 0.4}
    world.simulator.add_faults(
        {"fault": "line_error", "status": 400, **ids},
        {"fault": "line_error", "status": 500, "fraction": 0.7, "first_times": 1},
        {"fault": "line_error", "status": 429, "fraction": 0.5, "seed": 1, "first_times": 1},
    )

    report = until_done(world, said)

    findings = full_audit(world, str(said))
    tally.add("line_error", fired=3, rows=ROWS, findings=findings)
    failures = rows_of(world, "note_labels_failures")
    assert findings == []
    assert report.loaded + report.failed == ROWS
    assert {row["_reason"] for row in failures} == {"invalid_request"}
    assert report.rounds > 1
    assert report.cost_usd == bill_of(world, report.run_id)[1] > 0


@pytest.mark.parametrize("fault", ["reset_after", "fail_after", "reset_before", "stall_before"])
def test_a_lost_answer_pays_nothing_twice(
    world: World, fault: str, said: Said, tally: Tally
) -> None:
    """The answer to the second POST is lost: the batch that was made is found, or made once."""
    slow = {"seconds": 2.2} if fault == "stall_before" else {}
    (rule,) = world.simulator.add_faults({"fault": fault, **POST, "nth": 2, **slow})
    world.create_timeout = 1.0 if slow else world.create_timeout

    report = until_done(world, said)

    findings = full_audit(world, str(said))
    tally.add(fault, fired=1, rows=ROWS, findings=findings)
    assert world.simulator.fired(rule["id"]) == 1
    assert findings == []
    assert report.loaded == ROWS
    assert (ROWS, report.cost_usd) == bill_of(world, report.run_id)


def test_a_full_queue_is_waited_out(world: World, said: Said) -> None:
    """A refusal for the token quota, at creation or afterwards, uses up no round and no row."""
    rules = [{"fault": "token_limit", "enqueued_tokens": 0, "mode": mode, "times": 1}
             for mode in ("at_create", "later")]  # fmt: skip
    world.simulator.add_faults(*rules)

    report = until_done(world, said)

    assert full_audit(world, str(said)) == []
    assert (report.loaded, report.rounds) == (ROWS, 1)
    assert report.cost_usd == bill_of(world, report.run_id)[1]


def test_what_a_cancelled_batch_has_done_is_kept(world: World, said: Said) -> None:
    """A batch past its deadline is cancelled, in whatever spelling, and the rest goes again."""
    world.simulator.add_faults(
        {"fault": "stuck", "status": "in_progress", "nth": 1, "metadata": {"round": "1"}}
    )
    world.wait = FirstIsLate(has=lambda batch: batch.api_status in AT_WORK)

    report = until_done(world, said)

    assert full_audit(world, str(said)) == []
    assert (report.loaded, report.rounds) == (ROWS, 2)
    assert report.cost_usd == bill_of(world, report.run_id)[1]


def test_a_batch_that_is_listed_late_is_found_by_its_file(folder: Path, said: Said) -> None:
    """No metadata, listed after the grace period, its file deleted: still known as a duplicate."""
    with start(folder / "simulator", COMPATIBLE, instant=True) as service:
        world = World(folder, service, spec=job_of(COMPATIBLE), profile=COMPATIBLE)
        world.fill(3)
        service.add_faults(
            {"fault": "reset_after", **POST, "nth": 1},
            # Three looks find nothing: the two of the grace period, and that after the fence.
            {"fault": "hide_new_batches", "seconds": 3_600, "times": 3},
        )
        report = until_done(world, said)
        ledger = world.ledger()
        batches = ledger.batches(report.run_id)
        world.close()

    made = {one["batch_id"] for one in service_batches(report.run_id, ledger)}
    assert report.loaded == 3
    assert len(made) == 1  # the second one of the two is the ledger's own
    assert made.isdisjoint(one.batch_id for one in batches)


def service_batches(run_id: str, ledger: Any) -> list[Any]:
    return list(ledger.duplicates([one.submission_id for one in ledger.batches(run_id)]))


def test_a_server_without_a_list_stops_before_a_second_batch(folder: Path, said: Said) -> None:
    """In doubt and unable to look, nothing is sent: a person has to."""
    blind = replace(COMPATIBLE, lists_batches=False)
    with start(folder / "simulator", blind, instant=True) as service:
        world = World(folder, service, spec=job_of(blind), profile=blind)
        world.fill(3)
        service.add_faults({"fault": "reset_after", **POST, "nth": 1})

        for _ in range(2):
            with pytest.raises(ConfigurationError, match="nobody can tell whether it was made"):
                world.run()

        assert len(service.batches()["batches"]) == 1
        world.close()


def test_a_server_without_a_list_runs(folder: Path, said: Said) -> None:
    """As long as no answer is lost, nothing has to be looked for."""
    blind = replace(COMPATIBLE, lists_batches=False)
    with start(folder / "simulator", blind, instant=True) as service:
        world = World(folder, service, spec=job_of(blind), profile=blind)
        world.fill(3)

        report = until_done(world, said)

        assert report.loaded == 3
        assert service.batches()["lists"] == 0
        world.close()


def test_an_endpoint_that_azure_does_not_batch_is_refused(folder: Path) -> None:
    """Before anything is uploaded, with the endpoints that it takes."""
    request = {"endpoint": "/v1/moderations", "model": DEPLOYMENT, "prompt": "{{ body }}"}
    with start(folder / "simulator", AZURE, instant=True) as service:
        world = World(folder, service, spec=job(request=request), profile=AZURE)
        world.fill(1)

        with pytest.raises(ConfigurationError, match=r"takes batches of /v1/chat/completions, "):
            world.run()

        assert service.batches()["uploads"] == 0
        world.close()

"""The pages in a real browser, in a real Airflow: what they show is true, live, and guarded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import pytest
import sqlalchemy as sa
import yaml

from include import actions
from include.airflow_address import run_page
from include.figures import count, dollars
from include.job_spec import JOBS_ROOT
from include.ledger import Ledger
from include.ledger_records import Batch, Run
from include.local_stack.browser import TIMEOUT, browser, chromium, new_page
from include.local_stack.environment import JOBS, OPENAI, PROJECT, simulator_connection
from include.local_stack.rest import FINAL_RUN_STATES, wait_until
from include.local_stack.stack import Stack
from include.report import run_report
from include.simulator.process import Simulator
from include.source_tables import load_sample_tickets

if TYPE_CHECKING:
    from playwright.sync_api import Browser, FrameLocator, Locator, LocatorAssertions, Page

pytestmark = [pytest.mark.system, pytest.mark.browser, pytest.mark.long]

T = TypeVar("T")
JOB = "ticket_triage"
FIRST = datetime(2026, 11, 1, tzinfo=UTC)
OWNER, VIEWER = f"ann@{JOB}", f"vera@{JOB}"
PASSWORDS = {OWNER: "owner-7d1", VIEWER: "viewer-3c9", "pat@commit_labels": "stranger-5e2"}
PATIENCE = 420.0  # seconds
CHANGES = {"limits": {"requests_per_batch": 100}, "alert": {"failure_rate": 0.5}}
HELD = 900.0  # seconds that a batch of a live run takes: no test waits for its end


class Office:
    """A stack with three users, a simulator, and a browser."""

    def __init__(self, stack: Stack, simulator: Simulator, running: Browser) -> None:
        self.stack, self.simulator, self.browser = stack, simulator, running
        self.ledger = Ledger(sa.create_engine(f"sqlite:///{stack.home}/data/ledger.db"))
        self._day = 0
        self._pages: dict[str, Page] = {}

    def trigger(self) -> str:
        """Trigger a run over the next unused day."""
        self._day += 1
        return self.trigger_again()

    def trigger_again(self, **conf: Any) -> str:
        """Trigger another run over the same day."""
        start = FIRST + timedelta(days=self._day - 1)
        return self.stack.client.trigger(
            JOB,
            logical_date=start + timedelta(days=1, minutes=len(conf)),
            interval=(start, start + timedelta(days=1)),
            conf=conf,
        )

    def finished(self) -> str:
        """Trigger a run and return it when it has succeeded."""
        run_id = self.trigger()
        self.wait_for_success(run_id)
        return run_id

    def wait_for_success(self, run_id: str) -> None:
        """Wait for the end of a run, which must be a good one."""

        def state() -> str | None:
            found = self.stack.client.run(JOB, run_id).state
            return found if found in FINAL_RUN_STATES else None

        states = self.stack.client.task_states
        assert self.wait_until(f"the end of {run_id}", state) == "success", states(JOB, run_id)

    def wait_until(self, what: str, probe: Callable[[], T | None]) -> T:
        """Wait, while SQLite may end a component of Airflow."""

        def found() -> T | None:
            self.stack.keep_running()
            return probe()

        return wait_until(what, PATIENCE, found)

    def deferred(self) -> str:
        """Trigger a run whose batches take a while, and return it when it waits for them."""
        self.simulator.add_faults({"fault": "stuck", "seconds": HELD})
        run_id = self.trigger()
        states = self.stack.client.task_states
        self.wait_until(
            f"{run_id} to wait",
            lambda: states(JOB, run_id).get("round_1.shard.wait[0]") == "deferred",
        )
        return run_id

    def wait_for_cancelled(self, run_id: str) -> None:
        """Wait until the API has cancelled every batch of a run."""
        for batch in self.batches(run_id):
            self.wait_until(
                f"{batch} to be cancelled", lambda one=batch: self.status(one) == "cancelled"
            )

    def run(self, run_id: str) -> Run:
        return self.ledger.run(self.stack.client.xcom(JOB, run_id, "extract")["run_id"])

    def batches(self, run_id: str) -> list[Batch]:
        return self.ledger.batches(self.run(run_id).run_id)

    def status(self, batch: Batch) -> str:
        found = {one["id"]: one["status"] for one in self.simulator.batches()["batches"]}
        return str(found[batch.batch_id])

    def page(self, user: str) -> Page:
        """Return the browser page of a user who has logged in by Airflow's form."""
        if user not in self._pages:
            page = new_page(self.browser, self.stack.url, dark=user == VIEWER)
            page.goto("/")
            page.locator("input[name=username]").fill(user)
            page.locator("input[name=password]").fill(PASSWORDS[user])
            page.locator("button[type=submit]").click()
            page.wait_for_url(lambda url: "/auth/" not in url)
            self._pages[user] = page
        return self._pages[user]

    def tab(self, user: str, run_id: str) -> FrameLocator:
        """Open the tab of a run and return what is in its frame."""
        page = self.page(user)
        page.goto(f"{run_page(JOB, run_id)}/plugin/llm-batches-run")
        frame = page.frame_locator("iframe")
        frame.locator("main h1").first.wait_for()
        return frame


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory, missing: Any) -> Iterator[Office]:
    if chromium() is None:
        missing("no Chromium")
    home = tmp_path_factory.mktemp("home")
    with (
        Simulator.start(tmp_path_factory.mktemp("simulator"), seconds_in_progress=1) as simulator,
        browser() as running,
    ):
        simulator.add_faults(
            {"fault": "line_error", "status": 500, "fraction": 0.1, "first_times": 1},
            {"fault": "line_error", "status": 400, "fraction": 0.05, "seed": 7},
        )
        dags = home / "dags"
        dags.mkdir()
        shutil.copy(PROJECT / "dags" / f"{JOB}.py", dags)
        with Stack(home, env=_settings(home, simulator), dags=dags) as stack:
            login = {"username": OWNER, "password": PASSWORDS[OWNER]}
            stack.client._token = stack.client._once("POST", "/auth/token", login)["access_token"]
            load_sample_tickets(sa.create_engine(f"sqlite:///{home}/data/source.db"))
            stack.wait_for_dag(JOB, PATIENCE)
            stack.client.set_paused(JOB, paused=False)
            yield Office(stack, simulator, running)


def _settings(home: Path, simulator: Simulator) -> dict[str, str]:
    shutil.copytree(JOBS_ROOT, home / "jobs")
    path = home / "jobs" / JOB / "job.yaml"
    job = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(job | CHANGES))
    passwords = home / "passwords.json"
    passwords.write_text(json.dumps(PASSWORDS))
    roles = {OWNER: "admin", VIEWER: "viewer", "pat@commit_labels": "admin"}
    return {
        JOBS: str(home / "jobs"),
        OPENAI: simulator_connection(simulator.base_url),
        "AIRFLOW__LLM_BATCH__FIRST_POLL": "2",
        "AIRFLOW__SCHEDULER__USE_JOB_SCHEDULE": "False",  # no run but those of the tests
        "AIRFLOW__LLM_BATCH__POLL_INTERVAL": "1",
        "AIRFLOW__LLM_BATCH__RETRY_DELAY": "3",
        "AIRFLOW__CORE__AUTH_MANAGER": "tests.dag_owners.DagOwners",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "False",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": ",".join(
            f"{name}:{role}" for name, role in roles.items()
        ),
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(passwords),
        "PYTHONPATH": f"{PROJECT}:{PROJECT / 'plugins'}",
    }


@pytest.fixture(scope="module")
def done(office: Office) -> str:
    """A finished run with some failed rows and two rounds."""
    run_id = office.finished()
    run = office.run(run_id)
    assert run.failed > 0
    assert len(office.ledger.rounds(run.run_id)) > 1
    return run_id


def seen(part: Locator) -> LocatorAssertions:
    """Assert something of a part of a page that its scripts bring about."""
    from playwright.sync_api import expect

    expect.set_options(timeout=TIMEOUT)
    return expect(part)


def _text(frame: FrameLocator, selector: str) -> str:
    return frame.locator(selector).first.inner_text().strip()


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def test_a_link_of_ours_marks_the_tab_it_leads_to(office: Office, done: str) -> None:
    """From our page over a DAG to a run: Airflow marks our tab there, whatever the run's id has."""
    page = office.page(OWNER)
    page.goto(f"/dags/{JOB}/plugin/llm-batches-dag")
    page.frame_locator("iframe").locator("#runs tbody th a").first.click()
    page.wait_for_url("**/plugin/llm-batches-run")
    page.frame_locator("iframe").locator("main h1").first.wait_for()

    marked = page.locator("a[aria-current=page][href*='llm-batches-run']")

    assert "+" in done
    seen(marked).to_have_count(1)


def test_the_figures_of_a_run_are_the_ledgers(office: Office, done: str) -> None:
    """Rows, rounds, tokens, cost and reasons on the page are what the ledger and its report say."""
    run = office.run(done)
    report = run_report(run, office.ledger)
    frame = office.tab(OWNER, done)

    figures = [_text(frame, f"#rows-{name}") for name in ("done", "failed", "open", "total")]
    tiles = dict(_lines(one)[:2] for one in frame.locator(".tile").all_inner_texts())
    rounds = [row.split("\t") for row in frame.locator("#rounds tbody tr").all_inner_texts()]
    reasons = {
        row.split("\t")[0]: row.split("\t")[2]
        for row in frame.locator("#reasons tbody tr").all_inner_texts()
    }

    assert figures == [count(n) for n in (run.loaded + run.reused, run.failed, 0, run.rows)]
    assert run.cost_usd == sum(one.cost_usd or Decimal(0) for one in office.batches(done))
    assert tiles["Cost"] == dollars(run.cost_usd)
    assert tiles["Tokens in"] == count(report.input_tokens)
    assert tiles["Tokens out"] == count(report.output_tokens)
    assert tiles["Batches"] == count(report.batches)
    assert [(one[0], *one[3:7]) for one in rounds] == [
        (str(one.round), *map(count, (one.requests, one.succeeded, one.retry, one.failed)))
        for one in office.ledger.rounds(run.run_id)
    ]
    assert reasons == {name: count(times) for name, times in report.reasons.items()}


def test_the_pages_over_a_dag_and_all_jobs_agree_with_the_ledger(office: Office, done: str) -> None:
    """The day's field in the calendar, and the money of the job."""
    run = office.run(done)
    page = office.page(OWNER)
    for path in (f"/dags/{JOB}/plugin/llm-batches-dag", "/plugin/llm-batches"):
        page.goto(path)
        frame = page.frame_locator("iframe")
        frame.locator("#calendar").wait_for()

        day = frame.locator(f'#calendar a[title^="{run.interval_start:%Y-%m-%d}"]')
        title = day.get_attribute("title") or ""
        assert f"{count(run.failed)} failed of {count(run.rows)} rows" in title
        assert dollars(run.cost_usd) in title


def test_links_leave_the_frame(office: Office, done: str) -> None:
    """A field of the calendar opens the run's own tab in Airflow, though the frame is sandboxed."""
    page = office.page(OWNER)
    page.goto("/plugin/llm-batches")
    frame = page.frame_locator("iframe")
    day = office.run(done).interval_start

    frame.locator(f'#calendar a[title^="{day:%Y-%m-%d}"]').click()

    page.wait_for_url(lambda url: f"/dags/{JOB}/runs/" in url and "llm-batches-run" in url)


def test_the_pages_follow_airflows_theme(office: Office, done: str) -> None:
    """Dark in Airflow is dark in the frame."""
    frame = office.tab(VIEWER, done)
    light = office.tab(OWNER, done)

    seen(frame.locator("html")).to_have_attribute("data-theme", "dark")
    seen(light.locator("html")).to_have_attribute("data-theme", "light")


def test_a_live_run_moves_and_cancels(office: Office) -> None:
    """Progress moves without a reload; a viewer cannot cancel, the owner can."""
    run_id = office.deferred()
    frame = office.tab(OWNER, run_id)
    frame.locator("html").evaluate("root => { root.dataset.mark = 'not reloaded' }")

    first = _text(frame, "#rows-done")
    office.wait_until("progress on the page", lambda: _text(frame, "#rows-done") != first)
    assert frame.locator("html").get_attribute("data-mark") == "not reloaded"

    _refused(office, run_id)
    _cancelled(office, run_id)


def _refused(office: Office, run_id: str) -> None:
    """A viewer sees no button, and neither page nor form lets them."""
    batch = office.batches(run_id)[0]
    frame = office.tab(VIEWER, run_id)
    query = f"dag_id={JOB}&ledger_run={batch.run_id}&submission_id={batch.submission_id}"
    asked = office.page(VIEWER).request.get(f"/llm-batch/cancel?{query}")
    sent = office.page(VIEWER).request.post(
        f"/llm-batch/cancel?{query}",
        form={"token": "made up"},
        headers={"origin": office.stack.url},
    )

    assert frame.get_by_text("Cancel").count() == 0
    assert (asked.status, sent.status) == (403, 403)
    assert office.status(batch) == "in_progress"
    assert actions.history(office.ledger, run_id=batch.run_id) == []


def _cancelled(office: Office, run_id: str) -> None:
    """Two clicks: the question with rows and money, then the deed."""
    frame = office.tab(OWNER, run_id)
    frame.locator("#cancel-run").click()
    frame.locator("#stopped").wait_for()
    assert "$" in _text(frame, "#stopped")
    assert run_id in frame.locator(".ask").inner_text()

    frame.get_by_role("button", name="Cancel the run").click()
    frame.locator(".said").wait_for()

    office.wait_for_cancelled(run_id)
    assert office.stack.client.run(JOB, run_id).state == "failed"
    (line,) = actions.history(office.ledger, run_id=office.run(run_id).run_id)
    assert (line.who, line.via, line.kind, line.outcome) == (OWNER, "ui", "cancel_run", "done")
    events = office.stack.client._pages(f"/eventLogs?dag_id={JOB}", "event_logs")
    assert {"llm_batch_cancel", "patch_dag_run"} <= {one["event"] for one in events}


def test_a_run_that_another_has_replaced_is_closed(office: Office) -> None:
    """Its job has changed: two clicks end it, and what it has cost stays in the ledger."""
    run_id = office.deferred()
    run = office.run(run_id)
    assert office.tab(OWNER, run_id).locator("#close-run").count() == 0, "it may still end"
    office.stack.client.mark_run(JOB, run_id, "failed")
    office.wait_for_cancelled(run_id)
    office.simulator.clear_faults()
    office.wait_for_success(office.trigger_again(model="gpt-5-nano"))

    frame = office.tab(OWNER, run_id)
    frame.locator("#close-run").click()
    assert _text(frame, "#close-rows").startswith(count(run.rows))
    frame.get_by_role("button", name="Close the run").click()
    frame.locator(".said").wait_for()

    closed = office.ledger.run(run.run_id)
    costs = [one.cost_usd for one in office.batches(run_id)]
    assert (closed.state, closed.cost_usd) == ("CLOSED", sum(one or Decimal(0) for one in costs))
    (line,) = actions.history(office.ledger, run_id=run.run_id)
    assert (line.who, line.via, line.kind, line.outcome) == (OWNER, "ui", "close", "done")


def test_failed_rows_are_redriven_from_the_page(office: Office, done: str) -> None:
    """After the cause is mended, two clicks send exactly the failed rows again."""
    office.simulator.clear_faults()
    run = office.run(done)
    billed = sum(1 for _ in office.simulator.bill_lines())
    frame = office.tab(OWNER, done)
    frame.locator("#redrive").click()
    frame.locator("#redrive-rows").wait_for()
    assert _text(frame, "#redrive-rows") == count(run.failed)

    frame.get_by_role("button", name="Redrive").click()
    frame.locator(".said").wait_for()

    (line, *_) = actions.history(office.ledger, run_id=run.run_id)
    started = str(line.detail).removeprefix("Airflow run ")
    assert (line.who, line.outcome) == (OWNER, "done")
    office.wait_for_success(started)
    again = office.run(started)
    assert (again.mode, again.loaded, again.failed) == ("redrive", run.failed, 0)
    assert sum(1 for _ in office.simulator.bill_lines()) - billed == run.failed


def test_narrow_pages_do_not_overflow(office: Office, done: str) -> None:
    """On 390 pixels only tables and charts scroll, inside their own frames."""
    page = office.page(OWNER)
    run = office.run(done)
    query = f"dag_id={JOB}&run_id={quote(done, safe='')}"
    page.set_viewport_size({"width": 390, "height": 800})
    try:
        for path in (f"/llm-batch/run?{query}", "/llm-batch/jobs", f"/llm-batch/dag?dag_id={JOB}"):
            page.goto(path)
            wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
            assert wide <= 0, (path, run.run_id)
    finally:
        page.set_viewport_size({"width": 1280, "height": 860})

"""`python -m include.local_stack.screenshots`: the pictures of the documentation, taken anew.

A stack of its own with the simulator works on some days of tickets; Chromium looks at them.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import sqlalchemy as sa
import yaml

from include.airflow_address import run_page
from include.errors import LLMBatchError
from include.job_spec import JOBS_ROOT
from include.local_stack.backfill import Days, start_backfill, wait_for_runs
from include.local_stack.browser import browser, new_page
from include.local_stack.environment import JOBS, OPENAI, PROJECT, simulator_connection
from include.local_stack.rest import wait_until
from include.local_stack.stack import Stack
from include.simulator.faults import DEMO
from include.simulator.process import Simulator
from include.source_tables import load_sample_tickets

if TYPE_CHECKING:
    from playwright.sync_api import Browser, FrameLocator

IMAGES = PROJECT / "docs" / "images"
MOST_BYTES = 200_000
JOB = "ticket_triage"
DONE = Days(JOB, date(2026, 11, 1), date(2026, 11, 3))
LIVE = date(2026, 11, 4)
WAITING = {"deferred", "awaiting_input"}  # states of Airflow
PATIENCE = 600.0  # seconds for all days
SLOW = 90.0  # seconds that the batches of the live run take
STILL = 1_500  # milliseconds until Airflow's own page has settled
CAREFUL = "careful_triage"  # the same, but a person has to approve what it may cost
# Several shards a round, and a budget within the reach of a bar.
CHANGES = {
    "limits": {"requests_per_batch": 100},
    "budget": {"max_usd": 0.06},
    "alert": {"failure_rate": 0.2},
}
FAILING = {"fault": "line_error", "status": 400, "fraction": 0.03, "seed": 3}


@dataclass(frozen=True)
class Studio:
    """A running stack with something to look at."""

    stack: Stack
    simulator: Simulator
    browser: Browser
    images: Path

    def take(
        self,
        name: str,
        path: str,
        *,
        dark: bool = False,
        in_frame: bool = True,
        height: int = 860,
        ready: Callable[[FrameLocator], object] = lambda _frame: None,
        shows: str = "",
        click: str = "",
    ) -> None:
        """Write `<name>.png` of one of Airflow's pages, as soon as the page shows a text.

        `click` is the label of a button of Airflow's to press before.
        """
        page = new_page(self.browser, self.stack.url, dark=dark, height=height)
        page.goto(path)
        if in_frame:
            frame = page.frame_locator("iframe")
            frame.locator("main h1").first.wait_for()
            ready(frame)
        if shows:
            page.get_by_text(shows).first.wait_for()
        if click:
            page.get_by_label(click).first.click()
        page.wait_for_timeout(STILL)
        file = self.images / f"{name}.png"
        page.screenshot(path=file)
        page.context.close()
        size = file.stat().st_size
        print(f"{file.relative_to(PROJECT)}: {size / 1000:.0f} KB")
        if size > MOST_BYTES:
            raise LLMBatchError(f"{file} has {size} bytes; at most {MOST_BYTES} belong into docs/.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Take all pictures."""
    parser = argparse.ArgumentParser(
        prog="python -m include.local_stack.screenshots", description=__doc__
    )
    parser.add_argument("--images", type=Path, default=IMAGES, help="where they go")
    options = parser.parse_args(arguments)
    options.images.mkdir(parents=True, exist_ok=True)
    # A stack that is told to end must not leave its components behind.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with studio(options.images.resolve()) as found:
            take_all(found)
    except LLMBatchError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


@contextmanager
def studio(images: Path) -> Iterator[Studio]:
    """Yield a stack in which the days of `DONE` are done, some rows of them failed."""
    with (
        tempfile.TemporaryDirectory(prefix="llm-batch-pictures-") as folder,
        Simulator.start(Path(folder) / "simulator", seconds_in_progress=4) as simulator,
        browser() as running,
    ):
        simulator.add_faults(*DEMO, FAILING)
        home = Path(folder) / "home"
        env = {
            OPENAI: simulator_connection(simulator.base_url),
            JOBS: str(_jobs(Path(folder) / "jobs")),
            "AIRFLOW__LLM_BATCH__FIRST_POLL": "3",
            "AIRFLOW__SCHEDULER__USE_JOB_SCHEDULE": "False",  # only the days that are asked for
            "AIRFLOW__LLM_BATCH__POLL_INTERVAL": "2",
        }
        dags = Path(folder) / "dags"
        dags.mkdir()
        for job in (JOB, CAREFUL):
            text = (PROJECT / "dags" / f"{JOB}.py").read_text("utf-8")
            (dags / f"{job}.py").write_text(text.replace(JOB, job), "utf-8")
        with Stack(home, env=env, dags=dags) as stack:
            load_sample_tickets(sa.create_engine(f"sqlite:///{home}/data/source.db"))
            stack.wait_for_dag(JOB)
            dates = start_backfill(stack.client, DONE, {})
            wait_for_runs(
                stack.client,
                JOB,
                dates,
                seconds=PATIENCE,
                watch=lambda _runs: stack.keep_running(),
            )
            yield Studio(stack, simulator, running, images)


def _jobs(folder: Path) -> Path:
    """Copy the job folders, with small shards, and make one that asks before it spends."""
    shutil.copytree(JOBS_ROOT, folder)
    shutil.copytree(JOBS_ROOT / JOB, folder / CAREFUL)
    _change(folder / JOB / "job.yaml", CHANGES)
    target = {"conn_id": "results_db", "table": "careful_labels"}
    budget = {"max_usd": 0.06, "approve_above_usd": 0.01}
    _change(folder / CAREFUL / "job.yaml", {"target": target, "budget": budget})
    return folder


def _change(path: Path, keys: dict[str, object]) -> None:
    job = yaml.safe_load(path.read_text("utf-8"))
    path.write_text(yaml.safe_dump(job | keys), "utf-8")


def take_all(found: Studio) -> None:
    """Take every picture of `docs/ui.md`."""
    done = _run_page(found.stack.client.runs(JOB, *DONE.bounds)[1].run_id)
    live = _live_run(found)
    found.take("run-in-progress", _run_page(live), ready=_half_done)
    found.take("run-in-progress-dark", _run_page(live), dark=True)
    found.take("run-done", done)
    found.take("run-done-dark", done, dark=True)
    found.take("dag", f"/dags/{JOB}/plugin/llm-batches-dag")
    found.take("jobs", "/plugin/llm-batches", height=1000)
    found.take("jobs-dark", "/plugin/llm-batches", dark=True, height=1000)
    found.take("grid", f"/dags/{JOB}", in_frame=False, click="Expand all task groups")
    found.take("required-actions", _question(found), in_frame=False, shows="Approve")


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _run_page(run_id: str) -> str:
    return f"{run_page(JOB, run_id)}/plugin/llm-batches-run"


def _live_run(found: Studio) -> str:
    """Begin a run whose batches take a while, and return it when the API has them."""
    found.simulator.add_faults({"fault": "stuck", "seconds": SLOW})
    return _waiting_run(found, JOB, "round_1.shard.wait[0]")


def _question(found: Studio) -> str:
    """Begin a run that a person has to approve, and return the page that asks."""
    found.stack.wait_for_dag(CAREFUL)
    found.stack.client.set_paused(CAREFUL, paused=False)
    run_id = _waiting_run(found, CAREFUL, "approval.approve")
    return f"{run_page(CAREFUL, run_id)}/tasks/approval.approve/required_actions"


def _waiting_run(found: Studio, job: str, task: str) -> str:
    """Begin a run of the day `LIVE` and return it when `task` waits, for the API or a person."""
    start = datetime.combine(LIVE, time(), UTC)
    run_id = found.stack.client.trigger(
        job, logical_date=start + timedelta(days=1), interval=(start, start + timedelta(days=1))
    )

    def is_waiting() -> bool:
        return found.stack.client.task_states(job, run_id).get(task) in WAITING

    wait_until(f"{task} of {run_id} to wait", PATIENCE, is_waiting)
    return run_id


def _half_done(frame: FrameLocator) -> None:
    """Wait until the page itself shows that a third of the rows is done."""
    done, total = (frame.locator(f"#rows-{name}") for name in ("done", "total"))
    wait_until(
        "progress on the page",
        SLOW * 2,
        lambda: 3 * int(done.inner_text()) > int(total.inner_text()),
    )


if __name__ == "__main__":
    sys.exit(main())

"""The param `spend_limit` bounds runs through Airflow, whoever starts them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from include.simulator.process import Simulator
from tests.airflow.workshop import Job

ROWS = [(f"n{number}", f"note {number}") for number in range(8)]


@pytest.fixture
def job(airflow_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    """A small job of this test."""
    monkeypatch.setenv("AIRFLOW__LLM_BATCH__JOBS", str(tmp_path / "jobs"))
    made = Job("limited", tmp_path / "jobs", airflow_home / "dags", airflow_home)
    made.write()
    made.fill(ROWS)
    yield made
    made.dag_file.unlink()


def limit(dollars: float) -> dict[str, Any]:
    """The params of a backfill with a budget."""
    return {"spend_limit": {"name": "all days", "max_usd": dollars}}


def test_a_run_over_the_limit_sends_nothing_until_it_is_raised(
    job: Job, service: Simulator
) -> None:
    """The first try fails in `build`, before any call; with more money the same run goes on."""
    before = service.bill()["requests"]

    states = job.run(limit(0.000001))

    assert (states["extract"], states["round_1.build"]) == ("success", "failed")
    assert service.bill()["requests"] == before
    assert job.run(limit(1.0))["report"] == "success"
    assert service.bill()["requests"] == before + len(ROWS)


def test_a_limit_of_another_form_is_refused(job: Job, service: Simulator) -> None:
    """A limit that cannot be read stops the run: it must not run without one."""
    before = service.bill()["requests"]

    states = job.run({"spend_limit": {"max_usd": 1}})

    assert states["extract"] == "failed"
    assert service.bill()["requests"] == before

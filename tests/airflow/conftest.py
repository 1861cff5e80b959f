"""An Airflow home of its own for these tests, set up before Airflow is first imported."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from include.job_spec import JOBS_ROOT
from include.local_stack.rest import wait_until
from include.simulator.process import Simulator
from include.simulator.records import FINAL
from tests.airflow.workshop import Job, MakeJob, Rows, wait_for_listener

PROJECT = Path(__file__).resolve().parents[2]
HOME = Path(tempfile.mkdtemp(prefix="llm-batch-airflow-"))
DAGS = HOME / "dags"  # dag.test() wants its DAG inside the DAG folder


def _documented_dag() -> str:
    """The DAG that docs/operators.md shows."""
    return (PROJECT / "docs" / "operators.md").read_text().split("```python\n")[1].split("```")[0]


shutil.copytree(PROJECT / "dags", DAGS)
(DAGS / "own_request_file.py").write_text(_documented_dag())
(DAGS / "without_triggerer.py").write_text(
    _documented_dag()
    .replace("own_request_file", "without_triggerer")
    .replace(
        "batch=submit.output",
        "batch=submit.output, deferrable=False, mode='reschedule', poke_interval=0.2",
    )
)

os.environ.update(
    {
        "AIRFLOW_HOME": str(HOME),
        "AIRFLOW__CORE__DAGS_FOLDER": str(DAGS),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(PROJECT / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__UNIT_TEST_MODE": "False",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{HOME}/airflow.db",
        "AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(HOME / "logs"),
        "AIRFLOW__LLM_BATCH__ARTIFACTS": (HOME / "artifacts").as_uri(),
        "AIRFLOW__LLM_BATCH__FIRST_POLL": "0.1",
        "AIRFLOW__LLM_BATCH__POLL_INTERVAL": "0.2",
        "AIRFLOW__LLM_BATCH__SUBMIT_GRACE": "0.1",
        "AIRFLOW__LLM_BATCH__SUBMIT_LEASE": "1",
        **{
            f"AIRFLOW_CONN_{name.upper()}": json.dumps(
                {"conn_type": "sqlite", "host": str(HOME / f"{name}.db")}
            )
            for name in ("source_db", "results_db", "llm_batch_db")
        },
    }
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.airflow)


@pytest.fixture(scope="session")
def airflow_home() -> Path:
    """An Airflow home with an empty metadata database."""
    from airflow.utils.db import initdb

    initdb()
    return HOME


@pytest.fixture(autouse=True)
def _nothing_goes_on(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """End what a test's runs have begun while its connections are still those of the test.

    That is before `monkeypatch` takes them back: a fixture goes before those that it asks for.
    """
    yield
    if "llm_batch.listener" in sys.modules:
        wait_for_listener()


@pytest.fixture(scope="session")
def openai_simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    """A simulator behind the connection `openai_default`."""
    with Simulator.start(tmp_path_factory.mktemp("simulator"), instant=True) as simulator:
        os.environ["AIRFLOW_CONN_OPENAI_DEFAULT"] = json.dumps(
            {"conn_type": "openai", "host": simulator.base_url, "password": "sk-canary-9d2e"}
        )
        yield simulator


@pytest.fixture
def service(openai_simulator: Simulator) -> Iterator[Simulator]:
    """The simulator without faults, left without faults."""
    end_all(openai_simulator)
    yield openai_simulator
    end_all(openai_simulator)


def end_all(simulator: Simulator) -> None:
    """Let every batch come to its end: it would be billed in the middle of the next test."""
    simulator.clear_faults()
    simulator.release()

    def is_quiet() -> bool:
        return all(one["status"] in FINAL for one in simulator.batches()["batches"])

    wait_until("the end of every batch", 120.0, is_quiet, interval=0.05)


@pytest.fixture
def own_job(
    airflow_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MakeJob]:
    """Make a job of the test's own with these rows, and `changes` to its files.

    Its DAG file goes afterwards.
    """
    jobs = tmp_path / "jobs"
    shutil.copytree(JOBS_ROOT, jobs)
    monkeypatch.setenv("AIRFLOW__LLM_BATCH__JOBS", str(jobs))
    made: list[Job] = []

    def make(rows: Rows, name: str, *, dags: Path = DAGS, **changes: tuple[str, str]) -> Job:
        job = Job(name, jobs, dags, airflow_home)
        made.append(job)
        job.write(**changes)
        job.fill(rows)
        return job

    yield make
    for job in made:
        job.dag_file.unlink()

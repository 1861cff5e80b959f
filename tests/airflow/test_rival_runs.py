"""Two Airflow runs over one interval that ask the same, but are two runs of ours."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
import sqlalchemy as sa

from include import participants, pipeline, run_mode
from include.job_spec import load_job, with_overrides
from include.ledger_records import Partition
from include.local_stack.rest import wait_until
from include.simulator.process import Simulator
from tests.airflow.workshop import DAY, Job, MakeJob

ROWS = [(f"n{number:04d}", f"note number {number}") for number in range(6)]
PATIENCE = 180.0  # seconds


def test_a_run_is_deferred_while_another_asks_the_same(
    own_job: MakeJob,
    service: Simulator,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """`build` gives its worker back, and goes on when the other run has ended."""
    monkeypatch.setenv("AIRFLOW__LLM_BATCH__BUSY_PAUSE", "1")
    job = own_job(ROWS, "rival_notes")
    rival = built_by_another(job)

    with ended_when_waited_for(job) as waited:
        states = job.run()

    assert waited == [True]
    assert f"waits for run {rival}" in "".join(capfd.readouterr())
    assert states["round_1.build"] == "success"
    assert job.loaded() == {key for key, _ in ROWS}
    bill = [one for one in service.bill()["by_batch"] if one["metadata"].get("job") == job.name]
    assert sum(one["requests"] for one in bill) == len(ROWS)


def built_by_another(job: Job) -> str:
    """A run of a sample, whose files are written, that another Airflow run works on; its id."""
    from llm_batch import connections

    ledger, artifacts = connections.ledger(), connections.artifacts()
    spec = with_overrides(load_job(job.name, job.jobs), sample=0.9)
    partition = Partition(job.name, DAY, DAY + timedelta(days=1))
    run = pipeline.open_run(
        ledger, spec, partition, mode=run_mode.NORMAL, dag_id=job.name, dag_run_id="another"
    )
    run = pipeline.extract(run, ledger, artifacts, lambda: connections.source(spec))
    assert pipeline.build(
        run,
        1,
        ledger,
        artifacts,
        lambda: connections.target(spec),
        most_shards=9,
        jobs_root=job.jobs,
    )
    return run.run_id


@contextmanager
def ended_when_waited_for(job: Job) -> Iterator[list[bool]]:
    """The other Airflow run leaves as soon as `build` is deferred, and whatever happens."""
    from llm_batch import connections

    waited: list[bool] = []

    def leave() -> None:
        try:
            waited.append(wait_until("a deferred build", PATIENCE, lambda: is_deferred(job)))
        finally:
            participants.leave(connections.ledger(), job.name, "another")

    other = threading.Thread(target=leave)
    other.start()
    try:
        yield waited
    finally:
        other.join()


def is_deferred(job: Job) -> bool:
    """Whether `build` has been deferred: a queued task that never ran names no next method."""
    from airflow.models.taskinstance import TaskInstance
    from airflow.utils.session import create_session

    query = sa.select(TaskInstance.id).where(
        TaskInstance.dag_id == job.name,
        TaskInstance.task_id == "round_1.build",
        TaskInstance.next_method == "execute_complete",
    )
    with create_session() as session:
        return session.scalar(query) is not None

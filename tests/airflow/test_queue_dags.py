"""The queue through Airflow's own task runner: a drain, and the runs that it starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from include.ledger import Ledger
from include.ledger_tables import queue as table
from include.request_queue import RequestQueue
from include.simulator.process import Simulator

if TYPE_CHECKING:
    from airflow.dag_processing.dagbag import DagBag

NOW = datetime.now(UTC)
MINUTES = count(1)
ROW = {"subject": "Late", "body": "text", "channel": "mail", "customer_tier": "pro"}


@pytest.fixture(scope="module")
def bag(airflow_home: Path) -> DagBag:
    """The DAGs, known to Airflow's database as the ones that runs are started of."""
    from airflow.dag_processing.bundles.manager import DagBundlesManager
    from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db

    bag = DagBag(os.environ["AIRFLOW__CORE__DAGS_FOLDER"])
    assert bag.import_errors == {}
    DagBundlesManager().sync_bundles_to_db()
    sync_bag_to_db(bag, "dags-folder", None)
    return bag


@pytest.fixture
def queue(airflow_home: Path) -> Iterator[RequestQueue]:
    """An empty queue."""
    ledger = Ledger(sa.create_engine(f"sqlite:///{airflow_home}/llm_batch_db.db"))
    with ledger.engine.begin() as connection:
        connection.execute(sa.delete(table))
    yield RequestQueue(ledger.engine)
    ledger.engine.dispose()


def drain(bag: DagBag, **params: Any) -> dict[tuple[str, int], str | None]:
    """Run the drain once; the state of each task instance."""
    moment = NOW + timedelta(minutes=next(MINUTES))
    conf = {"everything": False} | params  # in one process, a param would keep its last value
    run = bag.dags["request_queue_drain"].test(logical_date=moment, run_conf=conf)
    return {(one.task_id, one.map_index): one.state for one in run.get_task_instances()}


def started(bag: DagBag) -> list[Any]:
    """The runs of the queue that Airflow knows and that have not been run."""
    from airflow.models.dagrun import DagRun
    from airflow.utils.session import create_session

    with create_session() as session:
        runs = session.scalars(
            sa.select(DagRun)
            .where(DagRun.dag_id == "request_queue", DagRun.state == "queued")
            .order_by(DagRun.id)
        )
        return [(one.run_id, one.conf) for one in runs]


def test_a_drain_starts_a_run_for_each_group(
    bag: DagBag, queue: RequestQueue, service: Simulator
) -> None:
    """Two groups, two Airflow runs; each goes through the usual graph to the answers."""
    queue.put("a", endpoint="/v1/responses", body={"model": "gpt-5-mini", "input": "hello"})
    queue.put("b", job="ticket_triage", row=ROW)

    states = drain(bag, everything=True)

    runs = started(bag)
    assert [states["start", number] for number in (0, 1)] == ["success", "success"]
    assert len(runs) == 2
    assert queue.statistics().processing == 2
    for number, (_, conf) in enumerate(runs):
        moment = NOW - timedelta(minutes=1 + number)
        done = bag.dags["request_queue"].test(logical_date=moment, run_conf=conf)
        assert done.state == "success"
    assert queue.result("a").answer == "hello"
    assert queue.result("b").json()["category"]


def test_a_drain_skips_when_it_is_not_time(bag: DagBag, queue: RequestQueue) -> None:
    """Nothing waits, or too little for too short: the drain is pink, and starts nothing."""
    before = len(started(bag))
    nothing = drain(bag, everything=True)
    queue.put("a", endpoint="/v1/responses", body={"model": "gpt-5-mini", "input": "hello"})
    too_early = drain(bag)

    assert nothing["drain", -1] == too_early["drain", -1] == "skipped"
    assert len(started(bag)) == before
    assert queue.state("a") == "queued"


def test_a_run_is_started_once(bag: DagBag, queue: RequestQueue) -> None:
    """A drain that finds a run of an earlier one does not start it twice."""
    queue.put("a", endpoint="/v1/responses", body={"model": "gpt-5-mini", "input": "hello"})
    drain(bag, everything=True)
    runs = started(bag)

    states = drain(bag, everything=True)

    assert states["drain", -1] == "success"
    assert states["start", 0] == "skipped"
    assert started(bag) == runs


def test_a_run_without_requests_says_what_to_do(bag: DagBag, service: Simulator) -> None:
    """Whoever triggers the wrong DAG by hand is told which one is right."""
    run = bag.dags["request_queue"].test(logical_date=NOW - timedelta(days=1), run_conf={})

    assert run.get_task_instance("extract").state == "failed"

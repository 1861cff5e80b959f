"""Requests of the queue go through the same runs as rows, and end in their own rows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from include import erasure, pipeline
from include import ledger_tables as tables
from include.actions import plan_redrive
from include.audit import audit
from include.errors import BudgetExceededError, ConfigurationError, RequestRefusedError
from include.housekeeping import Housekeeping
from include.job_spec import JOBS_ROOT
from include.ledger_records import Run, RunState
from include.queue_drain import join
from include.queue_request import QueueRequest
from include.report import run_report
from include.simulator.process import Simulator
from tests.faults.queue_world import NAME, QueueWorld, queue_spec, request
from tests.faults.world import TEXT

URL = "/v1/responses"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    state = tmp_path_factory.mktemp("simulator")
    with Simulator.start(state, instant=True) as simulator:
        yield simulator


@pytest.fixture
def world(service: Simulator, tmp_path: Path) -> Iterator[QueueWorld]:
    """An empty queue."""
    service.clear_faults()
    world = QueueWorld(tmp_path, service, url=f"sqlite:///{tmp_path}/ledger.db")
    world.ledger()
    yield world
    world.close()
    service.clear_faults()


def ask(request_id: str, text: str = "text", **more: Any) -> QueueRequest:
    return QueueRequest(request_id, URL, {"model": "gpt-5-mini", "input": text}, **more)


def billed(world: QueueWorld, request_id: str) -> tuple[int, Decimal]:
    """How often the simulator billed a request, and for how much in all."""
    custom_id = world.rows()[request_id]["custom_id"]
    lines = [one for one in world.simulator.bill_lines() if one["custom_id"] == custom_id]
    dollars = sum((Decimal(one["cost_usd"]) for one in lines), Decimal(0))
    return sum(one["billed"] for one in lines), dollars


def update(world: QueueWorld, request_id: str, **values: Any) -> None:
    with world.ledger().engine.begin() as connection:
        connection.execute(
            sa.update(tables.queue).where(tables.queue.c.request_id == request_id).values(**values)
        )


def test_an_answer_is_found_by_request_id(world: QueueWorld) -> None:
    """Each of the three forms has its own answer, with usage and cost."""
    world.application().put_many(map(request, range(3)))

    world.drain_and_process()

    chat, response, job = (world.application().result(f"r{n}") for n in range(3))
    assert (chat.answer, response.answer) == (f"{TEXT} 0", f"{TEXT} 1")
    assert set(job.json()) >= {"category", "urgency", "sentiment", "summary", "needs_human"}
    assert (job.model, job.rounds, job.reason) == ("gpt-5-mini", 1, None)
    for one in (chat, response, job):
        assert billed(world, one.request_id) == (1, one.cost_usd)
        assert one.input_tokens
        assert one.output_tokens


def test_the_types_of_a_schema_are_kept(world: QueueWorld) -> None:
    """Numbers and booleans of an answer are those, not texts."""
    world.application().put_many([request(2)])

    world.drain_and_process()

    found = world.application().result("r2").json()
    assert isinstance(found["sentiment"], float)
    assert isinstance(found["needs_human"], bool)


def test_several_tries_cost_what_they_cost_together(world: QueueWorld) -> None:
    """An answer that was cut off is billed as well; the request has the sum, to the last digit."""
    world.simulator.add_faults({"fault": "cut_off", "fraction": 1, "first_times": 1})
    body = {"model": "gpt-5-mini", "input": "one two three", "max_output_tokens": 4_000}
    world.application().put("a", endpoint=URL, body=body)

    (run,) = world.drain_and_process()

    found = world.application().result("a")
    assert (found.state, found.rounds) == ("completed", 2)
    assert billed(world, "a") == (2, found.cost_usd)
    assert run.cost_usd == found.cost_usd


def test_a_failure_has_its_reason(world: QueueWorld) -> None:
    """Refused by the API for good: failed at once, with code and message; the others go on."""
    world.application().put_many(ask(f"r{n}") for n in range(12))
    world.simulator.add_faults({"fault": "line_error", "status": 400, "fraction": 0.3})

    (run,) = world.drain_and_process()

    failed = [name for name, one in world.rows().items() if one["state"] == "failed"]
    assert 0 < len(failed) < 12
    assert (run.loaded, run.failed) == (12 - len(failed), len(failed))
    for found in map(world.application().result, failed):
        assert (found.reason, found.answer, found.rounds) == ("invalid_request", None, 1)
        assert found.error_message


def test_what_is_left_over_has_failed(world: QueueWorld) -> None:
    """A request that fails in every round ends with its last reason and all rounds."""
    world.application().put_many([ask("a")])
    world.simulator.add_faults({"fault": "line_error", "status": 500, "fraction": 1})

    world.drain_and_process()

    found = world.application().result("a")
    assert (found.state, found.reason, found.rounds) == ("failed", "server_error", 3)


def test_the_important_goes_first(world: QueueWorld) -> None:
    """Into earlier shards by priority, then by the time it was put."""
    queue = world.application()
    queue.put_many([ask("late", priority=0), ask("early", priority=0), ask("high", priority=5)])
    queue.put_many([ask("low", priority=-1)])
    update(world, "early", queued_at=world.rows()["late"]["queued_at"].replace(year=2025))
    world.queue = queue_spec(limits={"requests_per_batch": 1})

    (run,) = world.drain_and_process()

    batches = world.ledger().batches(run.run_id, 1)
    rows = world.rows()
    by_batch = {one["batch_id"]: name for name, one in rows.items()}
    assert [by_batch[one.batch_id] for one in batches] == ["high", "early", "late", "low"]


def test_the_snapshot_is_what_was_claimed(world: QueueWorld) -> None:
    """A process that dies between claim and snapshot loses nothing, and adds nothing later."""
    world.application().put_many([ask("a"), ask("b")])
    (claimed,) = world.drain()
    world.application().put_many([ask("c")])

    again = world.drain()
    runs = {one.run_id: world.process(one) for one in again}

    assert runs[claimed.run_id].rows == 2
    assert len(runs) == 2
    assert world.application().statistics().completed == 3


def test_a_second_load_changes_nothing(world: QueueWorld) -> None:
    """Clearing the load of a done run leaves every row as it was."""
    world.application().put_many(map(request, range(6)))
    runs = world.drain_and_process()
    before = world.rows()

    for run in runs:
        pipeline.load(run, world.ledger(), world.artifacts(), world.target)

    assert world.rows() == before


def test_a_load_after_a_deletion_brings_nothing_back(world: QueueWorld) -> None:
    """A request that its application has deleted stays deleted."""
    world.application().put_many([ask("a"), ask("b")])
    (run,) = world.drain_and_process()
    with world.ledger().engine.begin() as connection:
        connection.execute(sa.delete(tables.queue).where(tables.queue.c.request_id == "a"))

    pipeline.load(run, world.ledger(), world.artifacts(), world.target)

    assert set(world.rows()) == {"b"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"model": "gpt-4o", "input": "text"}', "model was changed after the request was put"),
        ("canary", "body is not valid JSON"),
        ('{"model": "gpt-5-mini", "input": "\\ud800"}', "body is not valid JSON"),
        ('{"model": "gpt-5-mini", "stream": true}', "body sets stream"),
    ],
)
def test_a_body_that_was_spoilt_after_sorting_fails_alone(
    world: QueueWorld, body: str, message: str
) -> None:
    """Somebody wrote into the table by SQL: only that request fails, and nothing was sent."""
    world.application().put_many([ask("a"), ask("b")])
    (run,) = world.drain()
    update(world, "a", body=body)

    run = world.process(run)

    found = world.application().result("a")
    assert (found.state, found.reason, found.rounds) == ("failed", "bad_request", 0)
    assert message in str(found.error_message)
    assert found.cost_usd is None
    assert world.application().state("b") == "completed"
    assert (run.loaded, run.failed, run.rejected) == (1, 1, 1)


def test_a_row_that_was_spoilt_after_sorting_fails_alone(world: QueueWorld) -> None:
    """The same for rows of a job."""
    world.application().put_many([request(2), request(5)])
    (run,) = world.drain()
    update(world, "r2", job_row='{"subject": "canary"}')

    world.process(run)

    found = world.application().result("r2")
    assert (found.state, found.reason) == ("failed", "bad_request")
    assert "row lacks" in str(found.error_message)
    assert world.application().state("r5") == "completed"


def test_a_body_over_several_lines_is_one_line_of_the_file(world: QueueWorld) -> None:
    """SQL may hold JSON as people write it; a request file has a request per line."""
    with world.ledger().engine.begin() as connection:
        connection.execute(
            sa.insert(tables.queue),
            [
                {
                    "request_id": "a",
                    "endpoint": URL,
                    "body": '{\r\n "model": "gpt-5-mini",\n "input": "one\\ntwo\u2028three"\n}\n',
                }
            ],
        )

    world.drain_and_process()

    assert world.application().state("a") == "completed"


def test_a_job_with_a_request_py_takes_rows(world: QueueWorld, tmp_path: Path) -> None:
    """It is called with the application's row; a row for which it raises fails alone."""
    jobs = tmp_path / "jobs"
    shutil.copytree(JOBS_ROOT, jobs)
    folder = jobs / "commit_labels"
    (folder / "prompt.md").unlink()
    (folder / "request.py").write_text(
        "def build(row: dict) -> dict:\n    return {'input': row['text'] * 2}\n"
    )
    job = folder / "job.yaml"
    lines = job.read_text().splitlines()
    job.write_text("\n".join(one for one in lines if "prompt:" not in one))
    world.jobs = jobs
    queue = world.application()
    queue.put("a", job="commit_labels", row={"text": "twice "})
    queue.put("b", job="commit_labels", row={"else": "canary"})
    (run,) = world.drain()

    world.process(run)

    assert queue.state("a") == "completed"
    found = queue.result("b")
    assert (found.state, found.reason) == ("failed", "bad_request")
    assert found.error_message == "request.py raised KeyError"


def test_numbers_of_a_row_fill_the_prompt(world: QueueWorld) -> None:
    """Values that are no texts stand in the prompt as they stand in the one of a table's row."""
    row = {"subject": 12, "body": {"a": [1, True]}, "channel": 1.5, "customer_tier": False}
    world.application().put("a", job="ticket_triage", row=row)

    (run,) = world.drain_and_process()

    (batch,) = world.ledger().batches(run.run_id)
    line = (world.folder / "artifacts" / batch.request_file).read_text()
    assert '{\\"a\\":[1,true]}' in line
    assert world.application().state("a") == "completed"


@pytest.mark.parametrize(
    ("endpoint", "body", "path"),
    [
        (
            "/v1/embeddings",
            {"model": "text-embedding-3-small", "input": ["one", "two"]},
            ("data", 1, "embedding", 0),
        ),
        (
            "/v1/moderations",
            {"model": "omni-moderation-latest", "input": "text"},
            ("results", 0, "flagged"),
        ),
    ],
)
def test_what_is_no_text_comes_back_whole(
    world: QueueWorld, endpoint: str, body: dict[str, Any], path: tuple[Any, ...]
) -> None:
    """A body of another endpoint has the API's own answer, as JSON text."""
    world.application().put("a", endpoint=endpoint, body=body)

    world.drain_and_process()

    found = world.application().result("a").json()
    for step in path:
        found = found[step]
    assert isinstance(found, float | bool)


def test_a_model_of_another_endpoint_is_refused(world: QueueWorld) -> None:
    """What cannot be asked is said when it is put."""
    with pytest.raises(RequestRefusedError, match=r"text-embedding-3-small is for /v1/embeddings"):
        world.application().put("a", endpoint=URL, body={"model": "text-embedding-3-small"})


def test_a_vector_of_a_job_is_a_list_of_numbers(world: QueueWorld, tmp_path: Path) -> None:
    """In the fewest digits that give the same 32-bit float."""
    world.jobs = tmp_path / "jobs"
    folder = world.jobs / "vectors"
    folder.mkdir(parents=True)
    (folder / "job.yaml").write_text(
        "source: {conn_id: a, sql: rows.sql, key: [id]}\n"
        "request: {endpoint: /v1/embeddings, model: text-embedding-3-small, prompt: prompt.md, "
        "params: {dimensions: 16}}\n"
        "target: {conn_id: a, table: b}\n"
    )
    (folder / "rows.sql").write_text("SELECT 1 AS id, 'x' AS text")
    (folder / "prompt.md").write_text("{{ text }}")
    world.application().put("a", job="vectors", row={"text": "hello"})

    world.drain_and_process()

    answer = world.application().result("a")
    assert len(answer.json()) == 16
    assert len(str(answer.answer)) < 16 * 16


def test_a_budget_stops_a_run_before_anything_is_sent(world: QueueWorld) -> None:
    """The requests stay with their run, which goes on when the budget allows."""
    world.queue = queue_spec(budget={"max_usd": "0.000001"})
    world.application().put_many([ask("a")])
    (run,) = world.drain()

    with pytest.raises(BudgetExceededError):
        world.process(run)

    assert world.application().state("a") == "processing"
    assert world.ledger().run(run.run_id).state == RunState.OPEN
    assert world.ledger().batches(run.run_id) == []
    richer = queue_spec(budget={"max_usd": 1})
    again = join(world.ledger(), richer, run.run_id, dag_id="request_queue", dag_run_id="again")
    world.process(again)
    assert again.run_id == run.run_id
    assert world.application().state("a") == "completed"


def test_a_done_run_is_not_begun_again(world: QueueWorld) -> None:
    """Clearing its Airflow run finds it done."""
    world.application().put_many([ask("a")])
    (run,) = world.drain_and_process()

    again = join(world.ledger(), world.queue, run.run_id, dag_id="q", dag_run_id="again")

    assert again == run
    assert len(world.ledger().runs("request_queue")) == 1


def test_the_report_has_the_figures_of_the_run(world: QueueWorld) -> None:
    """A run over requests is told as any run."""
    world.application().put_many(map(request, range(0, 30, 3)))
    (run,) = world.drain_and_process()

    report = run_report(run, world.ledger())

    assert (report.rows, report.loaded, report.failed) == (10, 10, 0)
    assert report.model == "gpt-4o-mini"


def findings(world: QueueWorld, run: Run) -> list[str]:
    skew = timedelta(seconds=world.policy.skew)
    found = audit(
        run.run_id, world.ledger(), world.artifacts(), world.target(), world.api(), skew=skew
    )
    return [one.invariant for one in found]


def test_a_run_passes_the_audit(world: QueueWorld) -> None:
    """Row by row against the queue; a request whose end is undone is found, a deleted one is not.

    Retention deletes what has ended, and that is no loss.
    """
    world.application().put_many([ask("a"), ask("b"), ask("c")])
    (run,) = world.drain_and_process()
    assert findings(world, run) == []

    with world.ledger().engine.begin() as connection:
        connection.execute(sa.delete(tables.queue).where(tables.queue.c.request_id == "a"))
    assert findings(world, run) == []

    update(world, "b", state="processing")
    assert findings(world, run) == ["I1"]


def test_requests_are_not_redriven(world: QueueWorld) -> None:
    """A redrive would send what its application has been told has failed for good."""
    world.application().put_many([ask("a")])
    (run,) = world.drain_and_process()

    with pytest.raises(ConfigurationError, match="put them again, under new ids"):
        plan_redrive(world.ledger(), run.run_id)


def test_the_snapshot_has_ids_and_bodies_only(world: QueueWorld) -> None:
    """Nothing of an earlier answer or of other requests gets into the artifacts."""
    world.application().put_many([ask("a")])
    (run,) = world.drain_and_process()

    path = world.folder / "artifacts" / pipeline.snapshot_of(run).path

    assert pq.read_table(path).column_names == ["request_id", "body"]


def test_a_request_is_erased_like_a_row(world: QueueWorld) -> None:
    """Its line in the queue goes with the artifacts; one that waits is left to its application."""
    world.application().put_many([ask("a"), ask("b")])
    world.drain_and_process()
    world.application().put_many([ask("later")])
    keeping = Housekeeping(world.ledger(), world.artifacts(), lambda _id: world.api(), apply=True)

    for one, lines in (("a", 1), ("later", 0)):
        found = erasure.traces(NAME, [one], world.ledger(), world.artifacts())
        done = erasure.erase(
            found, keeping, lambda _spec: world.ledger().engine, job=NAME, key=[one]
        )
        assert (done.rows, done.left) == (lines, ())

    assert set(world.rows()) == {"b", "later"}

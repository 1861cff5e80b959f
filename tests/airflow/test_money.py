"""Money through Airflow's own task runner; the simulator's bill is the judge."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa

from include.calendar_month import Month
from include.costs import CostLine, costs_by_day, total
from include.ledger import Ledger
from include.ledger_records import now
from include.simulator.process import Simulator
from tests.airflow.workshop import Job, MakeJob

ONE_ROUND = "retry: {rounds: 1}"
CANARY = f"{ONE_ROUND}\ncanary: {{requests: 50, max_failure_rate: 0.1, max_cost_per_row: 0.01}}"
SCHEMA = """\
{"type": "object", "properties": {"kind": {"type": "string"}}, "required": ["kind"],
 "additionalProperties": false}
"""


@pytest.fixture
def make_job(own_job: MakeJob) -> MakeJob:
    """Make a job of the test's own with so many `rows`."""
    return lambda name, rows, **changes: own_job(notes(rows), name, **changes)


def notes(rows: int) -> list[tuple[str, str | None]]:
    return [(f"n{number:04d}", f"note number {number}") for number in range(rows)]


def bill_of(service: Simulator, job: Job) -> list[dict[str, Any]]:
    """The bill of each batch of the job."""
    return [one for one in service.bill()["by_batch"] if one["metadata"].get("job") == job.name]


def billed(service: Simulator, job: Job) -> Decimal:
    """What the API asks for."""
    return sum((Decimal(one["cost_usd"]) for one in bill_of(service, job)), Decimal(0))


def sent(service: Simulator, job: Job) -> Counter[str]:
    """How often each `custom_id` was paid for."""
    return Counter(
        line["custom_id"]
        for line in service.bill_lines()
        if line["metadata"].get("job") == job.name and line["billed"]
    )


def counted(home: Path, job: Job) -> CostLine:
    """What the ledger says that the job has cost."""
    ledger = Ledger(sa.create_engine(f"sqlite:///{home}/llm_batch_db.db"))
    months = {Month.of(now()), Month.of(now() - timedelta(days=1))}  # one may end in this test
    return total([line for one in months for line in costs_by_day(ledger, job.name, str(one))])


def with_schema(job: Job) -> None:
    (job.folder / "output.schema.json").write_text(SCHEMA)
    yaml = job.folder / "job.yaml"
    prompt = "  prompt: prompt.md\n"
    yaml.write_text(
        yaml.read_text().replace(prompt, prompt + "  output_schema: output.schema.json\n")
    )


def test_a_canary_with_a_broken_schema_stops_the_run(
    make_job: MakeJob, service: Simulator, capfd: pytest.CaptureFixture[str]
) -> None:
    """50 requests are paid for, not 130; a mended prompt is a fresh run that pays for each once."""
    job = make_job("canary_broken", 130, job_yaml=(ONE_ROUND, CANARY))
    with_schema(job)
    service.add_faults({"fault": "schema_invalid"})

    states = job.run()

    assert states["canary.judge"] == "failed"
    assert states["round_1.build"] == "upstream_failed"
    assert [one["requests"] for one in bill_of(service, job)] == [50]
    said = capfd.readouterr().out
    assert "the canary says no: 50 of 50 answers failed (100.0%: invalid_answer 50)" in said

    assert job.run()["canary.judge"] == "failed"  # nothing has changed: the same verdict, no spend
    assert sum(sent(service, job).values()) == 50

    service.clear_faults()
    (job.folder / "prompt.md").write_text("Name the kind of the note.\n\n{{ body }}\n")
    states = job.run()

    assert states["canary.judge"] == states["load"] == "success"
    assert len(job.loaded()) == 130
    assert set(sent(service, job).values()) == {1}
    assert [one["requests"] for one in bill_of(service, job)] == [50, 50, 80]


def test_a_canary_that_costs_too_much_stops_the_run_until_more_is_allowed(
    make_job: MakeJob, service: Simulator
) -> None:
    """The bound is raised in job.yaml: the same canary passes, and is not sent again."""
    dear = CANARY.replace("0.01", "0.0000001")
    job = make_job("canary_dear", 120, job_yaml=(ONE_ROUND, dear))

    assert job.run()["canary.judge"] == "failed"

    yaml = job.folder / "job.yaml"
    yaml.write_text(yaml.read_text().replace("0.0000001", "0.01"))
    assert job.run()["load"] == "success"
    assert [one["requests"] for one in bill_of(service, job)] == [50, 70]
    assert set(sent(service, job).values()) == {1}


def test_a_small_run_has_no_canary(make_job: MakeJob, service: Simulator) -> None:
    """Up to twice the canary's size everything goes at once."""
    job = make_job("canary_small", 100, job_yaml=(ONE_ROUND, CANARY))

    states = job.run()

    assert states["canary.build"] == states["canary.judge"] == "skipped"
    assert states["load"] == "success"
    assert len(job.loaded()) == 100


def test_a_canary_that_fails_in_passing_is_mended_by_the_next_round(
    make_job: MakeJob, service: Simulator
) -> None:
    """Server errors tell nothing of the prompt; their rows go again with round 2."""
    rounds = CANARY.replace("rounds: 1", "rounds: 2")
    job = make_job("canary_passing", 120, job_yaml=(ONE_ROUND, rounds))
    service.add_faults({"fault": "line_error", "status": 500, "fraction": 0.3, "first_times": 1})

    states = job.run()

    assert states["canary.judge"] == states["load"] == "success"
    assert len(job.loaded()) == 120
    assert set(sent(service, job).values()) == {1}


def test_a_budget_of_one_dollar_refuses_a_run_of_ten(
    make_job: MakeJob, service: Simulator, capfd: pytest.CaptureFixture[str]
) -> None:
    """No call is made: no file, no batch. With the budget raised the same run goes on."""
    limit = "  model: gpt-5-mini\n  params: {max_output_tokens: 100000}\n"
    job = make_job("one_dollar", 200, job_yaml=("  model: gpt-5-mini\n", limit))
    yaml = job.folder / "job.yaml"
    yaml.write_text(f"{yaml.read_text()}budget: {{max_usd: 1}}\n")
    before = service.requests()

    assert job.run()["round_1.build"] == "failed"

    assert service.requests() == before
    said = capfd.readouterr().out
    assert "may spend $1 (budget.max_usd)" in said
    assert "this round about $10.00" in said

    yaml.write_text(yaml.read_text().replace("max_usd: 1}", "max_usd: 11}"))
    assert job.run()["load"] == "success"
    assert len(job.loaded()) == 200


def test_the_ledger_agrees_with_the_bill_to_the_last_digit(
    make_job: MakeJob, service: Simulator, airflow_home: Path
) -> None:
    """Cached tokens, an expired batch, retries, then a second run with reused rows."""
    job = make_job("true_cost", 60, job_yaml=(ONE_ROUND, "retry: {rounds: 3}\n"))
    long = "Read the house rules before you answer. " * 200
    (job.folder / "prompt.md").write_text(f"{long}\n---\n{{{{ body }}}}\n")
    yaml = job.folder / "job.yaml"
    yaml.write_text(f"{yaml.read_text()}limits: {{requests_per_batch: 20}}\n")
    expired, broken = service.add_faults(
        {"fault": "expire", "fraction": 0.5, "times": 1, "metadata": {"job": job.name}},
        {"fault": "line_error", "status": 500, "fraction": 0.2, "first_times": 1},
    )

    job.run()

    found = counted(airflow_home, job)
    assert service.fired(expired["id"]) == 1
    assert service.fired(broken["id"]) > 0
    assert len(job.loaded()) == 60
    assert found.cached_tokens > 0
    assert found.cost_usd == billed(service, job) > 0
    assert found.realtime_usd == 2 * billed(service, job)

    job.fill([("n0000", "another text"), *notes(60)[1:]])
    job.run()

    assert sum(sent(service, job).values()) == 61
    assert counted(airflow_home, job).cost_usd == billed(service, job) > found.cost_usd

    job.run()  # a day that is done
    assert sum(sent(service, job).values()) == 61


@contextmanager
def somebody(answers: str, dag_id: str) -> Iterator[list[str]]:
    """Answer the first question of this DAG as its page would, from outside; yields the bodies."""
    bodies: list[str] = []
    stop = threading.Event()

    def answer() -> None:
        while not stop.wait(0.3):
            with suppress(sa.exc.OperationalError):  # SQLite is locked: a person would try again
                if body := answer_question(dag_id, answers):
                    bodies.append(body)
                    return

    person = threading.Thread(target=answer)
    person.start()
    try:
        yield bodies
    finally:
        stop.set()
        person.join()


def answer_question(dag_id: str, answer: str) -> str | None:
    from airflow.api_fastapi.core_api.datamodels.hitl import UpdateHITLDetailPayload
    from airflow.api_fastapi.core_api.routes.public.hitl import update_hitl_detail
    from airflow.models.taskinstance import TaskInstance
    from airflow.utils.session import create_session
    from sqlalchemy.orm import joinedload

    with create_session() as session:
        waiting = (
            sa.select(TaskInstance)
            .options(joinedload(TaskInstance.hitl_detail))
            .where(TaskInstance.dag_id == dag_id, TaskInstance.state == "awaiting_input")
        )
        one = session.scalars(waiting).first()
        if one is None:
            return None
        asked = f"{one.hitl_detail.subject}\n{one.hitl_detail.body}"
        user: Any = SimpleNamespace(get_id=lambda: "7", get_name=lambda: "ada")
        payload = UpdateHITLDetailPayload(chosen_options=[answer], params_input={})
        update_hitl_detail(dag_id, one.run_id, one.task_id, payload, user, session)
        return asked


def decisions(home: Path, job: Job) -> list[tuple[str, str]]:
    """What was decided of the job's runs, and by whom."""
    sql = (
        "SELECT became, detail FROM llm_batch_event JOIN llm_batch_run USING (run_id) "
        "WHERE job = :job AND became IN ('APPROVED', 'REJECTED') ORDER BY event_id"
    )
    with sa.create_engine(f"sqlite:///{home}/llm_batch_db.db").connect() as connection:
        return [tuple(row) for row in connection.execute(sa.text(sql), {"job": job.name})]


def test_a_person_decides_above_the_bound(
    make_job: MakeJob, service: Simulator, airflow_home: Path
) -> None:
    """A no ends the run without a call; a yes lets it go on, is recorded and not asked twice."""
    asks = f"{ONE_ROUND}\nbudget: {{approve_above_usd: 0.0001}}"
    job = make_job("asks_first", 5, job_yaml=(ONE_ROUND, asks))
    before = service.requests()

    with somebody("Reject", job.name) as bodies:
        states = job.run()

    assert states["approval.approve"] == "failed"
    assert states["round_1.build"] == "upstream_failed"
    assert service.requests() == before
    assert "Spend about $0.0025 on asks_first" in bodies[0]
    assert "5 requests in 1 batch;" in bodies[0]

    with somebody("Approve", job.name):
        states = job.run()

    assert states["approval.approve"] == states["load"] == "success"
    assert len(job.loaded()) == 5
    assert decisions(airflow_home, job) == [
        ("REJECTED", "rejected by ada, estimate $0.0025"),
        ("APPROVED", "approved by ada, estimate $0.0025"),
    ]


def test_an_approval_that_comes_too_late_sends_nothing(
    make_job: MakeJob, service: Simulator, capfd: pytest.CaptureFixture[str]
) -> None:
    """The month has less left than when the run was built; with more of it the run goes on."""
    asks = f"{ONE_ROUND}\nbudget: {{approve_above_usd: 0.0001, max_usd_per_month: 1}}"
    job = make_job("asks_late", 5, job_yaml=(ONE_ROUND, asks))
    yaml, before = job.folder / "job.yaml", service.requests()
    with somebody("Reject", job.name):
        job.run()
    yaml.write_text(yaml.read_text().replace("month: 1}", "month: 0.001}"))

    with somebody("Approve", job.name):
        states = job.run()

    assert states["approval.approve"] == "failed"
    assert states["round_1.build"] == "upstream_failed"
    assert service.requests() == before
    assert "may spend $0.001 (budget.max_usd_per_month)" in capfd.readouterr().out

    yaml.write_text(yaml.read_text().replace("approve_above_usd: 0.0001", "approve_above_usd: 5"))
    assert job.run()["approval.estimate"] == "failed"  # a bound that was raised is no money
    yaml.write_text(yaml.read_text().replace("month: 0.001}", "month: 1}"))
    states = job.run()
    assert (states["approval.estimate"], states["load"]) == ("skipped", "success")


def test_below_the_bound_nobody_is_asked(make_job: MakeJob, service: Simulator) -> None:
    """Both tasks are skipped, and the run goes on."""
    asks = f"{ONE_ROUND}\nbudget: {{approve_above_usd: 5}}"
    job = make_job("asks_nobody", 5, job_yaml=(ONE_ROUND, asks))

    states = job.run()

    assert states["approval.estimate"] == states["approval.approve"] == "skipped"
    assert states["load"] == "success"


def test_identical_requests_are_paid_for_once(
    make_job: MakeJob, service: Simulator, airflow_home: Path
) -> None:
    """100 rows with four texts: four requests, behind a canary or not, and 100 results."""
    job = make_job(
        "same_texts", 1, job_yaml=(ONE_ROUND, f"{ONE_ROUND}\nreuse: {{identical: true}}")
    )
    job.fill([(f"n{number:04d}", f"text {number % 4}") for number in range(100)])

    assert job.run()["load"] == "success"

    assert len(job.loaded()) == 100
    assert sum(sent(service, job).values()) == 4
    assert counted(airflow_home, job).cost_usd == billed(service, job)

    job.run()
    assert sum(sent(service, job).values()) == 4

"""People are told through Airflow's notifiers: a real mail server, and a notifier that fails."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from email.message import EmailMessage

import pytest

from include.simulator.process import Simulator
from tests.airflow.mailbox import Mailbox, open_mailbox
from tests.airflow.workshop import Job, MakeJob

GOOD = [(f"n{number}", "canary-row-51d0") for number in range(4)]
DAG = '''\
"""Airflow DAG of one test."""
from datetime import UTC, datetime
from airflow.providers.smtp.notifications.smtp import SmtpNotifier
from airflow.sdk import BaseNotifier
from llm_batch.dag import batch_dag


class Broken(BaseNotifier):
    def notify(self, context):
        raise OSError("nobody is there")


dag = batch_dag(
    "{name}",
    schedule="@daily",
    start_date=datetime(2026, 11, 1, tzinfo=UTC),
    default_args={{"retries": 0}},
    notifiers=[Broken(), SmtpNotifier(to="oncall@example.com")],
)
'''


@pytest.fixture
def make_job(own_job: MakeJob) -> MakeJob:
    """Make a job of the test's own with both notifiers."""

    def make(name: str, more: str) -> Job:
        rounds = "retry: {rounds: 1}"
        job = own_job(GOOD, name, job_yaml=(rounds, f"{rounds}\n{more}"))
        job.dag_file.write_text(DAG.format(name=name))
        return job

    return make


@pytest.fixture
def mailbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mailbox]:
    """A mail server behind the connection `smtp_default`."""
    with open_mailbox() as mailbox:
        extra = {"disable_tls": True, "disable_ssl": True, "from_email": "airflow@example.com"}
        connection = {"conn_type": "smtp", "host": "127.0.0.1", "port": mailbox.port}
        monkeypatch.setenv("AIRFLOW_CONN_SMTP_DEFAULT", json.dumps({**connection, "extra": extra}))
        yield mailbox


def text(mail: EmailMessage) -> str:
    body = mail.get_body(("html", "plain"))
    assert body is not None
    return str(body.get_content())


def told(job: Job) -> dict[str, tuple[int, bool]]:
    """Tries and delivery by channel, as the ledger has them."""
    with closing(sqlite3.connect(job.home / "llm_batch_db.db")) as connection:
        query = "SELECT channel, tries, delivered_at IS NOT NULL FROM llm_batch_alert WHERE job = ?"
        rows = connection.execute(query, (job.name,)).fetchall()
    return {channel: (tries, bool(delivered)) for channel, tries, delivered in rows}


def test_a_red_run_sends_one_mail_with_all_that_is_needed(
    make_job: MakeJob, mailbox: Mailbox, service: Simulator
) -> None:
    """Job, partition, figures, a link and what to do; no row text; the broken one is kept."""
    service.add_faults({"fault": "line_error", "status": 400, "fraction": 1})
    job = make_job("mailed_failures", "alert: {failure_rate: 0.1}")

    states = job.run()

    assert states["report"] == "failed"
    (mail,) = mailbox.mails
    assert mail["To"] == "oncall@example.com"
    assert mail["Subject"] == "Job mailed_failures: 4 of 4 rows failed (100.0%)"
    for part in ("2026-11-03 00:00", "invalid_request 4", "redrive=true", "/dags/mailed_failures"):
        assert part in text(mail)
    assert "canary-row" not in text(mail)
    assert told(job) == {"log": (1, True), "0 Broken": (1, False), "1 SmtpNotifier": (1, True)}


@pytest.mark.parametrize(
    ("key", "subject", "tries"),
    [
        ("max_usd", "of the run's budget of $0.0024", 3),
        # Only the plan came near it: what the batch has cost did not, and nobody is told again.
        ("max_usd_per_month", "of the budget of $0.0024 for {month}", 1),
    ],
)
def test_what_several_tasks_see_is_mailed_once_and_fails_nothing(
    make_job: MakeJob, mailbox: Mailbox, service: Simulator, key: str, subject: str, tries: int
) -> None:
    """Tasks that see the same budget alert send one mail; the broken notifier is asked by each."""
    job = make_job(f"mailed_{key}", f"budget: {{{key}: 0.0024}}")
    began = datetime.now(UTC)

    states = job.run()

    assert states["report"] == "success"
    (mail,) = mailbox.mails
    months = {f"{moment:%Y-%m}" for moment in (began, datetime.now(UTC))}
    assert any(subject.format(month=one) in mail["Subject"] for one in months)
    assert told(job) == {"log": (1, True), "0 Broken": (tries, False), "1 SmtpNotifier": (1, True)}


def test_a_late_batch_is_mailed_while_it_is_waited_for(
    make_job: MakeJob,
    mailbox: Mailbox,
    service: Simulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At `late_share` of the deadline the deferred task wakes, tells once, and waits on."""
    service.add_faults({"fault": "stuck"})
    monkeypatch.setenv("AIRFLOW__LLM_BATCH__DEADLINE_HOURS", "0.006")  # 21.6 s
    job = make_job("mailed_late", "alert: {late_share: 0.2}")

    states = job.run()

    assert states["load"] == "success"
    (mail,) = mailbox.mails
    assert mail["Subject"].startswith("Job mailed_late: 1 of 1 batch of round 1 is late")
    assert set(job.failures()) == {key for key, _ in GOOD}


def test_notifiers_can_come_from_a_setting_and_a_wrong_one_stops_nothing(
    make_job: MakeJob,
    mailbox: Mailbox,
    service: Simulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`[llm_batch] notifiers` adds to those of the DAG; one that cannot be made is only logged."""
    smtp = "airflow.providers.smtp.notifications.smtp.SmtpNotifier"
    setting = json.dumps({smtp: {"to": "team@example.com", "subject": "{{ alert.kind }}!"}})
    monkeypatch.setenv("AIRFLOW__LLM_BATCH__NOTIFIERS", setting)
    job = make_job("mailed_setting", "budget: {max_usd: 0.0024}")
    first = job.run()
    monkeypatch.setenv("AIRFLOW__LLM_BATCH__NOTIFIERS", '{"no.such.Notifier": {}}')
    job.fill([(f"m{number}", "more") for number in range(4)])

    second = job.run()

    assert {mail["To"]: mail["Subject"] for mail in mailbox.mails}["team@example.com"] == "budget!"
    assert len(mailbox.mails) == 2
    assert first["report"] == second["report"] == "success"

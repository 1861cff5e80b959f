"""Bad input: an error at the earliest step that can know, while all that is good goes on."""

from __future__ import annotations

import json
import socket
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from include.simulator.process import Simulator
from tests.airflow.workshop import Job, MakeJob

ROW_TEXT = "canary-row-7c1f"
KEY = "canary-key-3b9e"
GOOD = [("n1", f"{ROW_TEXT} one"), ("n2", f"{ROW_TEXT} two"), ("n3", f"{ROW_TEXT} three")]


@pytest.fixture
def make_job(own_job: MakeJob) -> MakeJob:
    """Make a job of good rows."""
    return partial(own_job, GOOD)


@pytest.fixture
def use_api(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Point `openai_default` at (base URL, API key)."""

    def use(base_url: str, key: str) -> None:
        connection = {"conn_type": "openai", "host": base_url, "password": key}
        monkeypatch.setenv("AIRFLOW_CONN_OPENAI_DEFAULT", json.dumps(connection))

    return use


def batches(service: Simulator, job: Job) -> list[int]:
    """The number of requests of each batch that the API has of this job."""
    return [
        one["total"]
        for one in service.batches()["batches"]
        if (one["metadata"] or {}).get("job") == job.name
    ]


@dataclass(frozen=True)
class Log:
    """What a run has told: the task logs on standard output, and what our modules have logged."""

    out: pytest.CaptureFixture[str]
    records: pytest.LogCaptureFixture

    def read(self) -> str:
        """Everything since the last reading, which must hold no row text and no key."""
        text = self.out.readouterr().out + self.records.text
        self.records.clear()
        assert ROW_TEXT not in text
        assert KEY not in text
        return text

    def error(self) -> str:
        """The last error of ours."""
        lines = self.read().splitlines()
        return [line for line in lines if line.startswith("include.errors.")][-1]


@pytest.fixture
def log(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Log:
    """The log of this test's runs."""
    return Log(capfd, caplog)


def ledger_text(home: Path) -> str:
    """Everything that the ledger holds, as one text."""
    with closing(sqlite3.connect(home / "llm_batch_db.db")) as connection:
        return "\n".join(connection.iterdump())


BROKEN_FOLDERS = {
    "unknown_key": (
        {"job_yaml": ("  model:", f"  api_key: sk-{KEY}\n  model:")},
        "job.yaml:7: request.api_key: unknown key; Allowed here: conn_id, output, endpoint",
    ),
    "wrong_type": (
        {"job_yaml": ("{rounds: 1}", "{rounds: often}")},
        "job.yaml:12: retry.rounds: must be a whole number; found 'often'",
    ),
    "missing_file": (
        {"job_yaml": ("sql: rows.sql", "sql: row.sql")},
        "job.yaml:3: there is no file row.sql in the job's folder",
    ),
    "unknown_endpoint": (
        {"job_yaml": ("/v1/responses", "/v1/response")},
        "job.yaml:6: request.endpoint: unknown endpoint; allowed: /v1/responses, /v1/chat",
    ),
    "no_model": (
        {"job_yaml": ("  model: gpt-5-mini\n", "")},
        "job.yaml:5: request.model: is missing",
    ),
    "bad_placeholder": (
        {"prompt_md": ("{{ body }}", "{{ body | upper }}")},
        "prompt.md:3: `{{ body | upper }}` is no column name",
    ),
}


def test_what_the_folder_shows_is_an_import_error(make_job: MakeJob, tmp_path: Path) -> None:
    """File, line, key and what is allowed stand in the DAG's import error; other DAGs go on."""
    from airflow.dag_processing.dagbag import DagBag

    dags = tmp_path / "dags"
    dags.mkdir()
    for name, (changes, _) in BROKEN_FOLDERS.items():
        make_job(name, dags=dags, **changes)
    make_job("good", dags=dags)

    bag = DagBag(str(dags))

    found = {Path(file).stem: text for file, text in bag.import_errors.items()}
    assert list(bag.dags) == ["good"]
    assert set(found) == set(BROKEN_FOLDERS)
    for name, (_, message) in BROKEN_FOLDERS.items():
        assert message in found[name]
        assert f"Job {name}: a problem in {tmp_path / 'jobs' / name}" in found[name]
        assert KEY not in found[name]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "no_key_column",
            {"rows_sql": ("note_id, body", "body")},
            "job.yaml: source.key names `note_id`, which rows.sql does not return. Columns of",
        ),
        (
            "no_such_column",
            {"prompt_md": ("{{ body }}", "{{ text }}")},
            "prompt.md:3: {{ text }} is no column of rows.sql. Columns of rows.sql: note_id, body.",
        ),
    ],
)
def test_what_only_the_database_knows_fails_extract(
    name: str,
    changes: dict[str, tuple[str, str]],
    message: str,
    make_job: MakeJob,
    service: Simulator,
    log: Log,
) -> None:
    """A key or a placeholder without a column fails the first task; mended, one batch is sent."""
    job = make_job(name, **changes)

    states = job.run()

    assert states["extract"] == "failed"
    assert f"{name}: {message}" in log.error()
    assert batches(service, job) == []

    job.write()
    job.run()

    assert job.loaded() == {"n1", "n2", "n3"}
    assert batches(service, job) == [3]


def test_one_bad_row_keeps_no_other_back(
    make_job: MakeJob, service: Simulator, airflow_home: Path, log: Log
) -> None:
    """Rows with a null or a shared key fail with a reason; mended, they alone are sent."""
    job = make_job("bad_rows")
    job.fill([*GOOD, ("n4", None), ("n5", f"{ROW_TEXT} a"), ("n5", f"{ROW_TEXT} b")])

    states = job.run()

    failures = job.failures()
    assert states["report"] == "success"
    assert job.loaded() == {"n1", "n2", "n3"}
    assert {key: reason for key, (reason, _) in failures.items()} == {
        "n4": "null_column",
        "n5": "duplicate_key",
    }
    assert failures["n4"][1].startswith("column body is null, and prompt.md needs it; give it")
    assert failures["n5"][1] == "the source has several rows with this key; none of them was sent"

    job.fill([*GOOD, ("n4", f"{ROW_TEXT} four"), ("n5", f"{ROW_TEXT} a")])
    job.run()

    assert job.loaded() == {"n1", "n2", "n3", "n4", "n5"}
    assert job.failures() == {}
    assert batches(service, job) == [3, 2]
    assert "rows 6: 3 loaded, 3 failed (3 of them never sent), 0 reused" in log.read()
    assert ROW_TEXT not in ledger_text(airflow_home)


OWN_REQUEST = '''\
"""The request of one note."""


def build(row: dict) -> dict:
    """Fail for one of the rows, with its text in the error."""
    if row["note_id"] == "n2":
        raise ValueError(row["body"])
    return {"input": row["body"]}
'''


def test_a_row_that_request_py_cannot_take(make_job: MakeJob, service: Simulator, log: Log) -> None:
    """The row for which `build` raises fails with a reason; its text is not in the log."""
    job = make_job("own_request", job_yaml=("  prompt: prompt.md\n", ""))
    (job.folder / "prompt.md").unlink()
    (job.folder / "request.py").write_text(OWN_REQUEST)

    job.run()

    assert log.read()
    assert job.loaded() == {"n1", "n3"}
    assert job.failures() == {"n2": ("bad_request", "request.py raised ValueError")}
    assert batches(service, job) == [2]


def test_a_refused_key_is_told_and_costs_nothing(
    make_job: MakeJob,
    service: Simulator,
    use_api: Callable[[str, str], None],
    airflow_home: Path,
    log: Log,
) -> None:
    """A 401 fails submit at once and names the connection; with a good key one batch is made."""
    job = make_job("refused_key")
    use_api(service.base_url, f"wrong-{KEY}")

    states = job.run()

    error = log.error()
    assert states["round_1.shard.submit"] == "failed"
    assert states["round_1.build"] == "success"
    assert "over connection openai_default: HTTP 401" in error
    assert "Correct the connection's password and clear this task." in error
    assert batches(service, job) == []
    assert KEY not in ledger_text(airflow_home)

    use_api(service.base_url, f"sk-{KEY}")
    states = job.run()

    assert states["report"] == "success"
    assert log.read()
    assert job.loaded() == {"n1", "n2", "n3"}
    assert batches(service, job) == [3]


@contextmanager
def dead_port() -> Iterator[int]:
    """A port on which nobody listens, and nobody can: it is bound here."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def test_a_server_that_is_away_is_waited_for(
    make_job: MakeJob,
    service: Simulator,
    use_api: Callable[[str, str], None],
    log: Log,
) -> None:
    """Without a server submit ends with an error that Airflow tries again; then one batch is made.

    This job has no retries, so the run fails; `test_dags.py` holds that others get theirs.
    """
    job = make_job("server_away")

    with dead_port() as port:
        use_api(f"http://127.0.0.1:{port}/v1", f"sk-{KEY}")
        states = job.run()

    error = log.error()
    assert states["round_1.shard.submit"] == "failed"
    assert error.startswith("include.errors.TransientError: ")
    assert "over connection openai_default: no answer from the API (ConnectError)" in error
    assert "Check the network and the host of the connection" in error

    use_api(service.base_url, f"sk-{KEY}")
    job.run()

    assert job.loaded() == {"n1", "n2", "n3"}
    assert batches(service, job) == [3]


def test_a_model_that_the_api_does_not_know(
    make_job: MakeJob, service: Simulator, log: Log
) -> None:
    """The API refuses the batch: the log says why, every row has a reason, nothing is paid for."""
    job = make_job("unknown_model", job_yaml=("gpt-5-mini", "no-such-model"))
    before = service.bill()["cost_usd"]

    job.run()

    told = log.read()
    assert "the API refused the request file: model_not_found." in told
    assert "rows 3: 0 loaded, 3 failed (0 of them never sent), 0 reused" in told
    assert set(job.failures()) == {"n1", "n2", "n3"}
    assert service.bill()["cost_usd"] == before
    assert len(batches(service, job)) == 1

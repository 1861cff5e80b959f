"""`python -m llm_batch` on a real Airflow home: what it says, to whom, and its exit codes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from llm_batch.__main__ import main
from llm_batch.answer import DECLINED, FAILED, LOOK, OK

from include import run_mode
from include.job_spec import JOBS_ROOT
from include.local_stack.rest import wait_until
from include.simulator.process import Simulator

PATIENCE = 120.0  # seconds
KEY = "sk-canary-9d2e"  # that of the connection, see conftest.py
Said = Callable[..., tuple[int, str]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Said:
    """Run a command; its exit code and all that it said."""

    def run(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(arguments)
        said = capsys.readouterr()
        assert KEY not in said.out + said.err
        return code, said.out + said.err

    return run


@pytest.fixture
def checks(say: Said) -> Callable[[], dict[str, dict[str, str]]]:
    """What the doctor says, by the name of the check."""

    def run() -> dict[str, dict[str, str]]:
        _, said = say("doctor", "--json")
        found: list[dict[str, str]] = json.loads(said[said.index("[") :])
        return {one["name"]: one for one in found}

    return run


@pytest.fixture
def ledger_file(
    airflow_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A ledger of its own, not made yet."""
    path = tmp_path / "ledger.db"
    connection = json.dumps({"conn_type": "sqlite", "host": str(path)})
    monkeypatch.setenv("AIRFLOW_CONN_LLM_BATCH_DB", connection)
    return path


@pytest.fixture
def pool(airflow_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Make the pool that the setting names; it is gone afterwards."""
    from airflow.models.pool import Pool

    monkeypatch.setenv("AIRFLOW__LLM_BATCH__POOL", "of_a_test")

    def make(**values: Any) -> None:
        Pool.create_or_update_pool("of_a_test", description="", **values)

    yield make
    if Pool.get_pool("of_a_test") is not None:
        Pool.delete_pool("of_a_test")


def triggerer(*, seconds_ago: float) -> None:
    """Let a triggerer have been heard of then."""
    from datetime import timedelta

    from airflow.jobs.job import Job, JobState
    from airflow.sdk.timezone import utcnow
    from airflow.utils.session import create_session

    with create_session() as session:
        job = Job(job_type="TriggererJob", state=JobState.RUNNING)
        job.job_type = "TriggererJob"
        job.hostname = "a-triggerer"
        job.latest_heartbeat = utcnow() - timedelta(seconds=seconds_ago)
        session.query(Job).filter(Job.job_type == "TriggererJob").delete()
        session.add(job)


def test_a_ledger_that_is_not_migrated(ledger_file: Path, say: Said, checks: Any) -> None:
    """Every command says how to mend it, none does it by itself; `migrate` does."""
    code, said = say("status")

    assert code == FAILED
    assert "python -m llm_batch migrate" in said
    assert checks()["ledger"]["level"] == "BAD"
    assert say("migrate")[0] == OK
    assert checks()["ledger"]["level"] == "ok"
    assert say("status") == (OK, "The ledger has no runs yet.\n\nNothing needs a look.\n")


def test_no_key(ledger_file: Path, checks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection without a password is named, before any call."""
    empty = json.dumps({"conn_type": "openai", "host": "http://127.0.0.1:9/v1"})
    monkeypatch.setenv("AIRFLOW_CONN_OPENAI_DEFAULT", empty)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    assert checks()["API of openai_default"]["found"] == "the connection has no key"


def test_wrong_key(
    ledger_file: Path, tmp_path: Path, checks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that the server does not take."""
    with Simulator.start(tmp_path / "strict", key="sk-another") as strict:
        connection = {"conn_type": "openai", "host": strict.base_url, "password": KEY}
        monkeypatch.setenv("AIRFLOW_CONN_OPENAI_DEFAULT", json.dumps(connection))

        assert "the key is wrong" in checks()["API of openai_default"]["found"]


def test_unreachable_server(
    ledger_file: Path, checks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port on which nobody listens."""
    connection = {"conn_type": "openai", "host": "http://127.0.0.1:9/v1", "password": KEY}
    monkeypatch.setenv("AIRFLOW_CONN_OPENAI_DEFAULT", json.dumps(connection))

    assert "cannot be reached" in checks()["API of openai_default"]["found"]


def test_missing_connection(
    ledger_file: Path, checks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job's connection that nobody has defined."""
    monkeypatch.delenv("AIRFLOW_CONN_RESULTS_DB")

    assert "'results_db' is not defined" in checks()["database results_db"]["found"]


def test_a_job_that_cannot_start(
    ledger_file: Path, tmp_path: Path, checks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its budget needs a price; a mistake in its folder is told in one line of the table."""
    folder = tmp_path / "jobs" / "ticket_triage"
    shutil.copytree(JOBS_ROOT / "ticket_triage", folder)
    spec = (folder / "job.yaml").read_text()
    monkeypatch.setenv("AIRFLOW__LLM_BATCH__JOBS", str(folder.parent))
    assert "job ticket_triage" not in checks()

    (folder / "job.yaml").write_text(spec.replace("gpt-5-mini", "gpt-nobody-knows"))
    found = checks()
    assert found["prices"]["level"] == "warning"
    assert found["job ticket_triage"]["level"] == "BAD"
    assert "budget.max_usd, but the price" in found["job ticket_triage"]["found"]

    (folder / "job.yaml").write_text(f"{spec}\nbudgte: 1\n")
    assert "budgte: unknown key" in checks()["job ticket_triage"]["found"]
    assert "\n" not in checks()["job ticket_triage"]["found"]


def test_missing_pool(ledger_file: Path, checks: Any, pool: Callable[..., None]) -> None:
    """The pool must be there, count deferred tasks, and have slots."""
    assert "there is no pool 'of_a_test'" in checks()["pool"]["found"]
    pool(slots=4, include_deferred=False)
    assert "does not count deferred tasks" in checks()["pool"]["found"]
    pool(slots=0, include_deferred=True)
    assert checks()["pool"]["level"] == "BAD"
    pool(slots=4, include_deferred=True)
    assert checks()["pool"]["found"] == "pool 'of_a_test': 0 of 4 slots in use"


def test_triggerer_down(ledger_file: Path, checks: Any) -> None:
    """One that was last heard of ten minutes ago is down; one of a moment ago is not."""
    triggerer(seconds_ago=600)
    assert checks()["triggerer"]["found"].startswith("down: last heard of at 2")
    triggerer(seconds_ago=0)
    assert checks()["triggerer"]["level"] == "ok"


def test_artifacts_not_writable(
    ledger_file: Path, tmp_path: Path, checks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder in which nobody can write, not even root."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AIRFLOW__LLM_BATCH__ARTIFACTS", f"file://{tmp_path}/file/artifacts")

    assert "is not writable" in checks()["artifacts"]["found"]


def test_the_doctor_says_how_to_mend(ledger_file: Path, say: Said) -> None:
    """Something bad: exit code 1, and a list of what to do."""
    code, said = say("doctor")

    assert code == LOOK
    assert "To mend:\n- " in said


def test_a_whole_day(service: Simulator, ledger_file: Path, say: Said) -> None:
    """After a day of the shipped job, every command tells of the same run."""
    from airflow.dag_processing.dagbag import DagBag
    from airflow.sdk.timezone import datetime
    from llm_batch import connections

    from include.source_tables import load_sample_tickets

    load_sample_tickets(connections.engine("source_db"))
    bag = DagBag(str(Path(os.environ["AIRFLOW__CORE__DAGS_FOLDER"]) / "ticket_triage.py"))
    bag.dags["ticket_triage"].test(logical_date=datetime(2026, 11, 2))

    _, listed = say("runs", "--json")
    (run,) = json.loads(listed)
    assert run["state"] == "DONE"
    code, shown = say("show", run["run_id"][:8])
    assert code == OK
    assert f"rows {run['rows']}: {run['loaded']} loaded" in shown
    assert say("batches") == (OK, "Nothing is at the API.\n")
    code, spent = say("costs", "--json")
    assert sum(Decimal(line["cost_usd"]) for line in json.loads(spent)) == Decimal(run["cost_usd"])
    assert "ticket_triage" in say("costs")[1]
    first, *_ = connections.ledger().batches(run["run_id"])
    assert f"{first.collected_at:%Y-%m-%d}" in say("costs", "--job", "ticket_triage")[1]
    code, audited = say("audit")
    assert (code, "BROKEN" in audited) == (OK, False)
    assert "1 run was looked at." in audited
    code, said = say("status")
    assert code == OK
    assert "ticket_triage" in said


def test_an_unknown_run(ledger_file: Path, say: Said) -> None:
    """An error is one line for people, and an object for machines."""
    say("migrate")

    code, said = say("show", "abcdef")
    assert code == FAILED
    assert said.startswith("The ledger knows no run that begins with 'abcdef'.")
    code, said = say("show", "abcdef", "--json")
    assert code == FAILED
    assert '{"error": "The ledger knows no run' in said


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulator]:
    """A simulator whose batches stay in progress, behind `openai_default`."""
    with Simulator.start(tmp_path / "slow", seconds_in_progress=3600) as simulator:
        connection = {"conn_type": "openai", "host": simulator.base_url, "password": KEY}
        monkeypatch.setenv("AIRFLOW_CONN_OPENAI_DEFAULT", json.dumps(connection))
        yield simulator


@pytest.fixture
def open_run(slow: Simulator, ledger_file: Path) -> str:
    """The id of a run of ticket_triage that Airflow runs, with its batches at the API."""
    from airflow.dag_processing.dagbag import DagBag
    from airflow.sdk.timezone import datetime
    from airflow.utils.session import create_session
    from airflow.utils.state import DagRunState
    from airflow.utils.types import DagRunTriggeredByType
    from llm_batch import airflow_runs, connections

    from include import pipeline
    from include.job_spec import load_job
    from include.ledger_records import Partition
    from include.source_tables import load_sample_tickets

    load_sample_tickets(connections.engine("source_db"))
    dag_id, start, end = "ticket_triage", datetime(2026, 11, 4), datetime(2026, 11, 5)
    sync_to_database(DagBag(os.environ["AIRFLOW__CORE__DAGS_FOLDER"]).dags[dag_id])
    with create_session() as session:
        for old in session.query(dag_runs()).filter_by(dag_id=dag_id):
            session.delete(old)
        session.flush()
        created = airflow_runs._dag(dag_id, session).create_dagrun(
            run_id="manual__1",
            logical_date=start,
            data_interval=(start, end),
            run_after=end,
            run_type="manual",
            triggered_by=DagRunTriggeredByType.TEST,
            state=DagRunState.RUNNING,
            session=session,
        )
        dag_run_id = created.run_id
    ledger, artifacts = connections.ledger(), connections.artifacts()
    run = pipeline.open_run(
        ledger,
        load_job(dag_id),
        Partition(dag_id, start, end),
        mode=run_mode.NORMAL,
        dag_id=dag_id,
        dag_run_id=dag_run_id,
    )
    source, target = (
        (lambda: connections.engine("source_db")),
        (lambda: connections.engine("results_db")),
    )
    run = pipeline.extract(run, ledger, artifacts, source)
    for batch in pipeline.build(run, 1, ledger, artifacts, target, most_shards=9):
        connections.submission(batch.conn_id).submit(batch.submission_id)
    return run.run_id


def sync_to_database(dag: Any) -> None:
    """Put a DAG where the scheduler and the command line read it."""
    from airflow.models.dag import DagModel
    from airflow.models.dagbundle import DagBundleModel
    from airflow.models.serialized_dag import SerializedDagModel
    from airflow.sdk import DAG
    from airflow.serialization.serialized_objects import LazyDeserializedDAG
    from airflow.utils.session import create_session

    assert isinstance(dag, DAG)
    with create_session() as session:
        if session.get(DagBundleModel, "testing") is None:
            session.add(DagBundleModel(name="testing"))
            session.flush()
        if session.get(DagModel, dag.dag_id) is None:
            session.add(DagModel(dag_id=dag.dag_id, bundle_name="testing", is_paused=True))
        session.flush()
        SerializedDagModel.write_dag(
            LazyDeserializedDAG.from_dag(dag), bundle_name="testing", session=session
        )


def dag_runs() -> Any:
    """Airflow's model of a run."""
    from airflow.models.dagrun import DagRun

    return DagRun


def airflow_state(run_id: str) -> str:
    """The state of an Airflow run."""
    from airflow.utils.session import create_session

    with create_session() as session:
        return str(session.query(dag_runs()).filter_by(run_id=run_id).one().state)


def statuses(simulator: Simulator) -> set[str]:
    """The statuses of all batches at the API."""
    return {one["status"] for one in simulator.batches()["batches"]}


def test_cancel_asks_first(open_run: str, slow: Simulator, say: Said) -> None:
    """With nobody at a terminal to say yes: it tells what would be stopped, and stops nothing."""
    code, said = say("cancel", open_run[:8])

    assert code == DECLINED
    assert "Airflow runs are marked as failed" in said
    assert "Nothing was done. Say --yes to do it." in said
    assert statuses(slow) <= {"validating", "in_progress"}
    assert airflow_state("manual__1") == "running"


def test_cancel_ends_the_run_and_its_batches(open_run: str, slow: Simulator, say: Said) -> None:
    """The Airflow run is failed, the batches are cancelled, and it is on record who did it."""
    code, said = say("cancel", "--all", "--yes", "--who", "kim", "--json")

    assert code == OK
    (line,) = json.loads(said[said.index("[\n") :])
    assert (line["run_id"], line["action"]["who"]) == (open_run, "kim")
    assert statuses(slow) <= {"cancelling", "cancelled"}
    assert airflow_state("manual__1") == "failed"
    assert "kim" in say("show", open_run)[1]


def test_cancel_of_one_batch_lets_the_run_go_on(open_run: str, slow: Simulator, say: Said) -> None:
    """What to do about one batch that is stuck."""
    batch_id = slow.batches()["batches"][0]["id"]

    code, _ = say("cancel", open_run, "--batch", batch_id, "--yes")

    assert code == OK
    by_id = {one["id"]: one["status"] for one in slow.batches()["batches"]}
    assert by_id.pop(batch_id) in {"cancelling", "cancelled"}
    assert set(by_id.values()) <= {"validating", "in_progress"}
    assert airflow_state("manual__1") == "running"


def test_a_redrive_starts_a_run_over_the_same_interval(open_run: str, say: Said) -> None:
    """Refused while the run is open; afterwards one Airflow run with the param, on record."""
    from llm_batch import connections

    code, said = say("redrive", "ticket_triage", "2026-11-04", "--yes")
    assert (code, "is not finished" in said) == (FAILED, True)
    ledger = connections.ledger()
    ledger.finish_run(open_run, loaded=ledger.run(open_run).rows - 2, failed=2)

    assert say("redrive", "ticket_triage", "2026-11-04")[0] == DECLINED
    code, said = say("redrive", "ticket_triage", "2026-11-04", "--yes", "--json")

    assert code == OK
    answer, _ = json.JSONDecoder().raw_decode(said[said.index("{\n") :])
    run_id = answer["action"]["detail"].removeprefix("Airflow run ")
    assert answer["rows"] == 2
    assert airflow_state(run_id) == "queued"
    assert interval(run_id) == interval("manual__1")
    assert conf_of(run_id) == {"redrive": True, "model": "gpt-5-mini"}


def test_a_redrive_of_a_changed_job_says_so(
    open_run: str, say: Said, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anybody says yes: a new prompt sends all rows, and the price is theirs."""
    from llm_batch import connections

    ledger = connections.ledger()
    rows = ledger.run(open_run).rows
    ledger.finish_run(open_run, loaded=rows - 2, failed=2)
    shutil.copytree(JOBS_ROOT / "ticket_triage", tmp_path / "ticket_triage")
    monkeypatch.setenv("AIRFLOW__LLM_BATCH__JOBS", str(tmp_path))
    before = say("redrive", "ticket_triage", "2026-11-04", "--json")
    with (tmp_path / "ticket_triage" / "prompt.md").open("a") as prompt:
        prompt.write("Be brief.\n")

    code, said = say("redrive", "ticket_triage", "2026-11-04", "--json")

    assert (before[0], json.loads(before[1])["rows"]) == (DECLINED, 2)
    assert (code, json.loads(said)["rows"]) == (DECLINED, rows)
    assert (
        f"{rows} rows are sent, loaded ones too" in say("redrive", "ticket_triage", "2026-11-04")[1]
    )
    _, said = say("redrive", "ticket_triage", "2026-11-04", "--yes", "--json")
    answer, _ = json.JSONDecoder().raw_decode(said[said.index("{\n") :])
    started = answer["action"]["detail"].removeprefix("Airflow run ")
    assert note_of(started) == f"Redrive of {rows} rows of manual__1."


def conf_of(run_id: str) -> Any:
    """The params of an Airflow run."""
    from airflow.utils.session import create_session

    with create_session() as session:
        return session.query(dag_runs()).filter_by(run_id=run_id).one().conf


def note_of(run_id: str) -> Any:
    """The note on an Airflow run."""
    from airflow.utils.session import create_session

    with create_session() as session:
        return session.query(dag_runs()).filter_by(run_id=run_id).one().note


def interval(run_id: str) -> tuple[Any, Any]:
    """The data interval of an Airflow run."""
    from airflow.utils.session import create_session

    with create_session() as session:
        found = session.query(dag_runs()).filter_by(run_id=run_id).one()
        return found.data_interval_start, found.data_interval_end


@pytest.mark.parametrize("wrong", [("cancel",), ("redrive", "x", "yesterday"), ("nonsense",)])
def test_a_wrong_command_line(say: Said, wrong: tuple[str, ...]) -> None:
    """Exit code 2, before anything is looked at."""
    with pytest.raises(SystemExit) as ended:
        say(*wrong)

    assert ended.value.code == 2


def replace(run_id: str) -> str:
    """Open the run that a changed job makes of the same partition; return its id."""
    from llm_batch import connections

    from include import pipeline
    from include.ledger_records import Partition

    ledger = connections.ledger()
    run = ledger.run(run_id)
    spec = pipeline.pinned(run)
    request = spec.request.model_copy(update={"prompt": f"{spec.request.prompt}\nBe brief."})
    spec = spec.model_copy(update={"request": request})
    newer = pipeline.open_run(
        ledger,
        spec,
        Partition(run.job, run.interval_start, run.interval_end),
        mode=run_mode.NORMAL,
        dag_id=run.dag_id,
        dag_run_id="manual__2",
    )
    return newer.run_id


def test_close_ends_a_run_that_was_replaced(open_run: str, slow: Simulator, say: Said) -> None:
    """Refused while it has the rows, or works; then its batches end, it is closed, on record."""
    assert "is the newest run of its partition" in say("close", open_run, "--yes")[1]
    newer = replace(open_run)
    code, said = say("close", open_run, "--yes")
    assert (code, "Airflow run manual__1 of DAG ticket_triage" in said) == (FAILED, True)
    assert say("cancel", open_run, "--yes")[0] == OK
    code, said = say("close", open_run)
    assert (code, newer in said) == (DECLINED, True)

    wait_until(
        "a close, after the batches have ended",
        PATIENCE,
        lambda: say("close", open_run, "--yes", "--who", "kim")[0] == OK,
    )

    _, listed = say("runs", "--json")
    states = {one["run_id"]: one["state"] for one in json.loads(listed[listed.index("[\n") :])}
    assert states == {open_run: "CLOSED", newer: "OPEN"}
    assert "close" in say("show", open_run)[1]


@pytest.fixture
def yes_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Somebody sits at the terminal, and says yes after something has happened."""

    def think(happens: Callable[[], object]) -> None:
        def answer(_question: str) -> str:
            happens()
            return "y"

        monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
        monkeypatch.setattr("builtins.input", answer)

    return think


def set_airflow_state(run_id: str, state: str) -> None:
    """As if somebody had cleared a task of it, or marked it."""
    from airflow.utils.session import create_session

    with create_session() as session:
        session.query(dag_runs()).filter_by(run_id=run_id).update({"state": state})


def extracted_again(run_id: str) -> str:
    """Open another run of the partition, with its snapshot; return its id."""
    from llm_batch import connections

    from include import pipeline

    ledger = connections.ledger()
    run = ledger.run(replace(run_id))
    source = connections.engine("source_db")
    return pipeline.extract(run, ledger, connections.artifacts(), lambda: source).run_id


def done(run_id: str, failed: int) -> None:
    """End a run in the ledger."""
    from llm_batch import connections

    ledger = connections.ledger()
    ledger.finish_run(run_id, loaded=ledger.run(run_id).rows - failed, failed=failed)


def test_close_looks_again_after_the_yes(open_run: str, say: Said, yes_after: Any) -> None:
    """A run of which a task was cleared while somebody thought is not closed."""
    replace(open_run)
    assert say("cancel", open_run, "--yes")[0] == OK
    yes_after(lambda: set_airflow_state("manual__1", "running"))

    code, said = say("close", open_run)

    assert code == FAILED
    assert "Airflow run manual__1 of DAG ticket_triage works on it and has not ended" in said
    assert "close" not in say("show", open_run, "--json")[1]


def test_erase_looks_again_after_the_yes(open_run: str, say: Said, yes_after: Any) -> None:
    """A run that has come to have the row while somebody thought still needs it."""
    from llm_batch import connections

    done(open_run, failed=0)
    artifacts, run = connections.artifacts(), connections.ledger().run(open_run)
    key = first_key(run)
    yes_after(lambda: extracted_again(open_run))

    code, said = say("erase", run.job, key)

    assert (code, "is open and has this row" in said) == (FAILED, True)
    assert list(artifacts.files(run.directory)) != []


def first_key(run: Any) -> str:
    """The key of the first row of a run's snapshot."""
    import pyarrow.parquet as pq
    from llm_batch import connections

    from include.snapshot import Snapshot

    with connections.artifacts().open(Snapshot.from_json(run.snapshot).path) as stream:
        return str(pq.read_table(stream, columns=["ticket_id"])["ticket_id"][0].as_py())


def test_a_redrive_looks_again_after_the_yes(open_run: str, say: Said, yes_after: Any) -> None:
    """The partition has begun to run again while somebody thought."""
    done(open_run, failed=2)
    yes_after(lambda: begun_again(open_run))

    code, said = say("redrive", "ticket_triage", "2026-11-04")

    assert (code, "is not finished" in said) == (FAILED, True)


def begun_again(run_id: str) -> None:
    """Open the next generation of a run."""
    from llm_batch import connections

    from include import pipeline
    from include.ledger_records import Partition

    ledger = connections.ledger()
    run = ledger.run(run_id)
    partition = Partition(run.job, run.interval_start, run.interval_end)
    pipeline.open_run(
        ledger,
        pipeline.pinned(run),
        partition,
        mode=run.mode,
        dag_id=run.dag_id,
        dag_run_id="manual__2",
    )

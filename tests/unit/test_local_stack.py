"""The local stack's environment, databases, progress and judgement; no process is started."""

from __future__ import annotations

import io
import json
import socket
import sqlite3
import stat
import subprocess
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import pytest
import sqlalchemy as sa
from cryptography.fernet import Fernet

from include.backfill_estimate import IntervalEstimate
from include.errors import ConfigurationError
from include.job_spec import load_job, with_overrides
from include.local_stack import __main__, commands, environment, session, showing
from include.local_stack.backfill import Days, How
from include.local_stack.databases import engine_of
from include.local_stack.estimate_table import estimate_lines
from include.local_stack.progress import DayProgress, Screen, _fitting
from include.local_stack.rest import (
    AirflowApiError,
    AirflowClient,
    DagRun,
    WaitTimeoutError,
    wait_until,
)
from include.local_stack.stack import home_lock
from include.local_stack.stack_state import running_stack, write_state
from include.local_stack.summary import DaySummary, table_text
from include.local_stack.task_errors import error_lines

HOME = Path("/somewhere/.demo")


def _environment(home: Path, **caller: str) -> dict[str, str]:
    return environment.stack_environment(home, 4711, base=caller)


def _day(**values: object) -> DaySummary:
    whole = {"day": "2026-11-01", "state": "success", "rows": 10, "loaded": 7, "failed": 1}
    return DaySummary(**{**whole, "reused": 2, **values})  # type: ignore[arg-type]


def test_secrets_are_made_once_and_kept_private(tmp_path: Path) -> None:
    """A second start finds the keys of the first; only their owner may read them."""
    first = environment.load_secrets(tmp_path)
    second = environment.load_secrets(tmp_path)

    assert first == second
    assert stat.S_IMODE((tmp_path / "secrets.json").stat().st_mode) == 0o600


def test_secrets_are_strong_enough(tmp_path: Path) -> None:
    """The signing key has at least 64 bytes, the Fernet key is one, and no home shares them."""
    keys = environment.load_secrets(tmp_path / "a")
    other = environment.load_secrets(tmp_path / "b")

    assert len(keys["AIRFLOW__API_AUTH__JWT_SECRET"].encode()) >= 64
    assert Fernet(keys["AIRFLOW__CORE__FERNET_KEY"])
    assert not set(keys.values()) & set(other.values())


def test_all_addresses_are_the_same_port_of_this_machine(tmp_path: Path) -> None:
    """The server, its base URL and the execution API agree, on 127.0.0.1."""
    env = _environment(tmp_path)

    assert env["AIRFLOW__API__HOST"] == "127.0.0.1"
    assert env["AIRFLOW__API__BASE_URL"] == "http://127.0.0.1:4711"
    execution = env["AIRFLOW__CORE__EXECUTION_API_SERVER_URL"]
    assert execution == "http://127.0.0.1:4711/execution/"
    assert env["AIRFLOW__API__PORT"] == "4711"


def test_connections_of_the_caller_stay(tmp_path: Path) -> None:
    """Only connections that the caller does not have point into the home."""
    env = _environment(tmp_path, AIRFLOW_CONN_RESULTS_DB="postgresql://somewhere/results")

    assert env["AIRFLOW_CONN_RESULTS_DB"] == "postgresql://somewhere/results"
    assert json.loads(env["AIRFLOW_CONN_SOURCE_DB"])["host"] == str(tmp_path / "data/source.db")
    assert "AIRFLOW_CONN_OPENAI_DEFAULT" not in env


def test_places_of_the_caller_do_not_leak_in(tmp_path: Path) -> None:
    """Another Airflow's home, DAG folder or database in the environment has no effect."""
    env = _environment(
        tmp_path,
        AIRFLOW_HOME="/other",
        AIRFLOW__CORE__DAGS_FOLDER="/other/dags",
        AIRFLOW__DATABASE__SQL_ALCHEMY_CONN="postgresql://other/airflow",
    )

    assert not [name for name, value in env.items() if "other" in value]


def test_extra_wins_over_everything(tmp_path: Path) -> None:
    """A test can change any setting."""
    env = environment.stack_environment(
        tmp_path, 4711, base={}, extra={"AIRFLOW__CORE__PARALLELISM": "2"}
    )

    assert env["AIRFLOW__CORE__PARALLELISM"] == "2"


def test_loopback_never_goes_through_a_proxy(tmp_path: Path) -> None:
    """What the caller excludes stays excluded, and 127.0.0.1 with it."""
    env = _environment(tmp_path, no_proxy="intranet.example", http_proxy="http://proxy:3128")

    assert env["NO_PROXY"] == env["no_proxy"] == "intranet.example,127.0.0.1,localhost"


@pytest.mark.parametrize(
    ("value", "url"),
    [
        (environment.sqlite_connection(HOME / "x y.db"), "sqlite:////somewhere/.demo/x y.db"),
        ("sqlite://%2Fsomewhere%2Fx.db", "sqlite:////somewhere/x.db"),
        ("postgres://me:pw@db:5433/shop", "postgresql+psycopg://me:pw@db:5433/shop"),
        ("postgresql://me@db/shop?sslmode=require", None),
        (
            (
                '{"conn_type": "postgres", "login": "me", "password": "p@w", "host": "db", '
                '"schema": "shop"}'
            ),
            "postgresql+psycopg://me:p%40w@db/shop",
        ),
    ],
)
def test_airflow_connections_become_engines(
    value: str, url: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both of Airflow's forms are understood; options of a URI stay."""
    monkeypatch.setattr(Path, "mkdir", lambda *_args, **_kwargs: None)
    engine = engine_of({"AIRFLOW_CONN_SOURCE_DB": value}, "source_db")

    expected = url or "postgresql+psycopg://me@db/shop?sslmode=require"
    assert engine.url.render_as_string(hide_password=False) == expected


@pytest.mark.parametrize("value", ["mysql://me:canary@db/x", '{"conn_type": "s3"}'])
def test_unknown_connection_is_named_but_not_shown(value: str) -> None:
    """The error names the variable and the type, never the login."""
    with pytest.raises(ConfigurationError) as caught:
        engine_of({"AIRFLOW_CONN_SOURCE_DB": value}, "source_db")

    assert "AIRFLOW_CONN_SOURCE_DB" in str(caught.value)
    assert "canary" not in str(caught.value)


def test_only_one_stack_per_home(tmp_path: Path) -> None:
    """A home in use is refused, and free again once its owner has ended."""
    with home_lock(tmp_path), pytest.raises(ConfigurationError, match="already runs"):
        home_lock(tmp_path)
    home_lock(tmp_path).close()


def test_taken_port_is_seen() -> None:
    """A port with a listener is not free; after it closes, it is."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]

        assert not environment.is_port_free(port)
    assert environment.is_port_free(port)


def test_wait_says_what_it_waited_for() -> None:
    """A wait ends in time, and its error names the thing."""
    with pytest.raises(WaitTimeoutError, match="for the moon"):
        wait_until("the moon", 0.01, lambda: None, interval=0.001)


def test_clean_deletes_only_a_home(tmp_path: Path) -> None:
    """A folder that no stack has made is left alone."""
    (tmp_path / "precious").write_text("data")
    with pytest.raises(ConfigurationError, match="does not look like"):
        commands.clean(tmp_path)
    environment.load_secrets(tmp_path)
    commands.clean(tmp_path)

    assert not tmp_path.exists()


def test_clean_refuses_a_home_in_use(tmp_path: Path) -> None:
    """A running stack keeps its files."""
    environment.load_secrets(tmp_path)
    with home_lock(tmp_path), pytest.raises(ConfigurationError, match="already runs"):
        commands.clean(tmp_path)

    assert (tmp_path / "secrets.json").exists()


def test_range_that_ends_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line says what is wrong, exits with 1 and starts nothing."""
    code = __main__.main(
        ["demo", "--from", "2026-11-03", "--to", "2026-11-01", "--home", str(tmp_path)]
    )

    assert code == 1
    assert "ends (2026-11-01) before it begins (2026-11-03)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_days_count_both_ends() -> None:
    """A range of one day has one day; its bounds are its first and its last moment in UTC."""
    days = Days("job", date(2026, 11, 1), date(2026, 11, 1))

    assert days.count == 1
    assert days.bounds[0].isoformat() == "2026-11-01T00:00:00+00:00"
    assert days.bounds[1].isoformat() == "2026-11-01T23:59:59.999999+00:00"


def test_days_are_those_of_the_schedule() -> None:
    """In Berlin, the day on which clocks go forward has 23 hours."""
    day = date(2026, 3, 29)
    first, last = Days("job", day, day, "Europe/Berlin").bounds

    assert first.isoformat() == "2026-03-28T23:00:00+00:00"
    assert last.isoformat() == "2026-03-29T21:59:59.999999+00:00"


def test_a_backfill_is_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every word of the command line reaches the order; the same days share one spend limit."""
    orders: list[commands.Order] = []
    monkeypatch.setattr(commands, "backfill", lambda order: orders.append(order) or 0)
    words = ["--budget", "2.50", "--reprocess", "failed", "--backwards", "--runs", "3", "--dry-run"]

    __main__.main(["backfill", "--job", "commit_labels", "--home", "/h", *words])

    (order,) = orders
    assert order.how == How("failed", backwards=True, max_active_runs=3)
    assert order.dry_run
    name = "backfill commit_labels 2026-11-01 2026-11-03"
    assert order.conf == {"spend_limit": {"name": name, "max_usd": "2.50"}}


def test_a_budget_is_an_amount(capsys: pytest.CaptureFixture[str]) -> None:
    """A budget that is no number of dollars is refused before anything is looked at."""
    with pytest.raises(SystemExit):
        __main__.main(["backfill", "--budget", "much"])

    assert "no amount of dollars" in capsys.readouterr().err


def test_an_estimate_is_a_line_per_interval_and_a_total() -> None:
    """Money that is unknown for one interval is unknown in the total, not too small."""
    start = datetime(2026, 11, 1, tzinfo=UTC)
    days = [
        IntervalEstimate(start, start, 5, 3, 1, 1, 1, 1_234, cost, cost)
        for cost in (Decimal("0.5"), None)
    ]
    lines = list(estimate_lines(days))

    assert lines[2].split() == [
        "2026-11-01", "00:00", "5", "1", "1", "3", "1", "1,234", "$0.5000", "$0.5000"
    ]  # fmt: skip
    assert lines[-1].split() == ["total", "10", "2", "2", "6", "2", "2,468", "unknown", "unknown"]
    assert list(estimate_lines(days[:1]))[-1].endswith("$0.5000")


def test_a_dry_run_tells_that_the_runs_would_not_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bound without a price: first what it would send, then what is missing."""
    monkeypatch.setattr(session, "intervals_of", lambda *_a, **_k: [])
    monkeypatch.setattr(session, "Estimates", lambda *_a: None)
    spec = load_job("ticket_triage")
    opened = session.Session(
        client=_refusing(404),
        spec=with_overrides(spec, model="gpt-nobody-knows"),
        jobs=HOME,
        ledger=None,  # type: ignore[arg-type]
        artifacts=None,  # type: ignore[arg-type]
        source=lambda: None,  # type: ignore[arg-type,return-value]
        target=None,  # type: ignore[arg-type]
        logs=HOME,
        simulator_url=None,
    )

    with pytest.raises(ConfigurationError, match="price of its model gpt-nobody-knows"):
        opened.estimate(
            Days("ticket_triage", date(2026, 11, 1), date(2026, 11, 1)), conf={}, reprocess="none"
        )
    assert "total" in capsys.readouterr().out


def test_an_integer_beside_a_null_is_an_integer() -> None:
    """Rows are shown as they are in the table: 25, not 25.0; a null is a dash."""
    engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE ticket_labels (id INTEGER, number INTEGER)")
        connection.exec_driver_sql("INSERT INTO ticket_labels VALUES (1, 25), (2, NULL)")

    shown = showing.result_rows(engine, load_job("ticket_triage"))

    assert [line.split() for line in shown.splitlines()] == [
        ["id", "number"],
        ["1", "25"],
        ["2", "-"],
    ]


def test_whole_day_has_no_problem() -> None:
    """Loaded, failed and reused rows together are all rows."""
    assert _day().problems == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"state": "failed"}, "ended as failed"),
        ({"loaded": 6}, "10 rows, but 9"),
        ({"missing_keys": 1}, "1 key is in neither table"),
    ],
)
def test_each_loss_is_a_problem(change: dict[str, object], told: str) -> None:
    """A failed run, a lost row and a lost key are each enough."""
    assert told in " ".join(_day(**change).problems)


def test_a_failed_run_says_once_what_it_has_left_open() -> None:
    """Rows and keys of a run that did not end are the same loss."""
    day = _day(state="failed, OPEN", loaded=3, missing_keys=4)

    assert day.problems == [
        "2026-11-01: the run ended as failed, OPEN, 4 of 10 rows neither loaded nor failed"
    ]


class _Tasks:
    """Airflow's answer about the tasks of each run."""

    def __init__(self, *tasks: tuple[str, int, str]) -> None:
        self._tasks = [
            {"task_id": name, "map_index": index, "state": state, "try_number": 2}
            for name, index, state in tasks
        ]

    def task_instances(self, _dag_id: str, _run_id: str) -> list[dict[str, object]]:
        return self._tasks


def test_the_error_of_a_failed_task_is_told_once(tmp_path: Path) -> None:
    """The same error on several days is one line; what a task overcame, or a log lacks, is none."""
    error = {"exc_type": "BudgetExceededError", "exc_value": "too much"}
    lines = [{"event": "a line"}, {"event": "failed", "error_detail": [error]}]
    for run in ("a", "b"):
        for task in ("task_id=build", "task_id=shard.wait/map_index=1", "task_id=mended"):
            log = tmp_path / f"dag_id=job/run_id={run}/{task}/attempt=2.log"
            log.parent.mkdir(parents=True)
            log.write_text("\n".join(map(json.dumps, lines)))
    client = _Tasks(("build", -1, "failed"), ("shard.wait", 1, "failed"), ("mended", -1, "success"),
                    ("lost", -1, "failed"))  # fmt: skip
    runs = [DagRun(name, state, None, None) for name, state in
            (("a", "failed"), ("b", "failed"), ("c", "success"))]  # fmt: skip

    assert error_lines(client, tmp_path, "job", runs) == [  # type: ignore[arg-type]
        "ERROR  build: BudgetExceededError: too much (2 times)",
        "ERROR  shard.wait: BudgetExceededError: too much (2 times)",
    ]


def _refusing(status: int) -> AirflowClient:
    client = AirflowClient("http://127.0.0.1:1")

    def refuse(*_arguments: object) -> None:
        raise AirflowApiError("no", status)

    client.call = refuse  # type: ignore[method-assign,assignment]
    return client


def test_a_backfill_that_was_rolled_back_is_cancelled() -> None:
    """After a 503, SQLite may take back a backfill that was listed a moment ago."""
    _refusing(404).cancel_backfill(4)
    _refusing(409).cancel_backfill(4)

    with pytest.raises(AirflowApiError):
        _refusing(403).cancel_backfill(4)


def test_a_dag_that_is_not_there_is_named() -> None:
    """Not the JSON of a 404, but where the file belongs."""
    with pytest.raises(ConfigurationError, match="no DAG review_topics"):
        _refusing(404).timezone("review_topics")


def test_a_connection_that_is_no_json_is_not_shown() -> None:
    """The error names the variable and the place in it, never the password."""
    broken = '{"conn_type": "postgres", password: "canary"}'

    with pytest.raises(ConfigurationError, match="AIRFLOW_CONN_X is no JSON") as error:
        engine_of({"AIRFLOW_CONN_X": broken}, "x")

    assert "canary" not in str(error.value)


def test_unknown_cost_is_not_zero() -> None:
    """One day without a price makes the total unknown, and both are shown so."""
    text = table_text([_day(cost=Decimal("0.5"), realtime=Decimal(1)), _day(cost=None)])

    assert "$0.5000" in text
    assert text.splitlines()[-1].split()[-2:] == ["unknown", "unknown"]


def test_total_adds_the_days() -> None:
    """The last line holds the sums."""
    text = table_text([_day(cost=Decimal("0.1"), realtime=Decimal("0.2"))] * 2)

    cells = text.splitlines()[-1].split()
    assert cells[:5] == ["total", "20", "14", "2", "4"]
    assert cells[-2:] == ["$0.2000", "$0.4000"]


def _progress(day: int, state: str = "running", done: int = 0) -> DayProgress:
    return DayProgress(f"2026-11-{day:02d}", state, 1, done, 0, 100, Decimal(0))


def test_log_shows_only_what_changed() -> None:
    """Without a terminal, a day's line comes again only when it says something new."""
    out = io.StringIO()
    screen = Screen(out)
    for done in (0, 0, 5):
        screen._next = 0.0
        screen.show([_progress(1, done=done), _progress(2)])

    assert [line[:10] for line in out.getvalue().splitlines()] == [
        "2026-11-01",
        "2026-11-02",
        "2026-11-01",
    ]


def test_many_days_fit_on_a_small_terminal() -> None:
    """Days that still move are shown first, the others counted."""
    days = [*(_progress(day, "success") for day in range(1, 9)), _progress(9), _progress(10)]
    lines = _fitting(days, 4)

    assert len(lines) == 4
    assert [line[:10] for line in lines[:2]] == ["2026-11-09", "2026-11-10"]
    assert lines[-1] == "... 8 of 10 days are done"


def test_a_redrive_is_one_day_with_one_param(monkeypatch: pytest.MonkeyPatch) -> None:
    """`redrive` processes exactly its day, and asks for nothing but the failed rows."""
    orders: list[commands.Order] = []
    monkeypatch.setattr(commands, "backfill", lambda order: orders.append(order) or 0)

    __main__.main(["redrive", "--job", "commit_labels", "--day", "2026-11-02", "--home", "/h"])

    (order,) = orders
    day = date(2026, 11, 2)
    assert order == commands.Order(Days("commit_labels", day, day), None, Path("/h"), redrive=True)
    assert order.conf == {"redrive": True}


def test_a_backfill_asks_for_no_redrive() -> None:
    """The params of an ordinary run are empty, or name the model."""
    days = Days("job", date(2026, 11, 1), date(2026, 11, 1))

    assert commands.Order(days, None, HOME).conf == {}
    assert commands.Order(days, "gpt-5-nano", HOME).conf == {"model": "gpt-5-nano"}


def test_a_redrive_needs_a_stack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without `make up` the command says so and exits with 1."""
    code = __main__.main(["redrive", "--day", "2026-11-02", "--home", str(tmp_path)])

    assert code == 1
    assert "start one with `make up`" in capsys.readouterr().err


def test_jobs_of_the_caller_are_read(tmp_path: Path) -> None:
    """The command line reads jobs where Airflow reads them."""
    assert environment.jobs_root({}).name == "jobs"
    assert environment.jobs_root({"AIRFLOW__LLM_BATCH__JOBS": str(tmp_path)}) == tmp_path


def test_on_call_asks_the_airflow_that_up_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `make up DATABASE=…`, the commands look into that database, not into a SQLite file."""
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(
        subprocess,
        "run",
        lambda *_args, env, **_rest: seen.append(env) or subprocess.CompletedProcess([], 0),
    )
    database = "postgresql+psycopg2://db/airflow"
    write_state(
        tmp_path, {"url": "http://127.0.0.1:1", "simulator_url": None, "database": database}
    )

    commands.on_call(tmp_path, ["status"])

    (env,) = seen
    assert env["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"] == database
    assert stat.S_IMODE((tmp_path / "stack.json").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("there", "here", "told"),
    [
        ("AIRFLOW_CONN_LLM_BATCH_DB", None, "started with AIRFLOW_CONN_LLM_BATCH_DB"),
        (None, "AIRFLOW_CONN_RESULTS_DB", "started without AIRFLOW_CONN_RESULTS_DB"),
        ("AIRFLOW__LLM_BATCH__JOBS", None, "started with AIRFLOW__LLM_BATCH__JOBS"),
        ("AIRFLOW_CONN_SOURCE_DB", "AIRFLOW_CONN_SOURCE_DB", None),
        (None, "AIRFLOW_CONN_SOMETHING", None),
    ],
)
def test_a_terminal_with_other_connections_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    there: str | None,
    here: str | None,
    told: str | None,
) -> None:
    """A command would else read another ledger, and find nothing wrong in it."""
    for name in environment.default_connections(tmp_path):
        monkeypatch.delenv(name, raising=False)
    if there:
        monkeypatch.setenv(there, "canary")
    write_state(tmp_path, {"url": "http://127.0.0.1:1"})
    if there:
        monkeypatch.delenv(there)
    if here:
        monkeypatch.setenv(here, "canary")

    if told is None:
        assert running_stack(tmp_path)["url"] == "http://127.0.0.1:1"
    else:
        with pytest.raises(ConfigurationError, match=told):
            running_stack(tmp_path)
    assert "canary" not in (tmp_path / "stack.json").read_text()


def test_a_source_of_the_caller_gets_no_sample_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo reads a caller's own database and makes no table in it."""
    source = tmp_path / "mine.db"
    sqlite3.connect(source).close()
    monkeypatch.setenv("AIRFLOW_CONN_SOURCE_DB", environment.sqlite_connection(source))

    commands._prepare(tmp_path / "home")

    with sqlite3.connect(source) as connection:
        assert not connection.execute("SELECT name FROM sqlite_master").fetchall()

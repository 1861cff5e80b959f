"""The local stack's environment, databases, progress and judgement; no process is started."""

from __future__ import annotations

import io
import json
import socket
import stat
from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from include.errors import ConfigurationError
from include.local_stack import __main__, commands, environment
from include.local_stack.backfill import Days
from include.local_stack.databases import engine_of
from include.local_stack.progress import DayProgress, Screen, _fitting
from include.local_stack.rest import WaitTimeoutError, wait_until
from include.local_stack.stack import home_lock
from include.local_stack.summary import DaySummary, table_text

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


def test_range_that_ends_before_it_begins(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The command line says what is wrong, exits with 1 and starts nothing."""
    code = __main__.main(
        ["demo", "--from", "2026-11-03", "--to", "2026-11-01", "--home", str(tmp_path)]
    )

    assert code == 1
    assert "ends (2026-11-01) before it begins (2026-11-03)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_days_count_both_ends() -> None:
    """A range of one day has one day; its bounds are midnights in UTC."""
    days = Days("job", date(2026, 11, 1), date(2026, 11, 1))

    assert days.count == 1
    assert days.bounds[0].isoformat() == "2026-11-01T00:00:00+00:00"


def test_whole_day_has_no_problem() -> None:
    """Loaded, failed and reused rows together are all rows."""
    assert _day().problems == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"state": "failed"}, "ended as failed"),
        ({"loaded": 6}, "10 rows, but 9"),
        ({"missing_keys": 1}, "1 keys are in neither table"),
    ],
)
def test_each_loss_is_a_problem(change: dict[str, object], told: str) -> None:
    """A failed run, a lost row and a lost key are each enough."""
    assert told in " ".join(_day(**change).problems)


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


def test_a_redrive_needs_a_stack(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Without `make up` the command says so and exits with 1."""
    code = __main__.main(["redrive", "--day", "2026-11-02", "--home", str(tmp_path)])

    assert code == 1
    assert "start one with `make up`" in capsys.readouterr().err


def test_jobs_of_the_caller_are_read(tmp_path: Path) -> None:
    """The command line reads jobs where Airflow reads them."""
    assert environment.jobs_root({}).name == "jobs"
    assert environment.jobs_root({"AIRFLOW__LLM_BATCH__JOBS": str(tmp_path)}) == tmp_path

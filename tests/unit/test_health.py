"""Each thing that can be wrong with an installation is named, and how to mend it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import openai
import pytest
import sqlalchemy as sa

from include import ledger_database
from include.artifacts import Artifacts
from include.errors import ConfigurationError
from include.health import Check, Level, api_checks, artifacts_checks, database_checks
from include.health import ledger_checks as checks_of
from include.ledger import Ledger
from include.ledger_records import now
from include.simulator.process import Simulator

KEY = "sk-canary-1f0a"


def client(base_url: str, key: str = KEY) -> openai.OpenAI:
    """A client as the connection's hook makes it."""
    return openai.OpenAI(api_key=key, base_url=base_url)


def sqlite(tmp_path: Path) -> sa.Engine:
    """An engine on an empty database."""
    return sa.create_engine(f"sqlite:///{tmp_path}/ledger.db")


def skewed(skew: timedelta) -> datetime:
    """What a wrong clock says."""
    return now() + skew


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port on which nobody listens; it is held, so that nobody else can begin to."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield int(holder.getsockname()[1])


def only(checks: list[Check]) -> Check:
    """The one check."""
    (found,) = checks
    return found


def test_a_migrated_ledger_is_fine_and_left_as_it_was(tmp_path: Path) -> None:
    """The check writes and takes it back."""
    engine = sqlite(tmp_path)
    ledger = Ledger(engine)

    assert only(checks_of(engine)).level == Level.OK
    assert ledger.history("doctor") == []


def test_a_ledger_that_is_not_migrated_is_named(tmp_path: Path) -> None:
    """An empty database is told, with the command that mends it, and stays empty."""
    engine = sqlite(tmp_path)

    found = only(checks_of(engine))

    assert found.level == Level.BAD
    assert "is not migrated: it is at none" in found.found
    assert "python -m llm_batch migrate" in found.mend
    assert sa.inspect(engine).get_table_names() == []


def test_a_ledger_of_a_newer_release_is_named(tmp_path: Path) -> None:
    """What an older release must not touch is told as such."""
    engine = sqlite(tmp_path)
    Ledger(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE llm_batch_version SET version_num = '9999'")

    assert "A newer release has migrated it" in only(checks_of(engine)).mend
    with pytest.raises(ConfigurationError, match="Run the newer release again"):
        ledger_database.check(engine)


def test_a_ledger_that_is_away_is_named(closed_port: int) -> None:
    """No server listens there; the password of the URL is not shown."""
    url = f"postgresql+psycopg2://u:{KEY}@127.0.0.1:{closed_port}/x"

    found = only(checks_of(sa.create_engine(url)))

    assert found.level == Level.BAD
    assert KEY not in found.found


def test_people_who_look_do_not_migrate(tmp_path: Path) -> None:
    """A checkout on a desk never upgrades the ledger of running workers."""
    engine = sqlite(tmp_path)

    with pytest.raises(ConfigurationError, match="at migration none"):
        ledger_database.check(engine)
    assert sa.inspect(engine).get_table_names() == []


def test_artifacts_that_can_be_written(tmp_path: Path) -> None:
    """The probe leaves nothing behind."""
    found = only(artifacts_checks(Artifacts(tmp_path)))

    assert "can be written" in found.found
    assert list(tmp_path.iterdir()) == []


def test_artifacts_that_cannot_be_written(tmp_path: Path) -> None:
    """A root below a file takes nothing; that holds for every user, root too."""
    (tmp_path / "file").write_text("")

    found = only(artifacts_checks(Artifacts(tmp_path / "file" / "artifacts")))

    assert found.level == Level.BAD
    assert "is not writable" in found.found


def test_a_right_key(tmp_path: Path) -> None:
    """The API answers and takes the key, and its clock is ours."""
    with Simulator.start(tmp_path, instant=True, key=KEY) as simulator:
        found = api_checks(client(simulator.base_url), "openai_default")

    assert [one.level for one in found] == [Level.OK, Level.OK]


def test_a_wrong_key(tmp_path: Path) -> None:
    """A refused key is named as such, and never shown."""
    with Simulator.start(tmp_path, instant=True, key="sk-another") as simulator:
        found = only(api_checks(client(simulator.base_url), "openai_default"))

    assert found.level == Level.BAD
    assert "the key is wrong" in found.found
    assert KEY not in f"{found}"


def test_an_unreachable_server(closed_port: int) -> None:
    """A closed port is told apart from a refusal."""
    found = only(api_checks(client(f"http://127.0.0.1:{closed_port}/v1"), "openai_default"))

    assert found.level == Level.BAD
    assert "cannot be reached" in found.found


def test_a_host_without_the_api(simulator: Simulator) -> None:
    """A host whose /v1 was forgotten is told."""
    found = only(api_checks(client(simulator.url), "openai_default"))

    assert "there is no Files and Batches API" in found.found
    assert "ends in /v1" in found.mend


def test_a_clock_that_is_wrong(simulator: Simulator) -> None:
    """Ten minutes beside the API's clock, a lost batch would not be found any more."""
    api = client(simulator.base_url)

    levels = [
        api_checks(api, "openai_default", clock=partial(skewed, skew))[1].level
        for skew in (timedelta(0), timedelta(minutes=3), timedelta(minutes=-11))
    ]

    assert levels == [Level.OK, Level.WARNING, Level.BAD]


def test_a_target_without_the_right_to_create(empty_postgres_url: str, postgres_role: str) -> None:
    """A role that may connect, but not create the job's tables."""
    reader = sa.create_engine(sa.make_url(empty_postgres_url).set(username=postgres_role))

    found = only(database_checks(reader, "results_db", is_target=True))
    reader.dispose()

    assert found.level == Level.WARNING
    assert "may not create tables" in found.found

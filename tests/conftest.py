"""What several test modules need: services of the machine, and a simulator."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

if TYPE_CHECKING:
    from include.simulator.process import Simulator

POSTGRES = "LLM_BATCH_TEST_POSTGRES"
POSTGRES_DEFAULT = "postgresql://root@127.0.0.1:5432/postgres"

Missing = Callable[[str], None]


@pytest.fixture(scope="session")
def missing() -> Missing:
    """Call it with what is missing: skips the test on a desk, fails it where CI is set."""

    def say(what: str) -> None:
        if os.environ.get("CI"):
            pytest.fail(f"{what}, and CI is set: no service test may be skipped")
        pytest.skip(what)

    return say


@pytest.fixture(scope="session")
def postgres_url(missing: Missing) -> Iterator[str]:
    """The SQLAlchemy URL of a database of this test session, dropped at its end.

    The server is that of LLM_BATCH_TEST_POSTGRES (a URL whose user may create databases).
    """
    server = sa.make_url(os.environ.get(POSTGRES, POSTGRES_DEFAULT))
    server = server.set(drivername="postgresql+psycopg")
    name = f"llm_batch_test_{os.getpid()}_{secrets.token_hex(4)}"
    admin = sa.create_engine(
        server, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": 3}
    )
    try:
        with admin.connect() as connection:
            connection.exec_driver_sql(f'CREATE DATABASE "{name}"')
    except sa.exc.OperationalError:
        missing(f"no PostgreSQL at {server.host}:{server.port}; {POSTGRES} names another one")
    yield server.set(database=name).render_as_string(hide_password=False)
    with admin.connect() as connection:
        connection.exec_driver_sql(f'DROP DATABASE "{name}" WITH (FORCE)')
    admin.dispose()


@pytest.fixture
def simulator(tmp_path: Path) -> Iterator[Simulator]:
    """A running simulator with a state of its own."""
    from include.simulator.process import Simulator

    running = Simulator.start(tmp_path / "simulator")
    yield running
    running.stop()

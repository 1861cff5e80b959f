"""The stacks of these tests see only what the tests give them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.conftest import Missing
from tests.system.postgres_server import PostgresServer, server_programs


@pytest.fixture(scope="module", autouse=True)
def _no_settings_of_others() -> Iterator[None]:
    """Take Airflow's settings, connections and variables out of the environment meanwhile."""
    found = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("AIRFLOW")}
    yield
    os.environ.update(found)


@pytest.fixture(scope="module")
def database(missing: Missing) -> Iterator[PostgresServer]:
    """A PostgreSQL server that the tests of a module may do anything with."""
    programs = server_programs()
    if programs is None:
        missing("no PostgreSQL server is installed: no initdb on the PATH or in /usr/lib")
    server = PostgresServer(programs)
    yield server
    server.remove()

"""What several test modules need: services of the machine, and a simulator."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from include.simulator.process import Simulator

POSTGRES = "LLM_BATCH_TEST_POSTGRES"
POSTGRES_DEFAULT = "postgresql://root@127.0.0.1:5432/postgres"

# A busy machine must not fail a property.
settings.register_profile("project", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")

Missing = Callable[[str], None]


def pytest_xdist_auto_num_workers() -> int:
    """One more than cores: most tests wait for another process much of their time."""
    return (os.cpu_count() or 1) + 1


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
        server, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": 30}
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


def empty(url: str) -> str:
    """Make the PostgreSQL database like a new one, whatever an earlier test has left in it."""
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL lock_timeout = '60s'")  # to be told, not to hang
        connection.exec_driver_sql("DROP SCHEMA public CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA public")
        connection.exec_driver_sql("GRANT USAGE ON SCHEMA public TO PUBLIC")
    engine.dispose()
    return url


@pytest.fixture(scope="session")
def emptied_postgres_url(postgres_url: str) -> Callable[[], str]:
    """Call it to empty the database of this test session, and for its URL."""
    return lambda: empty(postgres_url)


@pytest.fixture
def empty_postgres_url(emptied_postgres_url: Callable[[], str]) -> Iterator[str]:
    """The URL of the database of this test session, which is empty before and after."""
    yield emptied_postgres_url()
    emptied_postgres_url()


@pytest.fixture
def postgres_role(postgres_url: str) -> Iterator[str]:
    """A role that may connect and no more; roles are the server's, which other tests share."""
    admin = sa.create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    name = f"llm_batch_reader_{secrets.token_hex(4)}"
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {name} LOGIN")
    yield name
    with admin.connect() as connection:
        connection.exec_driver_sql(f"DROP ROLE {name}")
    admin.dispose()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def empty_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    """An empty database, once of each kind."""
    if request.param == "sqlite":
        engine = sa.create_engine(f"sqlite:///{tmp_path}/empty.db")
    else:
        engine = sa.create_engine(request.getfixturevalue("empty_postgres_url"))
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def empty_ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite ledger to copy: to migrate one for each test would take most of the time."""
    from include.ledger import Ledger

    path = tmp_path_factory.mktemp("empty") / "ledger.db"
    Ledger(sa.create_engine(f"sqlite:///{path}")).engine.dispose()
    return path


@pytest.fixture
def simulator(tmp_path: Path) -> Iterator[Simulator]:
    """A running simulator with a state of its own."""
    from include.simulator.process import Simulator

    running = Simulator.start(tmp_path / "simulator")
    yield running
    running.stop()


@dataclass(frozen=True)
class S3Server:
    """A server that speaks S3 over HTTP; `environment` is what another process needs for it."""

    endpoint: str

    @property
    def environment(self) -> dict[str, str]:
        """The variables that boto, s3fs and pyarrow read."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test-key",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def bucket(self) -> str:
        """Make a new bucket and return its URI, such as `s3://bucket-1f2e`."""
        import boto3

        name = f"bucket-{secrets.token_hex(4)}"
        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id="test-key",
            aws_secret_access_key="test-secret",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=name)
        return f"s3://{name}"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A running S3 server without the environment that leads there; see `s3_bucket`."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not a line per call
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield S3Server(f"http://{host}:{port}")
    server.stop()


@pytest.fixture
def s3_bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URI of an empty bucket; `s3://` leads to its server in this test and its processes."""
    from s3fs import S3FileSystem

    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    yield s3_server.bucket()
    S3FileSystem.clear_instance_cache()

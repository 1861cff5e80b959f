"""A PostgreSQL server of the tests' own, which they may restart in the middle of a run."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import sqlalchemy as sa

from include.local_stack.environment import free_port

DEBIAN = Path("/usr/lib/postgresql")  # Debian keeps the server's programs off the PATH
WAIT = "180"  # seconds for a start or a stop
UNPRIVILEGED = ("postgres", "nobody")  # initdb refuses to run as root


class PostgresServer:
    """A new cluster on 127.0.0.1, without durability beyond what a restart needs."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self._folder = Path(tempfile.mkdtemp(prefix="llm_batch_postgres_"))
        self._port = free_port()
        self._user = _unprivileged_user()
        if self._user is not None:
            shutil.chown(self._folder, self._user)
        self._data = self._folder / "data"
        self._run("initdb", "-D", str(self._data), "-U", "airflow", "--auth=trust", "-E", "UTF8")
        options = f"port={self._port}\nunix_socket_directories='{self._folder}'\n"
        options += "listen_addresses='127.0.0.1'\nmax_connections=200\n"
        self._append(options)
        self.start()

    @property
    def url(self) -> str:
        """The SQLAlchemy URL of its database, psycopg 3 as the driver."""
        return f"postgresql+psycopg://airflow@127.0.0.1:{self._port}/postgres"

    @property
    def airflow_url(self) -> str:
        """The SQLAlchemy URL that Airflow takes for its metadata."""
        return self.url.replace("+psycopg", "+psycopg2")

    @property
    def airflow_connection(self) -> str:
        """The URI of an Airflow connection of type `postgres`."""
        return self.url.replace("+psycopg", "")

    def start(self) -> None:
        """Start and wait until it takes connections."""
        self._control("start", "-w", "-t", WAIT, "-l", str(self._folder / "server.log"))

    def stop(self, mode: str) -> None:
        """Stop it: `immediate` is a crash, `fast` cuts all connections in good order."""
        self._control("stop", "-t", WAIT, "-m", mode)

    def started_at(self) -> datetime:
        """When the server that answers now was started."""
        engine = sa.create_engine(self.url, poolclass=sa.NullPool)
        with engine.connect() as connection:
            found: datetime = connection.scalar(sa.text("SELECT pg_postmaster_start_time()"))
        return found

    def is_at_work_for(self, ports: set[int]) -> bool:
        """Whether a client at one of these ports of this machine is in a transaction."""
        engine = sa.create_engine(self.url, poolclass=sa.NullPool)
        query = "SELECT client_port FROM pg_stat_activity WHERE xact_start IS NOT NULL"
        with engine.connect() as connection:
            return not ports.isdisjoint(connection.scalars(sa.text(query)))

    def remove(self) -> None:
        """Stop it, unless a test has left it stopped, and remove everything."""
        with suppress(subprocess.CalledProcessError):
            self.stop("immediate")
        shutil.rmtree(self._folder)

    def _control(self, *arguments: str) -> None:
        self._run("pg_ctl", "-D", str(self._data), *arguments)

    def _append(self, options: str) -> None:
        with (self._data / "postgresql.conf").open("a") as file:
            file.write(options)

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [str(self._programs / program), *arguments],
            user=self._user,
            cwd=self._folder,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # the server keeps what it is given: no pipe
            stderr=subprocess.DEVNULL,
            check=True,
            timeout=2 * float(WAIT),
        )


def server_programs() -> Path | None:
    """The folder with initdb and pg_ctl; None when no PostgreSQL server is installed."""
    on_path = shutil.which("initdb")
    if on_path:
        return Path(on_path).resolve().parent
    found = sorted(DEBIAN.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


def _unprivileged_user() -> str | None:
    if os.geteuid() != 0:
        return None
    known = {user.pw_name for user in pwd.getpwall()}
    return next(name for name in UNPRIVILEGED if name in known)

"""What docker-compose.yaml describes, as processes of this machine: no container engine needed.

Commands, environment, mounts and replicas are those of the file. Only host names, ports and the
root folder are other ones, and one worker has another name than the next (on one machine the name
of the host does not tell them apart).
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import sqlalchemy as sa
import yaml

from include import deployment_keys
from include.errors import LLMBatchError
from include.local_stack.component import (
    Component,
    kill_marked,
    stop_all,
)
from include.local_stack.environment import LOOPBACK, MARKER, PROJECT, free_port
from include.local_stack.rest import AirflowClient, wait_until

COMPOSE = PROJECT / "docker-compose.yaml"
ROOT = "/opt/airflow"
VARIABLE = re.compile(r"\$\$|\$\{(\w+)(?::([?-])([^}]*))?\}")
HEALTHY = ("metadatabase", "scheduler", "triggerer", "dag_processor")
AIRFLOW = ("api-server", "scheduler", "dag-processor", "triggerer", "worker")
PORTS = {"redis": 6379, "objects": 7070, "api-server": 8080, "simulator": 8765}
START_TIMEOUT = 420.0  # seconds
INIT_TIMEOUT = 600.0


class ComposeFile:
    """The services of the file, with the variables of an .env file put in."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables
        self._services = yaml.safe_load(COMPOSE.read_text())["services"]

    def command(self, service: str) -> list[str]:
        """The words of the command."""
        return [self._filled(word) for word in self._services[service]["command"]]

    def environment(self, service: str) -> dict[str, str]:
        """What `environment` sets."""
        settings = self._services[service]["environment"]
        return {name: self._filled(value) for name, value in settings.items()}

    def mounts(self, service: str) -> list[tuple[str, str]]:
        """Source and target of every volume."""
        return [tuple(one.split(":")[:2]) for one in self._services[service].get("volumes", [])]

    def names(self, service: str) -> list[str]:
        """One name per replica."""
        count = self._services[service].get("deploy", {}).get("replicas", 1)
        return [service] if count == 1 else [f"{service}-{one + 1}" for one in range(count)]

    def _filled(self, text: str) -> str:
        return VARIABLE.sub(self._value, text)

    def _value(self, use: re.Match[str]) -> str:
        if use[0] == "$$":
            return "$"
        name, how, word = use.groups()
        value = self._variables.get(name, "")
        if not value and how == "?":
            raise KeyError(f"{name}: {word}")
        return value or word or ""


class ComposeMachine:
    """The services of the compose file with its `demo` profile, running below `home`.

    `variables` are those of the .env file. `databases` are the names of the login and of two empty
    databases of the PostgreSQL server at `server`: "login", "airflow", "llm_batch". `dags` is
    mounted instead of the project's DAG folder; `extra` is added to the environment of every
    Airflow component.
    """

    def __init__(
        self,
        home: Path,
        *,
        variables: Mapping[str, str],
        server: sa.URL,
        databases: Mapping[str, str],
        dags: Path,
        extra: Mapping[str, str],
    ) -> None:
        self.home = home.resolve()
        self.variables = variables
        self.ports = {name: free_port() for name in PORTS}
        self._server, self._databases = server, databases
        self._file = ComposeFile(self.variables)
        self._dags, self._extra = dags, extra
        self.components: dict[str, Component] = {}
        self.client = AirflowClient(
            f"http://{LOOPBACK}:{self.ports['api-server']}",
            ("admin", self.variables["ADMIN_PASSWORD"]),
        )

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            undo.callback(self.stop)
            self._mount()
            self._start_services()
            self._run_init()
            for service in AIRFLOW:
                self._start(service)
            wait_until("healthy components", START_TIMEOUT, self._is_healthy)
            undo.pop_all()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop everything; afterwards no process of this home is left."""
        stop_all(self.components.values())
        kill_marked(self.home)

    def keep_running(self) -> None:
        """Start again what has ended by itself, as `restart: unless-stopped` of the file does."""
        for component in self.components.values():
            if not component.is_running:
                component.start()

    def url(self, service: str) -> str:
        """Where a service listens."""
        return f"http://{LOOPBACK}:{self.ports[service]}"

    def engine(self, database: str) -> sa.Engine:
        """One of the two databases, with the login that the services have."""
        return sa.create_engine(
            self._server.set(
                username=self._databases["login"],
                password=self.variables["POSTGRES_PASSWORD"],
                database=self._databases[database],
            )
        )

    def environment(self, service: str) -> dict[str, str]:
        """The environment of a service's processes: that of the file, on this machine."""
        settings = self._file.environment(service)
        ours = {name: self.here(value) for name, value in settings.items()}
        added = self._extra if service in {*AIRFLOW, "init"} else {}
        return {**self._machine(), **ours, **added}

    def here(self, text: str) -> str:
        """A text of the compose file with the places of this machine."""
        login = f"airflow:{self.variables['POSTGRES_PASSWORD']}"
        address = f"{self._server.host}:{self._server.port or 5432}"
        for database in ("airflow", "llm_batch"):
            there = f"{login.replace('airflow', self._databases['login'], 1)}@{address}"
            here = f"{there}/{self._databases[database]}"
            text = text.replace(f"{login}@postgres:5432/{database}", here)
        for service, port in PORTS.items():
            text = text.replace(f"{service}:{port}", f"{LOOPBACK}:{self.ports[service]}")
            text = text.replace(f"--port {port}", f"--port {self.ports[service]}")
        return text.replace(ROOT, str(self._root)).replace("0.0.0.0", LOOPBACK)  # noqa: S104

    @property
    def _root(self) -> Path:
        return self.home / "opt"

    def _machine(self) -> dict[str, str]:
        """What an image, its entrypoint and its network bring along."""
        return {
            MARKER: str(self.home),
            "SPT_NOENV": "1",  # setproctitle would write over the environment with the marker
            "AIRFLOW_HOME": str(self._root),
            "AIRFLOW__API__HOST": LOOPBACK,
            "AIRFLOW__API__PORT": str(self.ports["api-server"]),
            "HOME": str(self._root),
            "LANG": "C.UTF-8",
            "NO_PROXY": f"{LOOPBACK},localhost",
            "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
        }

    def _mount(self) -> None:
        """Folders for the named volumes, links for what the file mounts of the project."""
        self._root.mkdir(parents=True)
        for source, target in {one for name in AIRFLOW for one in self._file.mounts(name)}:
            place = Path(self.here(target))
            if not source.startswith("./"):
                place.mkdir()
            elif source == "./dags":
                shutil.copytree(self._dags, place)
            else:
                place.symlink_to(PROJECT / source)

    def _start_services(self) -> None:
        data = self.home / "redis"
        data.mkdir()
        words = [self.here(word).replace("--dir /data", f"--dir {data}")
                 for word in self._file.command("redis")]  # fmt: skip
        self._launch("redis", words, self._machine() | self._file.environment("redis"))
        # The S3 server of the compose file is a container of its own; here moto takes its place.
        s3 = [f"{sys.prefix}/bin/moto_server", "-H", LOOPBACK, "-p", str(self.ports["objects"])]
        self._launch("objects", s3, self._machine())
        self._start("simulator")
        # The file lets nothing begin before these are healthy.
        for name in ("redis", "objects", "simulator"):
            wait_until(f"{name} to listen", START_TIMEOUT, lambda name=name: self._listens(name))  # type: ignore[misc]

    def _listens(self, name: str) -> bool:
        self.components[name].check()
        with suppress(OSError), socket.create_connection((LOOPBACK, self.ports[name]), timeout=5):
            return True
        return False

    def _start(self, service: str) -> None:
        words = self._file.command(service)
        for name in self._file.names(service):
            arguments = [self._port(word) or self.here(word) for word in words]
            if service == "worker":
                arguments += ["--celery-hostname", f"{name}@%h"]
            self._launch(name, arguments, self.environment(service))

    def _port(self, word: str) -> str | None:
        """Another port, for a word that is nothing but one."""
        return next((str(self.ports[one]) for one in PORTS if word == str(PORTS[one])), None)

    def _launch(self, name: str, words: Sequence[str], env: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", *words] if words[0] == "airflow" else list(words)
        self.components[name] = Component(name, command, self.home / "logs" / f"{name}.log", env)
        self.components[name].start()

    def _run_init(self) -> None:
        command = list(map(self.here, self._file.command("init")))
        done = subprocess.run(
            command,
            env=self.environment("init"),
            capture_output=True,
            text=True,
            check=False,
            timeout=INIT_TIMEOUT,
        )
        (self.home / "logs" / "init.log").write_text(done.stdout + done.stderr)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]

    def _is_healthy(self) -> bool:
        for component in self.components.values():
            component.check()
        try:
            found = self.client.health()
        except LLMBatchError:
            return False
        return all(found.get(name) == "healthy" for name in HEALTHY)


def new_variables(path: Path) -> dict[str, str]:
    """What `make env DEMO=1` writes into a new .env file at `path`."""
    deployment_keys.write(path, demo=True)
    lines = path.read_text().splitlines()
    pairs = (line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return {name: value.strip("'") for name, value in pairs}


@contextmanager
def new_databases(server: sa.URL, password: str) -> Iterator[dict[str, str]]:
    """A login and two databases of its own, as the service `postgres` has them."""
    mark = secrets.token_hex(4)
    own = {name: f"llm_batch_test_{name}_{mark}" for name in ("login", "airflow", "llm_batch")}
    login = own["login"]
    admin = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {login} LOGIN PASSWORD '{password}'")
        for name in ("airflow", "llm_batch"):
            connection.exec_driver_sql(f"CREATE DATABASE {own[name]} OWNER {login}")
    try:
        yield own
    finally:
        with admin.connect() as connection:
            for name in ("airflow", "llm_batch"):
                connection.exec_driver_sql(f"DROP DATABASE {own[name]} WITH (FORCE)")
            connection.exec_driver_sql(f"DROP ROLE {login}")
        admin.dispose()

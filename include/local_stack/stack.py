"""The four Airflow components on this machine, started together and stopped together."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from include.errors import ConfigurationError, TransientError
from include.local_stack.component import (
    Component,
    kill_marked,
    stop_all,
)
from include.local_stack.environment import (
    LOOPBACK,
    OPENAI,
    SIMULATOR_PACE,
    free_port,
    is_port_free,
    simulator_connection,
    stack_environment,
)
from include.local_stack.rest import AirflowClient, wait_until
from include.local_stack.stack_state import write_state

# Task logs are files on this machine. The log servers would listen on all interfaces.
COMMANDS: Mapping[str, Sequence[str]] = {
    "api-server": ("api-server",),
    "scheduler": ("scheduler", "--skip-serve-logs"),
    "dag-processor": ("dag-processor",),
    "triggerer": ("triggerer", "--skip-serve-logs"),
}
HEALTHY = frozenset({"metadatabase", "scheduler", "triggerer", "dag_processor"})
MIGRATE_TIMEOUT = 180.0  # seconds
START_TIMEOUT = 180.0  # seconds
MAX_REVIVALS = 3
COMMAND_TIMEOUT = 120.0  # seconds


class Stack:
    """A whole Airflow below `home`, reachable on 127.0.0.1 only.

    A context manager: entering starts everything and waits until all four components report
    healthy, leaving stops everything, whatever happened in between. Raises `ConfigurationError`
    when the home is in use, a port is taken or a component dies (with the end of its log).

    With `simulator` (its further command line arguments) a simulator is one more component, and
    the connection `openai_default` points at it.
    """

    def __init__(
        self,
        home: Path,
        *,
        port: int | None = None,
        dags: Path | None = None,
        database: str | None = None,
        executor: str = "LocalExecutor",
        env: Mapping[str, str] | None = None,
        simulator: Sequence[str] | None = None,
    ) -> None:
        self.home = home.resolve()
        self.port = port or free_port()
        self.url = f"http://{LOOPBACK}:{self.port}"
        self.simulator_url = None if simulator is None else f"http://{LOOPBACK}:{free_port()}"
        self.env = stack_environment(
            self.home,
            self.port,
            dags=dags,
            database=database,
            executor=executor,
            extra={**self._simulator_connection(), **(env or {})},
        )
        self.client = AirflowClient(self.url)
        self._database = database
        self.components = self._components(simulator)
        self._lock: IO[str] | None = None
        self._revivals = 0
        self._started = datetime.now(UTC)

    def __enter__(self) -> Self:
        """Start everything."""
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop everything."""
        self.stop()

    def start(self) -> None:
        """Prepare the database, start the components and wait until they are healthy."""
        self._lock = home_lock(self.home)
        self._started = datetime.now(UTC)
        kill_marked(self.home)
        self._check_port()
        for folder in ("airflow", "data", "artifacts", "logs"):
            (self.home / folder).mkdir(parents=True, exist_ok=True)
        self._migrate()
        for component in self.components.values():
            component.start()
        self._write_state()
        self.wait_healthy()

    def stop(self) -> None:
        """Stop what runs; afterwards no process of this home is left."""
        if self._lock is None:
            return
        previous = _ignore_interrupts()
        try:
            stop_all(self.components.values())
            kill_marked(self.home)
            (self.home / "stack.json").unlink(missing_ok=True)
            self._release()
        finally:
            _restore_interrupts(previous)

    def wait_healthy(self, seconds: float = START_TIMEOUT) -> None:
        """Wait until the API server reports the database and all components healthy."""
        wait_until("four healthy Airflow components", seconds, self._is_healthy)

    def check(self) -> None:
        """Raise `ComponentDiedError` when one of the components has ended by itself."""
        for component in self.components.values():
            component.check()

    def keep_running(self) -> None:
        """Start a component again that ended by itself, as a service manager would.

        Airflow's scheduler gives up when SQLite reports a lock at a bad moment. Raises
        `ComponentDiedError` after `MAX_REVIVALS` in the life of this stack.
        """
        for component in self.components.values():
            if component.is_running:
                continue
            if self._revivals == MAX_REVIVALS:
                component.check()
            self._revivals += 1
            print(f"{component.name} ended by itself and is started again; see {component.log}")
            component.start()

    def wait_for_dag(self, dag_id: str, seconds: float = 60.0) -> None:
        """Wait until a DAG has been parsed anew; a failed import of its file is raised at once."""
        what = (
            f"DAG {dag_id}: Airflow must find its file in {self.env['AIRFLOW__CORE__DAGS_FOLDER']} "
            "(it looks only into files that hold the words dag and airflow)"
        )
        wait_until(what, seconds, lambda: self._dag_is_there(dag_id))

    def airflow(self, *arguments: str) -> str:
        """Run one `airflow` command in the environment of the stack and return its output."""
        done = subprocess.run(
            _command(arguments),
            env=self.env,
            capture_output=True,
            text=True,
            check=False,
            timeout=max(COMMAND_TIMEOUT, MIGRATE_TIMEOUT),
        )
        if done.returncode:
            said = f"{done.stdout}\n{done.stderr}"[-2000:]
            msg = f"airflow {' '.join(arguments)} ended with exit code {done.returncode}:\n{said}"
            raise ConfigurationError(msg)
        return done.stdout

    def _simulator_connection(self) -> dict[str, str]:
        if self.simulator_url is None:
            return {}
        return {OPENAI: simulator_connection(f"{self.simulator_url}/v1"), **SIMULATOR_PACE}

    def _components(self, simulator: Sequence[str] | None) -> dict[str, Component]:
        commands = {name: _command(arguments) for name, arguments in COMMANDS.items()}
        if simulator is not None:
            commands["simulator"] = self._simulator_command(simulator)
        return {
            name: Component(name, command, self.home / "logs" / f"{name}.log", self.env)
            for name, command in commands.items()
        }

    def _simulator_command(self, arguments: Sequence[str]) -> list[str]:
        port = str(self.simulator_url).rpartition(":")[2]
        state = str(self.home / "simulator")
        own = ["--host", LOOPBACK, "--port", port, "--state", state]
        return [sys.executable, "-m", "include.simulator", *own, *arguments]

    def _migrate(self) -> None:
        self.airflow("db", "migrate")

    def _is_healthy(self) -> bool:
        self.check()
        try:
            report = self.client.health()
        except TransientError:
            return False
        return all(report.get(part) == "healthy" for part in HEALTHY)

    def _dag_is_there(self, dag_id: str) -> bool:
        self.check()
        if self.client.has_dag(dag_id, since=self._started):
            return True
        errors = self.client.import_errors(since=self._started)
        broken = [one for one in errors if f"{dag_id}.py" in one]
        if broken:
            raise ConfigurationError("\n".join(broken))
        return False

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _check_port(self) -> None:
        if not is_port_free(self.port):
            msg = (
                f"port {self.port} of {LOOPBACK} is taken: stop what listens there, "
                "or take another one (make up PORT=8081)"
            )
            raise ConfigurationError(msg)

    def _write_state(self) -> None:
        pids = {name: component.pid for name, component in self.components.items()}
        state = {
            "url": self.url,
            "simulator_url": self.simulator_url,
            "pid": os.getpid(),
            "components": pids,
            "database": self._database,
        }
        write_state(self.home, state)


def home_lock(home: Path) -> IO[str]:
    """Take the lock of a home until the returned file is closed (or its process dies).

    Raises `ConfigurationError` when somebody else has it: their stack runs.
    """
    home.mkdir(parents=True, exist_ok=True)
    lock = (home / "stack.lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        msg = f"a stack already runs in {home}: stop it first (Ctrl-C where it runs)"
        raise ConfigurationError(msg) from None
    return lock


def _command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "airflow", *arguments]


def _ignore_interrupts() -> dict[int, object]:
    """A second Ctrl-C must not leave half of the processes behind."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    try:
        return {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    except ValueError:  # not the main thread: it gets no interrupts
        return {}


def _restore_interrupts(previous: dict[int, object]) -> None:
    for number, handler in previous.items():
        signal.signal(number, handler)  # type: ignore[arg-type]

"""What the Airflow components see: one environment, built from a home folder and a port.

A value that decides where the stack listens, what it loads or where it keeps its state is always
set here. The connections of the jobs are only defaults: one that the caller already has, stays.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from include.job_spec import JOBS_ROOT

PROJECT = Path(__file__).resolve().parents[2]
LOOPBACK = "127.0.0.1"
MARKER = "LLM_BATCH_STACK"  # in the environment of every process of a stack; value: its home

OPENAI = "AIRFLOW_CONN_OPENAI_DEFAULT"
SOURCE_DB = "AIRFLOW_CONN_SOURCE_DB"
RESULTS_DB = "AIRFLOW_CONN_RESULTS_DB"
LEDGER_DB = "AIRFLOW_CONN_LLM_BATCH_DB"
ARTIFACTS = "AIRFLOW__LLM_BATCH__ARTIFACTS"
JOBS = "AIRFLOW__LLM_BATCH__JOBS"

LOWEST_PORT = 10_000
FIRST_OF_CONNECTIONS = 32_768  # of Linux, where nobody has changed ip_local_port_range
_given: set[int] = set()

SECRET_BYTES = 64  # shorter keys make PyJWT warn on every call

# Values for a small machine where someone waits: quick loops, few workers. With a heartbeat above
# 1 s, the scheduler of Airflow 3.3.2 can fail a task whose trigger fires soon after its deferral.
# A changed DAG file is parsed at once; parsing the others over and over takes a core.
TUNING = {
    "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    "AIRFLOW__CORE__PARALLELISM": "8",
    "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.1",
    "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "1",
    "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "5",
    "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "60",
    "AIRFLOW__API__WORKERS": "1",
}

# A simulated batch takes seconds, a real one minutes to hours.
SIMULATOR_PACE = {
    "AIRFLOW__LLM_BATCH__FIRST_POLL": "3",
    "AIRFLOW__LLM_BATCH__POLL_INTERVAL": "2",
}


def free_port() -> int:
    """A port of the loopback interface that nobody listens on at this moment, never the same twice.

    Whoever asks for it listens there seconds later. So it is none of those that the system gives
    to outgoing connections: one of them could have it by then.
    """
    while True:
        port = LOWEST_PORT + secrets.randbelow(FIRST_OF_CONNECTIONS - LOWEST_PORT)
        if port not in _given and is_port_free(port):
            _given.add(port)
            return port


def is_port_free(port: int) -> bool:
    """Whether a server could listen on this port of the loopback interface now."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def load_secrets(home: Path) -> dict[str, str]:
    """Keys of this home, made at the first call and kept in `secrets.json`, readable by its owner.

    They must outlive a restart: Airflow encrypts trigger arguments and signs tokens with them.
    """
    path = home / "secrets.json"
    if not path.exists():
        _write_private(path, json.dumps(_new_secrets()))
    kept: dict[str, str] = json.loads(path.read_text())
    return kept


def stack_environment(
    home: Path,
    port: int,
    *,
    base: Mapping[str, str] | None = None,
    dags: Path | None = None,
    database: str | None = None,
    executor: str = "LocalExecutor",
    extra: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The environment of every component of the stack in `home`.

    `base` is the caller's environment (default: `os.environ`), `dags` the DAG folder (default: the
    project's), `database` the SQLAlchemy URL of Airflow's metadata (default: SQLite in `home`).
    `extra` wins over everything else.
    """
    caller = dict(os.environ if base is None else base)
    return {
        **default_connections(home),
        **TUNING,
        **caller,
        **_places(home, caller, dags or PROJECT / "dags", database),
        **_server(port),
        **load_secrets(home),
        "AIRFLOW__CORE__EXECUTOR": executor,
        **(extra or {}),
    }


def default_connections(home: Path) -> dict[str, str]:
    """SQLite files and an artifact folder in `home` for what a job reads and writes."""
    data = home / "data"
    return {
        SOURCE_DB: sqlite_connection(data / "source.db"),
        RESULTS_DB: sqlite_connection(data / "results.db"),
        LEDGER_DB: sqlite_connection(data / "ledger.db"),
        ARTIFACTS: (home / "artifacts").as_uri(),
    }


def jobs_root(env: Mapping[str, str]) -> Path:
    """The folder of the job folders that a stack with this environment uses."""
    return Path(env.get(JOBS) or JOBS_ROOT)


def sqlite_connection(path: Path) -> str:
    """An Airflow connection to a SQLite file.

    As JSON, because the URI form of an absolute path gains a slash in `SqliteHook.get_uri`.
    """
    return json.dumps({"conn_type": "sqlite", "host": str(path)})


def simulator_connection(base_url: str) -> str:
    """An Airflow connection of type `openai` to a simulator that plays OpenAI's own API."""
    key, extra = "sk-simulator", {"provider": "openai"}
    connection = {"conn_type": "openai", "host": base_url, "password": key, "extra": extra}
    return json.dumps(connection)


def _new_secrets() -> dict[str, str]:
    return {
        "AIRFLOW__CORE__FERNET_KEY": base64.urlsafe_b64encode(os.urandom(32)).decode(),
        "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_urlsafe(SECRET_BYTES),
        "AIRFLOW__API__SECRET_KEY": secrets.token_urlsafe(SECRET_BYTES),
    }


def _write_private(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def _places(
    home: Path, caller: Mapping[str, str], dags: Path, database: str | None
) -> dict[str, str]:
    airflow_home = home / "airflow"
    return {
        MARKER: str(home),
        "SPT_NOENV": "1",  # setproctitle would write over the environment that holds the marker
        "AIRFLOW_HOME": str(airflow_home),
        "AIRFLOW_CONFIG": str(airflow_home / "airflow.cfg"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(PROJECT / "plugins"),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": database or f"sqlite:///{airflow_home}/airflow.db",
        "AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(airflow_home / "logs"),
        "PYTHONPATH": f"{PROJECT}{os.pathsep}{PROJECT / 'plugins'}",
        "PATH": os.pathsep.join([f"{sys.prefix}/bin", caller.get("PATH", os.defpath)]),
        "NO_PROXY": _without_proxy(caller),
        "no_proxy": _without_proxy(caller),
    }


def _without_proxy(caller: Mapping[str, str]) -> str:
    listed = caller.get("no_proxy") or caller.get("NO_PROXY") or ""
    return ",".join(filter(None, [listed, LOOPBACK, "localhost"]))


def _server(port: int) -> dict[str, str]:
    url = f"http://{LOOPBACK}:{port}"
    return {
        "AIRFLOW__API__HOST": LOOPBACK,
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": url,
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
    }

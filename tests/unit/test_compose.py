"""The compose file is safe to start as it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SECRETS = {
    "POSTGRES_PASSWORD",
    "ADMIN_PASSWORD",
    "API_SECRET_KEY",
    "JWT_SECRET",
    "FERNET_KEY",
    "AIRFLOW_CONN_SOURCE_DB",
    "AIRFLOW_CONN_RESULTS_DB",
    "AIRFLOW_CONN_OPENAI_DEFAULT",
}
COMPONENTS = ("api-server", "scheduler", "dag-processor", "triggerer")


@pytest.fixture(scope="module")
def text() -> str:
    """The compose file as it is."""
    return (ROOT / "docker-compose.yaml").read_text()


@pytest.fixture(scope="module")
def services(text: str) -> dict[str, dict[str, Any]]:
    """Its services, with YAML anchors resolved."""
    return yaml.safe_load(text)["services"]


def test_every_secret_is_required(text: str) -> None:
    """Each use of a secret is `${NAME:?...}`: compose refuses to start without it."""
    uses = re.findall(r"\$\{(\w+)(:?[?-])?", text)

    assert {name for name, _ in uses} >= SECRETS
    assert {how for name, how in uses if name in SECRETS} == {":?"}


def test_no_setting_holds_a_secret_of_its_own(services: dict[str, dict[str, Any]]) -> None:
    """Whatever is called key, secret or password, or is a URL with a login, comes from outside."""
    settings = [pair for one in services.values() for pair in one.get("environment", {}).items()]
    sensitive = [
        value
        for name, value in settings
        if re.search(r"_KEY$|SECRET$|PASSWORD$|CONN", name) and value
    ]

    assert sensitive
    assert not [value for value in sensitive if "${" not in value]


def test_example_has_no_secret_to_copy() -> None:
    """.env.example names every required variable and leaves it empty."""
    lines = (ROOT / ".env.example").read_text().splitlines()
    values = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))

    assert {name for name in SECRETS if values.get(name) == ""} == SECRETS


def test_ports_are_open_to_this_machine_only(services: dict[str, dict[str, Any]]) -> None:
    """Every published port is bound to 127.0.0.1, and the database publishes none."""
    ports = [port for one in services.values() for port in one.get("ports", [])]

    assert ports == ["127.0.0.1:8080:8080"]


def test_containers_run_without_rights(services: dict[str, dict[str, Any]]) -> None:
    """Everything of ours runs as a plain user without capabilities."""
    ours = {name: one for name, one in services.items() if one.get("build")}

    assert set(ours) >= {*COMPONENTS, "init", "simulator"}
    assert {one["user"] for one in ours.values()} == {"50000"}
    assert all(one["cap_drop"] == ["ALL"] for one in ours.values())
    assert "USER 50000" in (ROOT / "Dockerfile").read_text()


def test_code_is_mounted_read_only(services: dict[str, dict[str, Any]]) -> None:
    """No component can change DAGs, plugins or the code behind them."""
    mounts = [mount for name in COMPONENTS for mount in services[name]["volumes"]]
    code = [mount for mount in mounts if mount.startswith("./")]

    assert len(code) == 3 * len(COMPONENTS)
    assert all(mount.endswith(":ro") for mount in code)


def test_components_share_one_environment(services: dict[str, dict[str, Any]]) -> None:
    """Keys, connections and import paths are the same everywhere; the heartbeat is 1 s."""
    environments = [services[name]["environment"] for name in COMPONENTS]

    assert all(one == environments[0] for one in environments)
    assert environments[0]["AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL"] == "1"
    assert environments[0]["PYTHONPATH"].split(":")[0] == "/opt/airflow"


def test_pool_counts_waiting_tasks(services: dict[str, dict[str, Any]]) -> None:
    """A deferred task holds its slot of the pool, so the pool caps batches in flight."""
    script = services["init"]["command"][-1]

    assert re.search(r"pools set llm_batch .*--include-deferred", script)


def test_every_component_has_a_health_check(services: dict[str, dict[str, Any]]) -> None:
    """Docker can tell whether a component works, not only whether it runs."""
    assert all("test" in services[name]["healthcheck"] for name in (*COMPONENTS, "postgres"))

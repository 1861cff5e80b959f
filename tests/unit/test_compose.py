"""The compose file is valid, and safe to start as it is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from include.deployment_keys import SEEN_AS

ROOT = Path(__file__).resolve().parents[2]
CONNECTIONS = {
    "AIRFLOW_CONN_SOURCE_DB",
    "AIRFLOW_CONN_RESULTS_DB",
    "AIRFLOW_CONN_OPENAI_DEFAULT",
}
SECRETS = set(SEEN_AS) | CONNECTIONS
COMPONENTS = ("api-server", "scheduler", "dag-processor", "triggerer", "worker")
SERVICES = ("postgres", "redis", "objects")
ONE_SHOT = {"init", "objects-folder", "sample-tickets"}
EXACT = re.compile(r"[\w./-]+:v?\d+\.\d+(\.\d+)?[\w.-]*(@sha256:[0-9a-f]{64})?")
Services = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def text() -> str:
    """The compose file as it is."""
    return (ROOT / "docker-compose.yaml").read_text()


@pytest.fixture(scope="module")
def services(text: str) -> Services:
    """Its services, with YAML anchors resolved."""
    found: Services = yaml.safe_load(text)["services"]
    return found


def ours(services: Services) -> Services:
    """The services that run our image."""
    return {name: one for name, one in services.items() if one.get("build")}


def test_it_follows_the_compose_specification(text: str) -> None:
    """The file is valid against the published schema."""
    schema = json.loads((ROOT / "tests/spec/compose-spec.json").read_text("utf-8"))

    jsonschema.Draft7Validator(schema).validate(yaml.safe_load(text))


def test_all_names_lead_somewhere(text: str, services: Services) -> None:
    """Volumes, networks, configs and services that are named are there; none is left over."""
    file = yaml.safe_load(text)
    mounts = [mount for one in services.values() for mount in one.get("volumes", [])]
    networks = {name for one in services.values() for name in one["networks"]}
    needed = {name for one in services.values() for name in one.get("depends_on", {})}

    named = {mount.split(":")[0] for mount in mounts if not mount.startswith("./")}
    assert named == set(file["volumes"])
    assert networks == set(file["networks"])
    assert needed <= set(services)
    assert {one["source"] for one in services["postgres"]["configs"]} == set(file["configs"])


def test_the_topology_is_whole(services: Services) -> None:
    """Every part of a cluster is there; triggerers and workers are two of each."""
    assert set(services) == {*COMPONENTS, *SERVICES, *ONE_SHOT, "simulator"}
    replicas = {name: one.get("deploy", {}).get("replicas", 1) for name, one in services.items()}
    assert {name for name, count in replicas.items() if count == 2} == {"triggerer", "worker"}
    profiles = {name for name, one in services.items() if one.get("profiles") == ["demo"]}
    assert profiles == {"simulator", "sample-tickets"}


def test_every_secret_is_required(text: str) -> None:
    """Each use of a secret is `${NAME:?...}`: compose refuses to start without it."""
    uses = re.findall(r"\$\{(\w+)(:?[?-])?", text)

    assert {name for name, _ in uses} >= SECRETS
    assert {how for name, how in uses if name in SECRETS} == {":?"}


def test_no_setting_holds_a_secret_of_its_own(services: Services) -> None:
    """Whatever is called key, secret or password, or is a URL with a login, comes from outside."""
    settings = [pair for one in services.values() for pair in one.get("environment", {}).items()]
    sensitive = [
        value
        for name, value in settings
        if re.search(r"_KEY$|SECRET$|PASSWORD$|AUTH$|CONN|BROKER_URL$|BACKEND$", name) and value
    ]
    public = {"llm-batch"}  # the name of the S3 login; its secret key is another setting

    assert len(sensitive) > 10
    assert {value for value in sensitive if "${" not in value} == public


def test_example_has_no_secret_to_copy() -> None:
    """.env.example names every required variable and leaves it empty."""
    lines = (ROOT / ".env.example").read_text().splitlines()
    values = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))

    assert {name for name in SECRETS if values.get(name) == ""} == SECRETS


def test_init_checks_the_keys_before_anything_starts(services: Services) -> None:
    """Its first command refuses placeholders; every component waits for its success."""
    script = services["init"]["command"][-1]

    assert services["init"]["command"][1] == "-ec"
    assert script.splitlines()[0] == "python -m include.deployment_keys check"
    waits = [services[name]["depends_on"]["init"]["condition"] for name in COMPONENTS]
    assert set(waits) == {"service_completed_successfully"}


def test_ports_are_open_to_this_machine_only(services: Services) -> None:
    """Only the UI is published, on 127.0.0.1; databases are on a network without a way out."""
    ports = [port for one in services.values() for port in one.get("ports", [])]

    assert ports == ["127.0.0.1:8080:8080"]
    assert all(services[name]["networks"] == ["data"] for name in SERVICES)


def test_the_network_of_the_databases_is_internal(text: str) -> None:
    """PostgreSQL, Redis and the S3 server can neither be reached from outside nor reach out."""
    assert yaml.safe_load(text)["networks"]["data"] == {"internal": True}


def test_containers_run_without_rights(services: Services) -> None:
    """Nothing runs as root, keeps a capability or can gain one."""
    assert all(not one["user"].startswith(("0", "root")) for one in services.values())
    assert all(one["cap_drop"] == ["ALL"] for one in services.values())
    assert all(one["security_opt"] == ["no-new-privileges:true"] for one in services.values())
    assert (ROOT / "Dockerfile").read_text().rsplit("USER ", 1)[1].startswith("airflow\n")


def test_images_are_pinned(services: Services) -> None:
    """Every image has an exact version, the one that ours is made of as well."""
    foreign = [one["image"] for one in services.values() if not one.get("build")]
    base = re.search(r"^FROM (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)

    assert len(foreign) == len(SERVICES)
    assert base is not None
    assert all(EXACT.fullmatch(image) for image in [*foreign])
    assert base[1] == "apache/airflow:slim-3.3.2-python3.12"
    assert "apache-airflow==3.3.2 " in (ROOT / "requirements-cluster.txt").read_text()


def test_every_service_has_limits(services: Services) -> None:
    """No container can take the whole machine: processors, memory and processes are bounded."""
    limits = [one["deploy"]["resources"]["limits"] for one in services.values()]

    assert all(set(one) == {"cpus", "memory", "pids"} for one in limits)


def test_code_is_mounted_read_only(services: Services) -> None:
    """No component can change DAGs, plugins, the code behind them, or who may log in."""
    for name in COMPONENTS:
        mounts = services[name]["volumes"]
        fixed = [mount for mount in mounts if mount.startswith(("./", "auth:"))]
        assert len(fixed) == 4
        assert all(mount.endswith(":ro") for mount in fixed)


def test_components_share_one_environment(services: Services) -> None:
    """Keys, connections and import paths are the same everywhere; the heartbeat is 1 s."""
    environments = [dict(services[name]["environment"]) for name in COMPONENTS]
    for one in environments:
        one.pop("DUMB_INIT_SETSID", None)

    assert all(one == environments[0] for one in environments)
    assert environments[0]["AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL"] == "1"
    assert environments[0]["PYTHONPATH"].split(":")[0] == "/opt/airflow"


def test_the_scheduler_queues_no_more_than_the_workers_take(services: Services) -> None:
    """A queue in Redis would time out and be failed; tasks wait in the database instead."""
    settings = services["scheduler"]["environment"]
    slots = services["worker"]["deploy"]["replicas"] * int(
        settings["AIRFLOW__CELERY__WORKER_CONCURRENCY"]
    )

    assert int(settings["AIRFLOW__CORE__PARALLELISM"]) <= slots


def test_pool_counts_waiting_tasks(services: Services) -> None:
    """A deferred task holds its slot of the pool, so the pool caps batches in flight."""
    script = services["init"]["command"][-1]

    assert re.search(r"pools set llm_batch .*--include-deferred", script)


def test_every_service_that_stays_has_a_health_check(services: Services) -> None:
    """Docker can tell whether it works, not only whether it runs; what stops is started again."""
    staying = {name: one for name, one in services.items() if name not in ONE_SHOT}

    assert all("test" in one["healthcheck"] for one in staying.values())
    assert all(one["restart"] == "unless-stopped" for one in staying.values())


def test_the_image_holds_the_code_and_nothing_else() -> None:
    """What the Dockerfile copies is what .dockerignore lets through."""
    copied = re.findall(r"^COPY (?:--\S+ )?(\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    let_through = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)

    assert sorted(copied) == sorted(let_through)


def test_the_cluster_installs_what_the_tests_run() -> None:
    """Each package of the image has the version that the development lock has."""
    pin = re.compile(r"^([\w.-]+)==(\S+)", re.MULTILINE)
    cluster = dict(pin.findall((ROOT / "requirements-cluster.txt").read_text()))
    tested = dict(pin.findall((ROOT / "requirements-dev.txt").read_text()))

    assert {"s3fs", "apache-airflow-providers-celery"} <= set(cluster)
    assert {name: tested.get(name) for name in cluster} == cluster

"""The same job through Airflow on each provider: the connection alone tells them apart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from llm_batch import connections

from include.errors import ConfigurationError
from include.simulator.process import Simulator
from tests.airflow.workshop import Job

ROWS: list[tuple[str, str | None]] = [(f"n{number}", f"note {number}") for number in range(4)]
MODEL = "  model: gpt-5-mini\n"
FAILING = {"fault": "line_error", "status": 500, "fraction": 0.6, "first_times": 1}


@pytest.fixture(params=["openai", "azure", "compatible"])
def provider(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Simulator]:
    """A simulator that plays a provider, and the connection that leads to it."""
    deployments = {"deployments": "our-mini=gpt-5-mini"} if request.param == "azure" else {}
    with Simulator.start(
        tmp_path / "simulator", profile=request.param, instant=True, **deployments
    ) as simulator:
        extra: dict[str, Any] = {"provider": request.param}
        if deployments:
            extra["models"] = {"our-mini": "gpt-5-mini"}
        connect(monkeypatch, "openai_default", simulator.base_url, **extra)
        yield simulator


def connect(monkeypatch: pytest.MonkeyPatch, conn_id: str, host: str, **extra: Any) -> None:
    connection = {"conn_type": "openai", "host": host, "password": "sk-test", "extra": extra}
    monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", json.dumps(connection))


@pytest.fixture
def job(
    airflow_home: Path,
    tmp_path: Path,
    provider: Simulator,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Job]:
    name = f"on_{request.node.callspec.params['provider']}"
    monkeypatch.setenv("AIRFLOW__LLM_BATCH__JOBS", str(tmp_path / "jobs"))
    made = Job(name, tmp_path / "jobs", airflow_home / "dags", airflow_home)
    model = "  model: our-mini\n" if name == "on_azure" else MODEL
    made.write(job_yaml=(f"{MODEL}  prompt: prompt.md", f"{model}  prompt: prompt.md"))
    yaml = made.folder / "job.yaml"
    yaml.write_text(yaml.read_text().replace("retry: {rounds: 1}", "budget: {max_usd: 1}"))
    made.fill(ROWS)
    yield made
    made.dag_file.unlink()


def test_a_day_costs_what_the_provider_bills(job: Job, provider: Simulator) -> None:
    """With an answer lost and rows that fail at first: all are loaded, and the money is right."""
    provider.add_faults(FAILING, {"fault": "reset_after", "method": "POST", "path": "/batches$",
                                  "nth": 1})  # fmt: skip

    states = job.run()

    bill = provider.bill()
    report = connections.ledger().runs(job.name)[0]
    assert states["report"] == "success"
    assert job.loaded() == {key for key, _ in ROWS}
    assert report.cost_usd == Decimal(bill["cost_usd"]) > 0
    assert report.estimate_usd is not None
    assert bill["requests"] == len(ROWS)
    assert bill["error_lines"] > 0


def test_workload_identity_is_what_the_hook_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client exchanges a token instead of a key; project and organization go along."""
    connect(
        monkeypatch,
        "with_identity",
        "",
        auth_type="workload_identity",
        workload_identity_provider="custom",
        token_provider="builtins.str",
        identity_provider_id="idp",
        service_account_id="account",
        openai_client_kwargs={"project": "proj_1", "organization": "org_1"},
    )

    client = connections.openai_client("with_identity")

    assert client.workload_identity is not None
    assert (client.project, client.organization) == ("proj_1", "org_1")
    assert connections.provider("with_identity").name == "openai"


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"auth_type": "workload_identity"}, "Missing required 'identity_provider_id'"),
        ({"auth_type": "magic"}, "Unsupported auth_type 'magic'"),
        ({"openai_client_kwargs": {"projekt": "x"}}, "projekt"),
    ],
)
def test_a_connection_without_a_client_is_named(
    monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any], said: str
) -> None:
    """What the hook or the SDK refuses is told as the connection's fault, without the key."""
    connect(monkeypatch, "broken_llm", "https://api.openai.com/v1", **extra)

    with pytest.raises(ConfigurationError, match=f"'broken_llm' gives no client.*{said}") as caught:
        connections.openai_client("broken_llm")

    assert "sk-test" not in str(caught.value)


def test_the_address_of_the_client_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook lets `base_url` win over the host; so does the choice of the provider."""
    arguments = {"base_url": "https://ours.openai.azure.com/openai/v1/"}
    connect(monkeypatch, "by_url", "https://llm.example", openai_client_kwargs=arguments)

    assert connections.provider("by_url").name == "azure"
    assert connections.wait_policy("by_url").deadline_hours == 74
    monkeypatch.setenv("AIRFLOW__LLM_BATCH__DEADLINE_HOURS", "30")
    assert connections.wait_policy("by_url").deadline_hours == 30

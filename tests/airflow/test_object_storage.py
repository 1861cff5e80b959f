"""URIs of settings and jobs through the plugin: connections give the credentials."""

from __future__ import annotations

import json

import pytest
from llm_batch import connections

from include.errors import ConfigurationError
from tests.conftest import S3Server


def test_artifacts_on_s3_by_the_environment(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an Airflow provider for s3, the environment's credentials open the bucket."""
    monkeypatch.setenv("AIRFLOW__LLM_BATCH__ARTIFACTS", f"{s3_bucket}/artifacts")
    artifacts = connections.artifacts()

    with artifacts.create("a.bin") as stream:
        stream.write(b"abc")

    assert artifacts.size("a.bin") == 3


def test_a_connection_opens_a_bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name before @ is a connection with the key and the endpoint."""
    place = s3_server.bucket().removeprefix("s3://")
    aws = {
        "conn_type": "aws",
        "login": "other-key",
        "password": "other-secret",
        "extra": {"endpoint_url": s3_server.endpoint, "region_name": "us-east-1"},
    }
    monkeypatch.setenv("AIRFLOW_CONN_MY_BUCKET", json.dumps(aws))

    path = connections.storage(f"s3://my_bucket@{place}/folder")
    (path / "a.txt").write_bytes(b"abc")

    assert [one.name for one in path.iterdir()] == ["a.txt"]
    assert "my_bucket" not in str(path)


def test_a_connection_that_is_missing_is_named() -> None:
    """As for every other connection."""
    with pytest.raises(ConfigurationError, match="'nobody' is not defined"):
        connections.storage("s3://nobody@bucket/folder")


def test_an_unknown_scheme_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typing error in the setting is told as one."""
    monkeypatch.setenv("AIRFLOW__LLM_BATCH__ARTIFACTS", "s4://bucket/x")

    with pytest.raises(ConfigurationError, match=r"s4://bucket/x .* no scheme that fsspec knows"):
        connections.artifacts()


def test_a_scheme_without_provider_takes_no_connection() -> None:
    """It says what to install."""
    with pytest.raises(ConfigurationError, match="no Airflow provider for gs://"):
        connections.storage("gs://google@bucket/x")

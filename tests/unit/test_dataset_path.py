"""A job may name a Parquet dataset as its target instead of a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from include.dataset_path import checked_path, dataset_at
from include.job_spec import JobSpec, Target


def job(target: dict[str, Any], key: str = "id") -> JobSpec:
    """Return a job with this target."""
    return JobSpec.model_validate(
        {
            "name": "j",
            "source": {"conn_id": "s", "sql": "select 1", "key": [key]},
            "request": {"endpoint": "/v1/responses", "model": "m", "prompt": "{{ text }}"},
            "target": target,
        }
    )


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://conn_id@bucket/labels/", "s3://conn_id@bucket/labels"),
        ("file:///data/labels", "file:///data/labels"),
        ("/data/my labels", "/data/my labels"),
    ],
)
def test_a_place_is_kept_without_its_last_slash(path: str, kept: str) -> None:
    """A URI of any file system, or an absolute path."""
    assert Target(path=path).path == kept


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("labels", "absolute path"),
        ("/", "absolute path"),
        ("file://labels", "absolute path"),
        ("s3://", "absolute path"),
        ("/data\n", "absolute path"),
        ("s3://bucket/*.parquet", "one folder"),
        ("/data/../etc", "one folder"),
        ("s3://key:secret@bucket/labels", "Airflow connection"),
    ],
)
def test_what_is_no_folder_is_refused(path: str, expected: str) -> None:
    """The error says what was expected, and never repeats a password."""
    with pytest.raises(ValueError, match=expected) as caught:
        checked_path(path)

    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "target",
    [
        {},
        {"conn_id": "results_db"},
        {"table": "labels"},
        {"conn_id": "results_db", "path": "/data"},
        {"conn_id": "results_db", "table": "labels", "path": "/data"},
    ],
)
def test_exactly_one_form_is_taken(target: dict[str, str]) -> None:
    """A database or a dataset, whole."""
    with pytest.raises(ValidationError, match=r"conn_id and table .* or path alone"):
        job(target)


def test_a_column_must_not_hide_the_interval() -> None:
    """Readers make a column of the names of the folders."""
    assert job({"conn_id": "d", "table": "t"}, key="interval")

    with pytest.raises(ValidationError, match="a column named interval"):
        job({"path": "/data"}, key="Interval")


def test_a_pinned_spec_is_read_back(tmp_path: Path) -> None:
    """Both forms; also what a release wrote that knew tables only. The place shapes the digest."""
    table, dataset = job({"conn_id": "d", "table": "t"}), job({"path": str(tmp_path)})
    old = json.loads(table.to_json())
    del old["target"]["path"]

    assert JobSpec.from_json(json.dumps(old)) == table
    assert JobSpec.from_json(dataset.to_json()) == dataset
    assert dataset.digest != job({"path": "/elsewhere"}).digest != table.digest


def test_a_target_that_knew_no_path_keeps_its_digest() -> None:
    """A run that was open before the upgrade is found again after it."""
    target = job({"conn_id": "d", "table": "t"}).target

    assert target.model_dump(exclude_defaults=True) == {"conn_id": "d", "table": "t"}


def test_places_are_named_for_people() -> None:
    """Tables by name, datasets by folder."""
    table, dataset = Target(conn_id="d", table="t"), Target(path="s3://b/x")

    assert (table.results_place, table.failures_place) == ("t", "t_failures")
    assert (dataset.results_place, dataset.failures_place) == (
        "s3://b/x/results",
        "s3://b/x/failures",
    )


@pytest.mark.parametrize("scheme", ["", "file://", "memory:/"])
def test_files_are_found_there(scheme: str, tmp_path: Path) -> None:
    """By path, by file URI, and in any file system of fsspec."""
    dataset = dataset_at(f"{scheme}{tmp_path}/my%20labels")
    with dataset.create("a.bin") as stream:
        stream.write(b"abc")

    assert dataset.exists("a.bin")
    names = {"": "my%20labels", "file://": "my labels"}
    assert scheme not in names or (tmp_path / names[scheme] / "a.bin").exists()

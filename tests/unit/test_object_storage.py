"""Paths at a URI, on a server that speaks S3 over HTTP, and what is said of those that fail."""

from __future__ import annotations

import pytest

from include.artifacts import Artifacts
from include.dataset_path import dataset_at
from include.errors import ConfigurationError
from include.object_storage import remote_path


def write_half(artifacts: Artifacts, path: str) -> None:
    with artifacts.create(path) as stream:
        stream.write(b"half")
        raise RuntimeError


def test_artifacts_on_s3(s3_bucket: str) -> None:
    """What was created is there whole, can be listed by size, read and deleted."""
    artifacts = Artifacts(remote_path(f"{s3_bucket}/artifacts"))

    with artifacts.create("job/run/a.bin") as stream:
        stream.write(b"abc")

    assert artifacts.exists("job/run/a.bin")
    assert artifacts.size("job/run/a.bin") == 3
    with artifacts.local("job/run/a.bin") as path:
        assert path.read_bytes() == b"abc"
    artifacts.delete("job/run/a.bin")
    assert not artifacts.exists("job/run/a.bin")


def test_a_failed_write_leaves_nothing_on_s3(s3_bucket: str) -> None:
    """Half a file does not appear."""
    artifacts = Artifacts(remote_path(s3_bucket))
    with pytest.raises(RuntimeError):
        write_half(artifacts, "a.bin")

    assert not artifacts.exists("a.bin")


def test_an_unknown_scheme_is_named() -> None:
    """A typing error in the scheme is told as one."""
    with pytest.raises(ConfigurationError, match=r"s4://bucket/x cannot be opened: s4:// is no"):
        dataset_at("s4://bucket/x")


def test_a_missing_package_is_named() -> None:
    """The scheme is known, and its package has to be installed."""
    with pytest.raises(ConfigurationError, match=r"hf://.* a package is missing.*huggingface"):
        remote_path("hf://datasets/a/b")

from pathlib import Path

import pytest
from upath import UPath

from include.artifacts import Artifacts
from include.errors import ConfigurationError


def write(artifacts: Artifacts, path: str, data: bytes) -> None:
    with artifacts.create(path) as stream:
        stream.write(data)


def write_half(artifacts: Artifacts, path: str) -> None:
    with artifacts.create(path) as stream:
        stream.write(b"half")
        raise RuntimeError


@pytest.fixture(params=["local", "memory"])
def artifacts(request: pytest.FixtureRequest, tmp_path: Path) -> Artifacts:
    if request.param == "local":
        return Artifacts(tmp_path)
    return Artifacts(UPath(f"memory://{tmp_path.name}"))


def test_what_was_created_can_be_read(artifacts: Artifacts) -> None:
    """A created file is there whole, on a local and on a remote root."""
    write(artifacts, "job/run/a.bin", b"abc")

    assert artifacts.exists("job/run/a.bin")
    assert artifacts.size("job/run/a.bin") == 3
    with artifacts.open("job/run/a.bin") as stream:
        assert stream.read() == b"abc"
    with artifacts.local("job/run/a.bin") as path:
        assert path.read_bytes() == b"abc"


def test_a_failed_write_leaves_nothing(artifacts: Artifacts) -> None:
    """A file whose writing fails does not appear."""
    with pytest.raises(RuntimeError):
        write_half(artifacts, "a.bin")

    assert not artifacts.exists("a.bin")


def test_a_failed_write_leaves_no_scrap(tmp_path: Path) -> None:
    """Nor does its temporary file stay."""
    with pytest.raises(RuntimeError):
        write_half(Artifacts(tmp_path), "a.bin")

    assert list(tmp_path.iterdir()) == []


def test_a_rewrite_replaces_in_one_step(tmp_path: Path) -> None:
    """A reader sees the old bytes until the new ones are whole."""
    artifacts = Artifacts(tmp_path)
    write(artifacts, "a.bin", b"old")

    with artifacts.create("a.bin") as stream:
        stream.write(b"new")
        stream.flush()
        seen_meanwhile = (tmp_path / "a.bin").read_bytes()

    assert seen_meanwhile == b"old"
    assert (tmp_path / "a.bin").read_bytes() == b"new"


@pytest.mark.parametrize("path", ["/etc/passwd", "../outside", "a/../../b"])
def test_paths_stay_below_the_root(artifacts: Artifacts, path: str) -> None:
    """A path that leaves the root is refused."""
    with pytest.raises(ValueError, match="below the root"):
        artifacts.exists(path)


def test_a_missing_file_says_what_to_do(artifacts: Artifacts) -> None:
    """Opening a file that is gone names it and the way out."""
    with pytest.raises(ConfigurationError, match=r"gone\.bin is missing.*clear the run"):
        artifacts.open("gone.bin")

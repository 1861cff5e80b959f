"""The keys of a deployment are new each time, private, and refused when they are placeholders."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from include import deployment_keys
from include.deployment_keys import SEEN_AS, keys_of, new_keys, problems, write

ROOT = Path(__file__).resolve().parents[2]
FERNET_OF_ZEROS = "A" * 43 + "="


def values_of(path: Path) -> dict[str, str]:
    """The variables of an .env file."""
    lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
    return {name: value.strip("'") for name, value in (line.split("=", 1) for line in lines)}


def test_new_keys_are_good() -> None:
    """What `make env` writes passes the check of `init`; Airflow's library takes the Fernet key."""
    keys = new_keys()

    assert problems(keys) == []
    assert Fernet(keys["FERNET_KEY"])
    assert set(keys) == set(SEEN_AS)


def test_no_two_deployments_share_a_key() -> None:
    """Keys are drawn, not derived."""
    assert not set(new_keys().values()) & set(new_keys().values())


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("JWT_SECRET", "", "empty"),
        ("JWT_SECRET", "change-me-" * 8, "placeholder"),
        ("JWT_SECRET", "0123456789abcdef" * 3, "shorter than 64 bytes"),
        ("POSTGRES_PASSWORD", "airflow", "placeholder"),
        ("ADMIN_PASSWORD", "tooweak4me", "shorter than 20"),
        ("ADMIN_PASSWORD", "a" * 40, "too regular"),
        ("API_SECRET_KEY", "your API key goes here, please", "placeholder"),
        ("FERNET_KEY", "not a Fernet key", "no Fernet key"),
        ("FERNET_KEY", FERNET_OF_ZEROS, "no Fernet key"),
        ("FERNET_KEY", "0" * 32, "no Fernet key"),
    ],
)
def test_a_weak_key_is_named(name: str, value: str, why: str) -> None:
    """Each weak key is refused by name and reason, and never shown."""
    (problem,) = problems(new_keys() | {name: value})

    assert problem.startswith(f"{name} ")
    assert why in problem
    assert not value or value not in problem


def test_one_key_for_two_purposes_is_refused() -> None:
    """A leaked API key must not sign tokens."""
    keys = new_keys()

    found = problems(keys | {"API_SECRET_KEY": keys["JWT_SECRET"]})

    assert found == ["two keys are the same: each needs one of its own"]


def test_env_is_private_and_never_overwritten(tmp_path: Path) -> None:
    """Only the owner reads .env, and a second call leaves the keys that are in use."""
    path = tmp_path / ".env"
    write(path, demo=True)
    before = path.read_text()

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert deployment_keys.main(["write", "--to", str(path)]) == 1
    assert path.read_text() == before


def test_env_of_the_demo_is_complete(tmp_path: Path) -> None:
    """`make env DEMO=1` leaves nothing empty; without it, exactly the connections are."""
    write(tmp_path / "demo", demo=True)
    write(tmp_path / "own", demo=False)

    own = values_of(tmp_path / "own")
    assert all(values_of(tmp_path / "demo").values())
    assert {name for name, value in own.items() if not value} == set(deployment_keys.DEMO)


def test_init_sees_the_keys_in_its_settings() -> None:
    """The check reads the settings that Airflow itself reads, URLs included."""
    keys = new_keys()
    environment = {setting: keys[name] for name, setting in SEEN_AS.items()}
    for setting in ("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", "AIRFLOW__CELERY__BROKER_URL"):
        environment[setting] = f"scheme://user:{environment[setting]}@host:1/name"

    assert keys_of(environment) == keys


def test_the_check_stops_a_deployment() -> None:
    """`python -m include.deployment_keys check` ends with 1 without keys, on plain Python."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "include.deployment_keys", "check"],
        cwd=ROOT,
        env={},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 1
    assert "JWT_SECRET is empty" in done.stderr

"""The keys of a deployment with `docker-compose.yaml`: made anew, and checked before they are used.

    python -m include.deployment_keys write [--demo]     .env from .env.example, with new keys
    python -m include.deployment_keys check              the environment of the service `init`

Standard library only: `write` runs before anything is installed.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import os
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[1]
SHORTEST_PASSWORD = 20  # characters
SHORTEST_JWT_SECRET = 64  # bytes, the length of the hash that signs
FERNET_BYTES = 32
PASSWORDS = ("POSTGRES_PASSWORD", "REDIS_PASSWORD", "OBJECTS_SECRET_KEY", "ADMIN_PASSWORD")
SIGNING = ("API_SECRET_KEY", "JWT_SECRET")
FERNET = "FERNET_KEY"
FEWEST_CHARACTERS = 10  # different ones
# No new key holds one of these words: they are drawn in hexadecimal.
PLACEHOLDER = re.compile(r"change|example|placeholder|secret|password|default|airflow|your|xxx")
OUR_LOGIN = "{POSTGRES_PASSWORD}"
DEMO_DATABASE = f"postgresql://airflow:{OUR_LOGIN}@postgres:5432/llm_batch"
DEMO = {
    "AIRFLOW_CONN_SOURCE_DB": DEMO_DATABASE,
    "AIRFLOW_CONN_RESULTS_DB": DEMO_DATABASE,
    "AIRFLOW_CONN_OPENAI_DEFAULT": (
        '{"conn_type": "openai", "host": "http://simulator:8765/v1", "password": "sk-simulator"}'
    ),
}
# Where `init` sees the keys: the settings that they end up in.
SEEN_AS = {
    "POSTGRES_PASSWORD": "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN",
    "REDIS_PASSWORD": "AIRFLOW__CELERY__BROKER_URL",
    "OBJECTS_SECRET_KEY": "AWS_SECRET_ACCESS_KEY",
    "ADMIN_PASSWORD": "ADMIN_PASSWORD",
    "API_SECRET_KEY": "AIRFLOW__API__SECRET_KEY",
    "JWT_SECRET": "AIRFLOW__API_AUTH__JWT_SECRET",
    "FERNET_KEY": "AIRFLOW__CORE__FERNET_KEY",
}


def new_keys() -> dict[str, str]:
    """Return a fresh key of each kind; letters and digits only where it becomes part of a URL."""
    keys = dict.fromkeys((*PASSWORDS, *SIGNING), "")
    keys = {name: secrets.token_hex(48) for name in keys}
    return keys | {FERNET: base64.urlsafe_b64encode(os.urandom(FERNET_BYTES)).decode()}


def filled(example: str, values: Mapping[str, str]) -> str:
    """Return the text of `.env.example` with these values in its empty lines."""
    return re.sub(
        r"^(\w+)=$",
        lambda line: f"{line[1]}={_quoted(values[line[1]])}" if line[1] in values else line[0],
        example,
        flags=re.MULTILINE,
    )


def _quoted(value: str) -> str:
    """Single quotes: compose then takes the value as it is."""
    return value if re.fullmatch(r"[\w=-]+", value) else f"'{value}'"


def write(path: Path, *, demo: bool) -> None:
    """Write a new `.env` that only its owner can read; an existing one is never touched."""
    keys = new_keys()
    if demo:
        password = keys["POSTGRES_PASSWORD"]
        keys |= {name: one.replace(OUR_LOGIN, password) for name, one in DEMO.items()}
    text = filled((ROOT / ".env.example").read_text("utf-8"), keys)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def problems(keys: Mapping[str, str]) -> list[str]:
    """Return what is wrong with a deployment's keys, without ever showing one."""
    found = [f"{name} {what}" for name in SEEN_AS if (what := _wrong(name, keys.get(name, "")))]
    values = [keys[name] for name in SEEN_AS if keys.get(name)]
    if len(set(values)) < len(values):
        found.append("two keys are the same: each needs one of its own")
    return found


def _wrong(name: str, value: str) -> str | None:
    if not value:
        return "is empty"
    if name == FERNET:
        return (
            None if _is_fernet(value) else "is no Fernet key (32 random bytes in URL-safe base64)"
        )
    if PLACEHOLDER.search(value.lower()):
        return "is a placeholder"
    if name == "JWT_SECRET" and len(value.encode()) < SHORTEST_JWT_SECRET:
        return f"is shorter than {SHORTEST_JWT_SECRET} bytes"
    if len(value) < SHORTEST_PASSWORD:
        return f"is shorter than {SHORTEST_PASSWORD} characters"
    return None if len(set(value)) >= FEWEST_CHARACTERS else "is too regular to be random"


def _is_fernet(value: str) -> bool:
    try:
        key = base64.urlsafe_b64decode(value)
    except (binascii.Error, ValueError):
        return False
    return len(key) == FERNET_BYTES and len(set(key)) > FERNET_BYTES // 2


def keys_of(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the keys by their names in `.env`, from the settings that a container sees."""
    return {name: _key(environment.get(setting, "")) for name, setting in SEEN_AS.items()}


def _key(setting: str) -> str:
    return urlsplit(setting).password or "" if "://" in setting else setting


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check; 1 when something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m include.deployment_keys", description=__doc__)
    chosen = parser.add_subparsers(dest="command", required=True)
    chosen.add_parser("check")
    new = chosen.add_parser("write")
    new.add_argument("--demo", action="store_true", help="with the connections of the demo")
    new.add_argument("--to", type=Path, default=ROOT / ".env")
    options = parser.parse_args(arguments)
    return _check() if options.command == "check" else _write(options.to, demo=options.demo)


def _write(path: Path, *, demo: bool) -> int:
    try:
        write(path, demo=demo)
    except FileExistsError:
        return _told([f"{path} exists. Its keys may be in use: move it away to get new ones."])
    missing = "" if demo else "; now fill in the three connections"
    sys.stdout.write(f"{path} has new keys{missing}.\n")
    return 0


def _check() -> int:
    found = problems(keys_of(os.environ))
    return _told([*found, "Nothing was started. `make env` writes good keys."]) if found else 0


def _told(lines: Sequence[str]) -> int:
    sys.stderr.write("".join(f"{line}\n" for line in lines))
    return 1


if __name__ == "__main__":
    sys.exit(main())

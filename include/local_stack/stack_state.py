"""What a running stack tells commands that come to it from another terminal: `stack.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from include.errors import ConfigurationError
from include.local_stack.environment import OPENAI, default_connections

OURS = ("AIRFLOW_CONN_", "AIRFLOW__LLM_BATCH__")


def write_state(home: Path, state: Mapping[str, Any]) -> None:
    """Keep what the stack of `home` is, readable by its owner: a database URL may hold a password.

    Of the caller's connections and settings only the names are kept.
    """
    path = home / "stack.json"
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump({**state, "names": sorted(_ours(os.environ))}, file)


def running_stack(home: Path) -> dict[str, Any]:
    """`url`, `simulator_url` and `database` of the stack of `home`.

    Raises `ConfigurationError` when none runs, and when the connections of this terminal are not
    those that the stack was started with: a command would look at another ledger.
    """
    path = home.resolve() / "stack.json"
    if not path.exists():
        msg = f"no stack runs in {home}: start one with `make up`"
        raise ConfigurationError(msg)
    state: dict[str, Any] = json.loads(path.read_text())
    _check_names(frozenset(state["names"]), frozenset(_ours(os.environ)), home)
    return state


def _ours(names: Iterable[str]) -> set[str]:
    # The simulator's connection is made by the stack itself, whatever the caller has.
    return {name for name in names if name.startswith(OURS)} - {OPENAI}


def _check_names(there: frozenset[str], here: frozenset[str], home: Path) -> None:
    missing = sorted(there - here)
    strange = sorted((here - there) & set(default_connections(home)))
    if missing:
        msg = f"the stack was started with {', '.join(missing)}: export the same in this terminal"
        raise ConfigurationError(msg)
    if strange:
        msg = f"the stack was started without {', '.join(strange)}: unset it in this terminal"
        raise ConfigurationError(msg)

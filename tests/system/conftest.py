"""The stacks of these tests see only what the tests give them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _no_settings_of_others() -> Iterator[None]:
    """Take Airflow's settings, connections and variables out of the environment meanwhile."""
    found = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("AIRFLOW")}
    yield
    os.environ.update(found)

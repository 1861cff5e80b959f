"""docs/request-queue.md says what the queue does: its SQL runs, its tables are complete."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import yaml
from pydantic import BaseModel

from include.job_spec import JOBS_ROOT
from include.ledger import Ledger
from include.queue_records import RequestState
from include.queue_spec import QueueSpec
from include.request_queue import RequestQueue

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "request-queue.md").read_text("utf-8")
SQL = re.findall(r"^```sql\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
AS_OF_A_JOB = {"limits", "retry", "budget", "canary", "alert"}  # explained in docs/writing-jobs.md


def first_cells(header: str) -> list[str]:
    """The first cells of the table whose header begins with `header`."""
    lines = PAGE[PAGE.index(f"\n| {header} |") :].strip().split("\n\n")[0].splitlines()[2:]
    return [line.strip("|").split(" | ")[0].strip() for line in lines]


def keys_of(model: type[BaseModel], before: str = "") -> set[str]:
    found = set()
    for name, field in model.model_fields.items():
        kind = field.annotation
        is_part = isinstance(kind, type) and issubclass(kind, BaseModel)
        is_part = is_part and name not in AS_OF_A_JOB
        found |= keys_of(kind, f"{before}{name}.") if is_part else {before + name}  # type: ignore[arg-type]
    return found - {"name"}


def test_every_key_of_a_queue_is_documented() -> None:
    """The table has every key that the job.yaml of a queue may have, and no other."""
    documented = re.findall(r"`([\w.]+)`", " ".join(first_cells("key")))

    assert sorted(documented) == sorted(keys_of(QueueSpec))


def test_every_state_is_documented() -> None:
    """In the order in which requests go through them."""
    assert first_cells("state") == [f"`{state}`" for state in RequestState]


def test_every_method_is_documented() -> None:
    """What an application can call is in the table."""
    public = {name for name in vars(RequestQueue) if not name.startswith("_")}

    assert set(re.findall(r"`(\w+)\(", " ".join(first_cells("method")))) == public


def test_the_job_yaml_of_the_page_is_the_real_one() -> None:
    """The page shows what this project comes with."""
    (shown,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    real = yaml.safe_load((JOBS_ROOT / "request_queue" / "job.yaml").read_text("utf-8"))
    del real["description"]

    assert yaml.safe_load(shown) == real


def test_the_sql_runs_on_a_ledger(tmp_path: Path) -> None:
    """What the page says by SQL can be said; rights are PostgreSQL's."""
    Ledger(sa.create_engine(f"sqlite:///{tmp_path}/ledger.db"))
    statements = [one.strip() for block in SQL for one in block.split(";\n") if one.strip()]
    ours = [one for one in statements if not one.partition("--")[0].startswith("GRANT")]
    connection = sqlite3.connect(tmp_path / "ledger.db")

    found: list[Any] = [connection.execute(one).fetchall() for one in ours]

    assert len(ours) == 5
    assert found[2:] == [
        [("queued", None, None, None, None)],
        [],
        [("cancelled", 1, found[4][0][2]), ("queued", 1, found[4][1][2])],
    ]
    connection.close()

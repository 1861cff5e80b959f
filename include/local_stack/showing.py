"""Some rows of the result tables, for people."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from include.artifacts import Artifacts
from include.job_spec import JobSpec

CELL_WIDTH = 46  # characters
FLOAT_BYTES = 4  # of the vectors in a BLOB
HIDDEN_PREFIX = "_"


def find_table(bind: Engine | Connection, name: str) -> sa.Table | None:
    """The table as it is in the database ("schema.table" or "table"); None when it is not there."""
    schema, _, table = name.rpartition(".")
    try:
        return sa.Table(table, sa.MetaData(), schema=schema or None, autoload_with=bind)
    except sa.exc.NoSuchTableError:
        return None


def result_rows(target: Engine | Artifacts, spec: JobSpec, limit: int = 6) -> str:
    """Some loaded rows: key and output columns, or a note that there are none."""
    if isinstance(target, Artifacts):
        return _how_to_read(spec.target.results_place)
    return _rows(target, spec.target.table, limit=limit, own=())


def failure_rows(target: Engine | Artifacts, spec: JobSpec, limit: int = 6) -> str:
    """Some rows of the failures table: key, reason and message."""
    if isinstance(target, Artifacts):
        return _how_to_read(spec.target.failures_place)
    own = ("_reason", "_error_message")
    return _rows(target, spec.target.failures_table, limit=limit, own=own)


def failure_reasons(target: Engine | Artifacts, spec: JobSpec) -> dict[str, int]:
    """How many rows of the failures table have each reason; of a dataset it is not read."""
    if isinstance(target, Artifacts):
        return {}
    table = find_table(target, spec.target.failures_table)
    if table is None or "_reason" not in table.c:
        return {}
    reason = table.c["_reason"]
    query = sa.select(reason, sa.func.count()).group_by(reason).order_by(reason)
    with target.connect() as connection:
        return {str(name): int(count) for name, count in connection.execute(query)}


def _how_to_read(place: str) -> str:
    return f"(a Parquet dataset: pandas.read_parquet({place!r}) reads it)"


def _rows(engine: Engine, name: str, *, limit: int, own: Sequence[str]) -> str:
    import pandas as pd

    table = find_table(engine, name)
    if table is None:
        return f"(there is no table {name})"
    columns = [one for one in table.c if not one.name.startswith(HIDDEN_PREFIX) or one.name in own]
    query = sa.select(*columns).order_by(*table.primary_key.columns).limit(limit)
    with engine.connect() as connection:
        # As objects: a null would make a float of each integer of its column.
        frame = pd.DataFrame(connection.execute(query).mappings().all(), dtype=object)
    if frame.empty:
        return f"(table {name} is empty)"
    return str(frame.map(_short).to_string(index=False))


def _short(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bytes):
        return f"({len(value) // FLOAT_BYTES:,} numbers)"
    text = " ".join(str(value).split())
    return text if len(text) <= CELL_WIDTH else f"{text[: CELL_WIDTH - 1]}…"

"""The failed rows of one run, as a page lists them: reason and key, or only the key's digest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.engine import Engine

if TYPE_CHECKING:
    from include.job_spec import JobSpec

MOST_ROWS = 100
LONGEST_TEXT = 400  # characters of a key or of a message


@dataclass(frozen=True)
class FailedRow:
    """One row of the failures table; some readers see no key and no message."""

    digest: str
    reason: str
    rounds: int
    batch_id: str
    key: tuple[str, ...] = ()
    code: str = ""
    message: str = ""


def failed_rows(
    engine: Engine, spec: JobSpec, run_id: str, *, with_text: bool
) -> tuple[list[FailedRow], int]:
    """Return some rows that the run put into the failures table and are still there, and how many.

    Without `with_text`, neither the rows' keys nor what was said about them leaves the database.
    No table yet is no rows.
    """
    with engine.connect() as connection:
        try:
            table = sa.Table(spec.target.failures_table, sa.MetaData(), autoload_with=connection)
        except sa.exc.NoSuchTableError:
            return [], 0
        is_ours = table.c["_run_id"] == run_id
        total = connection.execute(sa.select(sa.func.count()).where(is_ours)).scalar_one()
        names = ["_key", "_reason", "_rounds", "_batch_id"]
        if with_text:
            names += [*spec.source.key, "_error_code", "_error_message"]
        query = sa.select(*(table.c[name] for name in names)).where(is_ours)
        query = query.order_by(table.c["_reason"], table.c["_key"]).limit(MOST_ROWS)
        found = [tuple(row) for row in connection.execute(query)]
    return [_row(values) for values in found], int(total)


def _row(values: tuple[object, ...]) -> FailedRow:
    digest, reason, rounds, batch_id, *text = values
    return FailedRow(
        digest=_short(digest),
        reason=_short(reason),
        rounds=int(str(rounds or 0)),
        batch_id=_short(batch_id),
        key=tuple(_short(one) for one in text[:-2]),
        code=_short(text[-2]) if text else "",
        message=_short(text[-1]) if text else "",
    )


def _short(value: object) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…"

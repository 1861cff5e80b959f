"""What came of a range of days: counts, money, and the proof that no row is missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from include.artifacts import Artifacts
from include.cost import known_total
from include.figures import counted, money
from include.job_spec import JobSpec
from include.ledger import Ledger
from include.ledger_records import Run
from include.local_stack.progress import interval_start, newest_runs
from include.local_stack.rest import DagRun
from include.local_stack.showing import find_table
from include.report import run_report
from include.snapshot import Snapshot

KEYS_AT_A_TIME = 400  # SQLite allows 999 parameters, a key may have two columns
HEADERS = (
    "day", "state", "rows", "loaded", "failed", "reused", "rounds", "batches",
    "tokens in", "tokens out", "cost", "real-time",
)  # fmt: skip


Key = tuple[Any, ...]


@dataclass(frozen=True)
class DaySummary:
    """One day. Money in US dollars, None when the model has no known price."""

    day: str
    state: str
    rows: int = 0
    loaded: int = 0
    failed: int = 0
    reused: int = 0
    rounds: int = 0
    batches: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: Decimal | None = None
    realtime: Decimal | None = None
    missing_keys: int = 0

    @property
    def problems(self) -> list[str]:
        """Why this day is not whole; [] when it is."""
        ended = self.loaded + self.failed + self.reused
        if self.state != "success" and ended < self.rows:
            left = f"{self.rows - ended:,} of {counted(self.rows, 'row')}"
            return [f"{self.day}: the run ended as {self.state}, {left} neither loaded nor failed"]
        found = []
        if self.state != "success":
            found.append(f"{self.day}: the run ended as {self.state}")
        if ended != self.rows:
            found.append(
                f"{self.day}: {counted(self.rows, 'row')}, but {ended} loaded, failed or reused"
            )
        if self.missing_keys:
            found.append(
                f"{self.day}: {counted(self.missing_keys, 'key is', 'keys are')} in neither table"
            )
        return found


class Summarizer:
    """Reads the ledger, the snapshots and the target of one job."""

    def __init__(
        self, spec: JobSpec, ledger: Ledger, artifacts: Artifacts, target: Engine | Artifacts
    ) -> None:
        self._spec = spec
        self._ledger = ledger
        self._artifacts = artifacts
        self._target = target

    def days(self, dag_runs: Sequence[DagRun], since: datetime) -> list[DaySummary]:
        """One summary per Airflow run, in their order; the work was begun at `since`."""
        known = newest_runs(self._ledger, self._spec.name, since)
        return [self._day(one, known) for one in dag_runs]

    def _day(self, dag_run: DagRun, known: Mapping[datetime, Run]) -> DaySummary:
        start = interval_start(dag_run)
        day = f"{start:%Y-%m-%d}" if start else dag_run.run_id
        run = known.get(start) if start else None
        if run is None:
            return DaySummary(day, f"{dag_run.state}, not begun")
        batches, report = self._ledger.batches(run.run_id), run_report(run, self._ledger)
        return DaySummary(
            day=day,
            state=dag_run.state if run.state == "DONE" else f"{dag_run.state}, {run.state}",
            rows=run.rows,
            loaded=run.loaded,
            failed=run.failed,
            reused=run.reused,
            rounds=len(self._ledger.rounds(run.run_id)),
            batches=len(batches),
            input_tokens=sum(one.used_input_tokens for one in batches),
            output_tokens=sum(one.used_output_tokens for one in batches),
            cost=report.cost_usd,
            realtime=report.realtime_usd,
            missing_keys=self._missing_keys(run),
        )

    def _missing_keys(self, run: Run) -> int:
        """How many keys of the snapshot are neither in the target nor in the failures table."""
        if run.snapshot is None:
            return 0
        if isinstance(self._target, Artifacts):
            return self._missing_from_files(self._target, run, run.snapshot)
        tables = [self._spec.target.table, self._spec.target.failures_table]
        missing = 0
        with self._target.connect() as connection:
            found = [find_table(connection, name) for name in tables]
            for keys in self._keys(Snapshot.from_json(run.snapshot).path):
                missing += len(keys) - len(self._ended(connection, found, keys))
        return missing

    def _missing_from_files(self, dataset: Artifacts, run: Run, snapshot: str) -> int:
        import pyarrow.parquet as pq

        from include.parquet_target import ended_keys, key_digests

        key = list(self._spec.source.key)
        results, failures = ended_keys(dataset, run.interval_start, key)
        missing = 0
        with (
            self._artifacts.local(Snapshot.from_json(snapshot).path) as path,
            pq.ParquetFile(path) as file,
        ):
            for batch in file.iter_batches(columns=key):
                digests = key_digests(batch, key)
                missing += int((~(results.has(digests) | failures.has(digests))).sum())
        return missing

    def _ended(
        self, connection: Connection, tables: Sequence[sa.Table | None], keys: set[Key]
    ) -> set[Key]:
        columns = self._spec.source.key
        present = [_present(connection, one, columns, keys) for one in tables if one is not None]
        return set().union(*present)

    def _keys(self, snapshot: str) -> Iterator[set[Key]]:
        import pyarrow.parquet as pq

        columns = list(self._spec.source.key)
        with self._artifacts.local(snapshot) as path, pq.ParquetFile(path) as file:
            for batch in file.iter_batches(KEYS_AT_A_TIME, columns=columns):
                values = [column.to_pylist() for column in batch.columns]
                # A row without a key can only be counted, not found again.
                yield {key for key in zip(*values, strict=True) if None not in key}


def table_text(days: Sequence[DaySummary]) -> str:
    """The days as an aligned table with a line of totals."""
    rows = [HEADERS, *(_cells(one) for one in days), _total(days)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADERS))]
    lines = [_aligned(row, widths) for row in rows]
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _cells(one: DaySummary) -> tuple[str, ...]:
    counts = (one.rows, one.loaded, one.failed, one.reused, one.rounds, one.batches)
    tokens = (one.input_tokens, one.output_tokens)
    numbers = [f"{number:,}" for number in (*counts, *tokens)]
    return (one.day, one.state, *numbers, money(one.cost), money(one.realtime))


def _total(days: Sequence[DaySummary]) -> tuple[str, ...]:
    names = ("rows", "loaded", "failed", "reused", "rounds", "batches")
    sums = [sum(getattr(one, name) for one in days) for name in names]
    tokens = [sum(one.input_tokens for one in days), sum(one.output_tokens for one in days)]
    numbers = [f"{number:,}" for number in (*sums, *tokens)]
    costs = known_total(one.cost for one in days), known_total(one.realtime for one in days)
    return ("total", "", *numbers, money(costs[0]), money(costs[1]))


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    left = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
    right = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
    return "  ".join([*left, *right])


def _present(
    connection: Connection, table: sa.Table, key: Sequence[str], keys: set[Key]
) -> set[Key]:
    if not keys:
        return set()
    columns = [table.c[name] for name in key]
    query = sa.select(*columns).where(sa.tuple_(*columns).in_(list(keys)))
    return {tuple(row) for row in connection.execute(query)}

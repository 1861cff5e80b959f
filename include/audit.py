"""Checks a finished run against its ledger, artifacts, target and the API's list of batches.

What a system that runs can prove of itself: every row has ended once, no batch is unknown, no line
is unaccounted for, no state has moved where it may not. The test suite adds what only the
simulator knows, such as its bill.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from include.artifacts import Artifacts
from include.batch_ownership import Ownership
from include.batch_status import BatchStatus
from include.column_types import column_texts
from include.errors import NotThereError
from include.figures import counted, noun
from include.job_spec import JobSpec
from include.ledger import Ledger
from include.ledger_records import EDGES, Batch, BatchState, Run, RunState
from include.parquet_target import ended_keys, key_digests
from include.queue_target import ended_requests
from include.result_lines import read_lines
from include.round_files import REJECTED_FILE, beside
from include.row_identity import key_digest, key_json
from include.snapshot import Snapshot
from include.target_table import TargetTables, create_tables, key_families

if TYPE_CHECKING:
    from include.batch_api import BatchApi

CHUNK_ROWS = 500  # keys in one question to the target
SHOWN = 5  # examples in a message
SKEW = timedelta(minutes=10)  # by which the API's clock may differ from ours
Found = tuple[list[bool], list[bool]]  # for each row: is it in the results, in the failures
LookUp = Callable[[pa.RecordBatch], Found]


@dataclass(frozen=True)
class Finding:
    """An invariant (`I1`, `I3`, `I5`, `I7` or `I8`) that does not hold, and where."""

    invariant: str
    message: str


def audit(
    run_id: str,
    ledger: Ledger,
    artifacts: Artifacts,
    target: Engine | Artifacts,
    api: BatchApi,
    *,
    skew: timedelta = SKEW,
) -> list[Finding]:
    """Return what is wrong with a run that is DONE; an empty list when every check holds.

    Reads only; memory does not grow with the rows. A later run over the same keys changes the
    target, so only the latest run of a partition can be held against it.
    Raises what the ledger, the API or the target raise when they do not answer.
    """
    run = ledger.run(run_id)
    batches = ledger.batches(run_id)
    return [
        *_of_rows(run, artifacts, target),
        *_of_listing(run, batches, ledger, api, skew),
        *_of_lines(batches, artifacts),
        *_of_history(run, batches, ledger),
        *_of_bounds(run, batches, ledger, artifacts),
    ]


def _of_rows(run: Run, artifacts: Artifacts, target: Engine | Artifacts) -> Iterator[Finding]:
    """I1: each row of the snapshot is a result or a failure, and not both."""
    if run.state != RunState.DONE or run.snapshot is None:
        yield Finding("I1", f"{run} is {run.state}: its rows have not ended.")
        return
    ended = run.loaded + run.failed + run.reused
    if ended != run.rows:
        yield Finding(
            "I1", f"{run}: {counted(run.rows, 'row')}, but {ended} loaded, failed or reused."
        )
    if run.rows:
        yield from _of_keys(run, Snapshot.from_json(run.snapshot), artifacts, target)


def _of_keys(
    run: Run, snapshot: Snapshot, artifacts: Artifacts, target: Engine | Artifacts
) -> Iterator[Finding]:
    spec = JobSpec.from_json(run.spec)
    lost: list[int] = []
    twice: list[int] = []
    first = 0
    with (
        artifacts.open(snapshot.path) as stream,
        _look_up(run, spec, target, pq.read_schema(stream)) as found,
    ):
        for keys in pq.ParquetFile(stream).iter_batches(CHUNK_ROWS, columns=list(spec.source.key)):
            for row, ends in enumerate(zip(*found(keys), strict=True), start=first):
                if sum(ends) != 1:
                    (twice if all(ends) else lost).append(row)
            first += keys.num_rows
    for rows, problem in ((lost, "in neither"), (twice, "in both")):
        if rows:
            yield Finding(
                "I1",
                f"{run}: {counted(len(rows), 'row is', 'rows are')} {problem} of "
                f"{spec.target.results_place} and {spec.target.failures_place}, the first "
                f"at positions {rows[:SHOWN]} of its snapshot.",
            )


@contextmanager
def _look_up(
    run: Run, spec: JobSpec, target: Engine | Artifacts, schema: pa.Schema
) -> Iterator[LookUp]:
    """Yield what tells for each row of keys whether results, and whether failures, have it."""
    if isinstance(target, Artifacts):
        results, failures = ended_keys(target, run.interval_start, spec.source.key)

        def found(keys: pa.RecordBatch) -> Found:
            digests = key_digests(keys, spec.source.key)
            return results.has(digests).tolist(), failures.has(digests).tolist()

        yield found
        return
    if spec.queue is not None:
        yield lambda keys: ended_requests(target, run.run_id, keys.column(0).to_pylist())
        return
    with target.connect() as connection:
        tables = create_tables(target, spec, key_families(spec, schema))
        yield lambda keys: _found(connection, tables, keys)


def _found(connection: Connection, tables: TargetTables, keys: pa.RecordBatch) -> Found:
    """Tell for each row whether the results and whether the failures table has it."""
    texts = list(zip(*(column_texts(keys.column(name)) for name in tables.key), strict=True))
    digests = [key_digest(key_json(key)).hex() for key in texts]
    column = tables.failures.c["_key"]
    query = sa.select(column).where(column.in_(digests))
    failures = set(connection.scalars(query))
    values = stored_keys(connection, tables, keys)
    columns = [tables.results.c[name] for name in tables.key]
    rows = connection.execute(sa.select(*columns).where(sa.tuple_(*columns).in_(values)))
    results = {tuple(row) for row in rows}
    return [value in results for value in values], [one in failures for one in digests]


def stored_keys(
    connection: Connection, tables: TargetTables, keys: pa.RecordBatch
) -> list[tuple[Any, ...]]:
    """Return the keys as the results table holds them."""
    is_sqlite = connection.dialect.name == "sqlite"
    columns: list[list[Any]] = []
    for name in tables.key:
        column = keys.column(name)
        if name in tables.text_keys:
            columns.append(column_texts(column))
        elif is_sqlite and pa.types.is_temporal(column.type):
            columns.append([_iso(value) for value in column.to_pylist()])
        else:
            columns.append(column.to_pylist())
    return list(zip(*columns, strict=True))


def _iso(value: Any) -> str | None:
    if isinstance(value, datetime) and value.tzinfo:
        value = value.astimezone(UTC)
    return None if value is None else value.isoformat()


def _of_listing(
    run: Run, batches: Sequence[Batch], ledger: Ledger, api: BatchApi, skew: timedelta
) -> Iterator[Finding]:
    """I3: the API has no batch of this run that the ledger does not know, and the reverse.

    A POST that came too late and was refused leaves a failed batch of which nothing was processed;
    it may appear after the last look, and is no finding.
    """
    intents = [one.first_intent_at for one in batches if one.first_intent_at]
    if not intents:
        return
    ours = {one.batch_id for one in batches}
    extra = {one["batch_id"] for one in ledger.duplicates([one.submission_id for one in batches])}
    ownership = Ownership(ledger, [one.submission_id for one in batches])
    listed = set()
    for view in api.newest(min(intents) - skew):
        listed.add(view.batch_id)
        if view.status == BatchStatus.FAILED and not view.done:
            continue
        is_ours = ownership.of(view) is not None or view.metadata.get("run_id") == run.run_id
        if is_ours and view.batch_id not in ours | extra:
            yield Finding("I3", f"{run}: the ledger does not know {view.batch_id} ({view.status}).")
    for one in batches:
        if one.batch_id is None:
            yield Finding("I3", f"{one} has no batch.")
        elif one.batch_id not in listed and one.api_status != BatchStatus.LOST:
            yield from _of_unlisted(one, api)


def _of_unlisted(batch: Batch, api: BatchApi) -> Iterator[Finding]:
    try:
        api.retrieve(str(batch.batch_id))
    except NotThereError:
        yield Finding("I3", f"{batch}: the API does not know it, the ledger has {batch.state}.")


def _of_lines(batches: Sequence[Batch], artifacts: Artifacts) -> Iterator[Finding]:
    """I5: each line of the result files is an outcome, quarantined, a duplicate or blank."""
    for one in batches:
        outcomes = one.succeeded + one.retry + one.failed
        sent = counted(one.requests, "request")
        if one.state == BatchState.COLLECTED and outcomes != one.requests:
            yield Finding("I5", f"{one}: {sent}, but {counted(outcomes, 'outcome')}.")
        lines = sum(_lines_of(artifacts, path) for path in _result_files(one))
        known = outcomes - one.missing + one.quarantined + one.duplicates
        if lines != known:
            held = f"its files have {counted(lines, 'line')}"
            yield Finding("I5", f"{one}: {held}, {noun(known, 'is', 'are')} accounted for.")


def _result_files(batch: Batch) -> list[str]:
    stem = batch.request_file.removesuffix(".jsonl")
    return [f"{stem}.output.jsonl", f"{stem}.error.jsonl"]


def _lines_of(artifacts: Artifacts, path: str) -> int:
    if not artifacts.exists(path):
        return 0
    with artifacts.open(path) as stream:
        return sum(1 for _ in read_lines(stream))


def _of_history(run: Run, batches: Sequence[Batch], ledger: Ledger) -> Iterator[Finding]:
    """I7: every batch has come to its state along the drawn edges, without a gap."""
    ways: dict[str, list[tuple[str | None, str]]] = defaultdict(list)
    for event in ledger.history(run.run_id):
        if event["submission_id"] is not None:
            ways[event["submission_id"]].append((event["was"], event["became"]))
    for one in batches:
        way = ways[one.submission_id]
        states = [None, *(became for _, became in way)]
        if [was for was, _ in way] != states[:-1] or way[:1] != [(None, BatchState.PREPARED)]:
            yield Finding("I7", f"{one}: its history has a gap: {way}.")
        if states[-1] != one.state:
            yield Finding("I7", f"{one} is {one.state}, its history ends with {states[-1]}.")
        wrong = [edge for edge in way[1:] if edge not in EDGES]
        if wrong:
            yield Finding("I7", f"{one} moved where no edge is: {wrong}.")


def _rejected(number: int, batches: Sequence[Batch], artifacts: Artifacts) -> int:
    """Return how many rows the build of a round has rejected."""
    path = beside(batches, number, REJECTED_FILE)
    if path is None or not artifacts.exists(path):
        return 0
    with artifacts.open(path) as stream:
        return int(pq.ParquetFile(stream).metadata.num_rows)


def _of_bounds(
    run: Run, batches: Sequence[Batch], ledger: Ledger, artifacts: Artifacts
) -> Iterator[Finding]:
    """I8: no more rounds than allowed, each with the rows that the one before left open.

    Those that it could not send are in its rejected file.
    """
    spec = JobSpec.from_json(run.spec)
    rounds = ledger.rounds(run.run_id)
    numbers = [one.round for one in rounds]
    if numbers != list(range(1, len(rounds) + 1)) or len(rounds) > spec.retry.rounds:
        yield Finding("I8", f"{run}: rounds {numbers}, but {spec.retry.rounds} are allowed.")
    for before, after in pairwise(rounds):
        refused = 0
        if after.requests != before.retry:
            refused = _rejected(after.round, batches, artifacts)
        if after.requests + refused != before.retry:
            yield Finding(
                "I8",
                f"{run}: round {before.round} left {counted(before.retry, 'row')} open, "
                f"round {after.round} sent {after.requests:,} and refused {refused:,}.",
            )
    for one in rounds:
        sent = sum(batch.requests for batch in batches if batch.round == one.round)
        rows = counted(one.requests, "row")
        if sent != one.requests:
            yield Finding("I8", f"{run}: round {one.round} of {rows} sent {sent:,}.")
    estimate, limit = run.estimate_usd, spec.budget.max_usd
    if limit is not None and estimate is not None and estimate > limit:
        yield Finding("I8", f"{run}: its estimate ${estimate} is above the budget ${limit}.")

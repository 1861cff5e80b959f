"""The queue as a target: what became of each request goes into its own row.

One transaction: the terminal outcomes are staged, then one UPDATE moves the requests of the run
from processing to completed or failed. Loading again changes nothing, since nothing of the run is
processing any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import orjson
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from include import ledger_database
from include import ledger_tables as tables
from include.classification import HAS_RAN, NEVER_RAN, State
from include.cost import Usage, cost
from include.database_errors import database_errors
from include.ledger_records import now
from include.loading import LoadedRun, LoadReport, RoundFiles, RunFiles, retried
from include.outcome_columns import TOKEN_COLUMNS
from include.output_columns import Kind, request_columns
from include.queue_records import RequestState
from include.queue_spec import KEY
from include.retry_plan import is_terminal

Row = dict[str, Any]
NOTHING = (0, 0, 0, 0)  # tokens
_FILLED = (
    "state", "answer", "reason", "error_code", "error_message", "rounds", "batch_id", "custom_id",
    "input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens", "cost_usd",
)  # fmt: skip


@dataclass(frozen=True)
class Returned:
    """How the requests of a closed run went on."""

    completed: int
    failed: int
    queued: int


def load_into_queue(engine: Engine, run: LoadedRun, files: RunFiles) -> LoadReport:
    """Write answer or reason, tokens and cost to every request of a run.

    A request still open after the last round has failed. Raises what `loading.load_run` raises.
    """
    # Each try has ends of its own: those of a try that was broken off have added up its tokens.
    return retried(lambda: _load(engine, run.run_id, _Ends(files)))


def ended_requests(
    engine: Engine, run_id: str, request_ids: Sequence[str]
) -> tuple[list[bool], list[bool]]:
    """Tell for each request of a done run whether it is completed, and whether it has failed.

    One that was deleted since then counts as completed: retention is no loss.
    """
    columns = tables.queue.c
    query = sa.select(columns.request_id, columns.state).where(
        columns.request_id.in_(request_ids), columns.run_id == run_id
    )
    with ledger_database.reading(engine) as connection:
        states = {row.request_id: row.state for row in connection.execute(query)}
    found = [states.get(one, RequestState.COMPLETED) for one in request_ids]
    return (
        [state == RequestState.COMPLETED for state in found],
        [state == RequestState.FAILED for state in found],
    )


def give_back(connection: Connection, run_id: str, files: RunFiles) -> Returned:
    """End the requests of a run that is closed, or let them wait for the next drain.

    Ended is one that has an answer, has failed for good, or has cost something: the model was
    asked, whether or not the server tells what that used. Every other one is queued again.
    """
    _, changed = _staged(connection, run_id, _Ends(files, is_closing=True))
    columns = tables.queue.c
    left = connection.execute(
        sa.update(tables.queue)
        .where(columns.run_id == run_id, columns.state == RequestState.PROCESSING)
        .values(state=RequestState.QUEUED, run_id=None, claimed_at=None)
    ).rowcount
    return Returned(changed[RequestState.COMPLETED], changed[RequestState.FAILED], left)


def _load(engine: Engine, run_id: str, ends: _Ends) -> LoadReport:
    with (
        database_errors(engine, tables.queue.name),
        ledger_database.writing(engine) as connection,
    ):
        counts, changed = _staged(connection, run_id, ends)
    loaded, failed = counts[RequestState.COMPLETED], counts[RequestState.FAILED]
    return LoadReport(
        loaded,
        failed,
        failed,
        changed_results=changed[RequestState.COMPLETED],
        changed_failures=changed[RequestState.FAILED],
    )


def _staged(
    connection: Connection, run_id: str, ends: _Ends
) -> tuple[Mapping[RequestState, int], Mapping[RequestState, int]]:
    """Write the ends into the queue; return how many there are, and how many are new, by state."""
    counts = dict.fromkeys((RequestState.COMPLETED, RequestState.FAILED), 0)
    staging = _staging()
    staging.create(connection, checkfirst=False)
    for rows in ends.rows():
        connection.execute(sa.insert(staging), rows)
        for row in rows:
            counts[row["state"]] += 1
    changed = _end(connection, staging, run_id, now())
    staging.drop(connection, checkfirst=False)
    return counts, changed


def _staging() -> sa.Table:
    columns = (tables.queue.c[name] for name in (KEY, *_FILLED))
    return sa.Table(
        "llm_batch_queue_ended",
        sa.MetaData(),
        *(sa.Column(one.name, one.type, primary_key=one.name == KEY) for one in columns),
        prefixes=["TEMPORARY"],
    )


def _end(
    connection: Connection, staging: sa.Table, run_id: str, moment: datetime
) -> Mapping[RequestState, int]:
    """Move the staged requests to their end; return how many moved, by state."""
    queue = tables.queue
    changed = {}
    for state in (RequestState.COMPLETED, RequestState.FAILED):
        statement = (
            sa.update(queue)
            .where(
                queue.c.request_id == staging.c.request_id,
                queue.c.run_id == run_id,
                queue.c.state == RequestState.PROCESSING,
                staging.c.state == state,
            )
            .values(ended_at=moment, **{name: staging.c[name] for name in _FILLED})
        )
        changed[state] = connection.execute(statement).rowcount
    return changed


@dataclass
class _Ends:
    """What became of each request of a run, as rows for the queue.

    `_spent` holds the tokens of earlier tries, by position, of what is tried again: tokens that
    were used for nothing are few. `_unfinished` holds these tries themselves while a run is closed
    in the middle of its rounds: then no round is the last one.
    """

    files: RunFiles
    is_closing: bool = False
    _spent: dict[int, tuple[int, ...]] = field(default_factory=dict)
    _unfinished: dict[int, tuple[Row, int, str]] = field(default_factory=dict)

    def rows(self) -> Iterator[list[Row]]:
        """Yield every request of the run once."""
        for one in self.files.rounds:
            yield from self._of_round(one)
        if self.files.rejected_file:
            for batch in self.files.batches(self.files.rejected_file):
                yield [_never_sent(row) for row in batch.to_pylist()]
        if self._spent and self.is_closing:
            yield [
                self._ended(*self._unfinished[at], used) for at, used in list(self._spent.items())
            ]

    def _of_round(self, one: RoundFiles) -> Iterator[list[Row]]:
        left_out = self.files.left_out(one)
        for path, batch_id in zip(one.outcome_files, one.batch_ids, strict=True):
            for batch in self.files.batches(path):
                rows = [
                    self._ended(row, one.round, batch_id, self._tokens(row))
                    for row in left_out.judged(batch).to_pylist()
                    if self._is_terminal(row, one.round, batch_id)
                ]
                if rows:
                    yield rows

    def _is_terminal(self, row: Row, number: int, batch_id: str) -> bool:
        last = number + 1 if self.is_closing else self.files.last_round
        if is_terminal(State(row["_state"]), round_number=number, last_round=last):
            return True
        is_paid = row["_row"] in self._spent or self._has_run(row)
        used = self._tokens(row)
        if is_paid or any(used):
            self._spent[row["_row"]] = used
            if self.is_closing:
                self._unfinished[row["_row"]] = (row, number, batch_id)
        return False

    def _has_run(self, row: Row) -> bool:
        """Tell whether a closed run has to end a request that no tokens are told of."""
        return self.is_closing and row["_reason"] not in NEVER_RAN

    def _tokens(self, row: Row) -> tuple[int, ...]:
        """Return the tokens of this try and of those before."""
        now_used = (row[name] or 0 for name in TOKEN_COLUMNS)
        before = self._spent.pop(row["_row"], NOTHING)
        return tuple(map(sum, zip(now_used, before, strict=True)))

    def _ended(self, row: Row, number: int, batch_id: str, tokens: tuple[int, ...]) -> Row:
        is_success = row["_state"] == State.SUCCEEDED
        state = RequestState.COMPLETED if is_success else RequestState.FAILED
        return {
            KEY: row[KEY],
            "state": state,
            "answer": self._answer(row) if is_success else None,
            "reason": None if is_success else row["_reason"],
            "error_code": row["_error_code"],
            "error_message": row["_error_message"],
            "rounds": number,
            "batch_id": batch_id,
            "custom_id": row["_custom_id"],
            **{name.removeprefix("_"): n for name, n in zip(TOKEN_COLUMNS, tokens, strict=True)},
            "cost_usd": cost(
                Usage(*tokens),
                self.files.spec.request.priced_model,
                is_told=any(tokens) or not (is_success or row["_reason"] in HAS_RAN),
            ),
        }

    def _answer(self, row: Row) -> str | None:
        """Return the text of an answer; columns of a schema become a JSON object again."""
        request = self.files.spec.request
        columns = request_columns(request)
        if len(columns) == 1 and request.output_schema is None:
            return _text(row[columns[0].name])
        values = {column.name: _json_value(row[column.name], column.kind) for column in columns}
        return orjson.dumps(values).decode()


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    # Outcomes hold the bytes of a vector; as 32-bit floats its numbers have the fewest digits.
    vector = np.frombuffer(value, dtype="<f4")
    return orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY).decode()


def _json_value(value: Any, kind: Kind) -> Any:
    return orjson.Fragment(value) if kind is Kind.JSON and isinstance(value, str) else value


def _never_sent(row: Row) -> Row:
    """Return the end of a request that was rejected before it was sent."""
    return {
        **dict.fromkeys(_FILLED),
        KEY: row[KEY],
        "state": RequestState.FAILED,
        "reason": row["_reason"],
        "error_message": row["_error_message"],
        "rounds": 0,
    }

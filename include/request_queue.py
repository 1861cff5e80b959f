"""The request queue, as applications use it: put requests, ask for their state and result.

    queue = RequestQueue("postgresql+psycopg://app@host/llm_batch")
    queue.put("order-17", endpoint="/v1/responses", body={"model": "gpt-5-mini", "input": "…"})
    queue.state("order-17")             # RequestState.QUEUED
    queue.wait("order-17", 86_400).answer

The table `llm_batch_queue` is in the ledger's database; the DAGs of `llm_batch.queue_dag` drain
it. Any number of processes may use the queue at once, on PostgreSQL and SQLite.

    python -m include.request_queue --url postgresql+psycopg://… create | statistics
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine

from include import ledger_database
from include import ledger_tables as tables
from include.database_errors import translated
from include.errors import (
    ConfigurationError,
    LLMBatchError,
    PermanentError,
    RequestRefusedError,
    TransientError,
    UnknownRequestError,
)
from include.ledger_records import now
from include.queue_records import ENDED, QueueStatistics, RequestResult, RequestState
from include.queue_request import (
    QueueRequest,
    RequestCheck,
    StoredRequest,
    is_same,
    stored,
)

TABLE = tables.queue.name
JOBS = Path(__file__).parent / "jobs"
CHUNK = 1_000  # requests in one transaction of put_many
DELETED_AT_ONCE = 10_000  # requests in one transaction of delete_finished
POLL = 30.0  # seconds between two looks of `wait`
_RESULT_COLUMNS = [tables.queue.c[name] for name in RequestResult.__dataclass_fields__]
_STORED_COLUMNS = [tables.queue.c[name] for name in StoredRequest.__dataclass_fields__]
_INSERT: Mapping[str, Any] = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}


class RequestQueue:
    """The queue in one database: a SQLAlchemy URL or engine, on PostgreSQL or SQLite.

    `jobs_root` is where the job folders are, against which `job` and `row` are checked; None, for
    an application that has no copy of them, leaves that to the drain. Every method raises
    `TransientError` when the database does not answer, and `ConfigurationError` when it has no
    queue or may not be used; each may be called again.
    """

    def __init__(self, database: str | Engine, *, jobs_root: Path | None = JOBS) -> None:
        url = database.url if isinstance(database, Engine) else sa.make_url(database)
        if url.get_backend_name() not in _INSERT:
            raise ConfigurationError(
                f"The request queue is on PostgreSQL or SQLite, not on {url.get_backend_name()}."
            )
        engine = database if isinstance(database, Engine) else sa.create_engine(url)
        self.engine = ledger_database.prepare(engine)
        self._check = RequestCheck(jobs_root)

    def create(self) -> None:
        """Create the tables of the ledger, the queue among them, where they are missing.

        Only their owner has to do this; the DAGs do it as well.
        """
        ledger_database.migrate(self.engine)

    def put(
        self,
        request_id: str,
        *,
        endpoint: str | None = None,
        body: Mapping[str, Any] | None = None,
        job: str | None = None,
        row: Mapping[str, Any] | None = None,
        priority: int = 0,
    ) -> bool:
        """Put one request; False when the very same one is there already, whatever its state.

        Give `endpoint` and `body` (as the API reference has it, with `model`), or `job` and `row`
        (with the columns of the job's prompt). Raises `RequestRefusedError` when the request is
        wrong, or when its id stands for another request.
        """
        return self.put_many([QueueRequest(request_id, endpoint, body, job, row, priority)]) == 1

    def put_many(self, requests: Iterable[QueueRequest | Mapping[str, Any]]) -> int:
        """Put any number of requests; return how many were new.

        An item is a `QueueRequest`, or a mapping of its fields. Each 1,000 are one transaction:
        when one is refused, those before its 1,000 are in, and the same call can be made again.
        """
        waiting, put = iter(enumerate(requests, 1)), 0
        while chunk := list(islice(waiting, CHUNK)):
            put += self._put([self._checked(number, item) for number, item in chunk])
        return put

    def _checked(self, number: int, item: QueueRequest | Mapping[str, Any]) -> StoredRequest:
        request_id: Any = None
        try:
            request = item if isinstance(item, QueueRequest) else _request(item)
            request_id = request.request_id
            self._check.model(request)
            return stored(request)
        except RequestRefusedError as error:
            named = repr(request_id[:60]) if isinstance(request_id, str) else "without an id"
            raise RequestRefusedError(
                f"Request {named}, number {number} of the call: {error}. Nothing of it was put."
            ) from None

    def _put(self, requests: Sequence[StoredRequest]) -> int:
        table = tables.queue
        # Writers that put the same ids take their rows in one order, or they could deadlock.
        ordered = sorted(requests, key=lambda one: one.request_id)
        insert = (
            _INSERT[self.engine.dialect.name](table)
            .on_conflict_do_nothing(index_elements=[table.c.request_id])
            .returning(table.c.request_id)
        )
        with self._writing() as connection:
            new = connection.scalars(insert, [asdict(one) for one in ordered]).all()
            if len(new) < len(requests):
                _check_same(connection, requests)
            return len(new)

    def state(self, request_id: str) -> RequestState:
        """Return where a request is; raises `UnknownRequestError`."""
        return self.result(request_id).state

    def result(self, request_id: str) -> RequestResult:
        """Return all that is known of a request by now; raises `UnknownRequestError`."""
        with self._reading() as connection:
            query = sa.select(*_RESULT_COLUMNS).where(tables.queue.c.request_id == request_id)
            row = connection.execute(query).mappings().first()
        if row is None:
            raise _unknown(request_id)
        return RequestResult(**{**row, "state": RequestState(row["state"])})

    def wait(self, request_id: str, timeout: float, *, poll: float = POLL) -> RequestResult:
        """Return the result when the request has ended, however it ended; times are seconds.

        Raises `TimeoutError` when it has not ended by then. A batch may take 24 hours: an
        application that can come back later should.
        """
        until = time.monotonic() + timeout
        while not (found := self.result(request_id)).has_ended:
            if time.monotonic() >= until:
                raise TimeoutError(
                    f"Request {request_id!r} is {found.state} after {timeout:g} s; ask again later."
                )
            time.sleep(max(0.0, min(poll, until - time.monotonic())))
        return found

    def cancel(self, request_id: str) -> bool:
        """Cancel a request that still waits; return whether it is cancelled now.

        False when a run has taken it: it goes its way. Raises `UnknownRequestError`.
        """
        columns = tables.queue.c
        with self._writing() as connection:
            changed = connection.execute(
                sa.update(tables.queue)
                .where(columns.request_id == request_id, columns.state == RequestState.QUEUED)
                .values(state=RequestState.CANCELLED, ended_at=now())
            ).rowcount
        return bool(changed) or self.state(request_id) is RequestState.CANCELLED

    def statistics(self) -> QueueStatistics:
        """Return how many requests are in each state."""
        columns = tables.queue.c
        query = sa.select(columns.state, sa.func.count(), sa.func.min(columns.queued_at)).group_by(
            columns.state
        )
        with self._reading() as connection:
            found = {state: (count, oldest) for state, count, oldest in connection.execute(query)}
        counts = {state.value: found.get(state.value, (0, None))[0] for state in RequestState}
        return QueueStatistics(**counts, oldest_queued_at=found.get("queued", (0, None))[1])

    def count_finished(self, before: datetime) -> int:
        """Return how many requests `delete_finished` would delete."""
        query = sa.select(sa.func.count()).select_from(tables.queue).where(*_finished(before))
        with self._reading() as connection:
            return int(connection.scalar(query) or 0)

    def delete_finished(self, before: datetime) -> int:
        """Delete requests that ended before this time (aware); return how many.

        Deletes 10,000 in a transaction, so that nobody waits for it.
        """
        columns, deleted = tables.queue.c, 0
        old = sa.select(columns.request_id).where(*_finished(before)).limit(DELETED_AT_ONCE)
        while True:
            with self._writing() as connection:
                statement = sa.delete(tables.queue).where(columns.request_id.in_(old))
                count = connection.execute(statement).rowcount
            deleted += count
            if count < DELETED_AT_ONCE:
                return deleted

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with _database_errors(), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with (
            _database_errors(),
            self.engine.connect().execution_options(ledger_writes=True) as connection,
            connection.begin(),
        ):
            yield connection


def _finished(before: datetime) -> tuple[sa.ColumnElement[bool], ...]:
    return tables.queue.c.state.in_(ENDED), tables.queue.c.ended_at < before


@contextmanager
def _database_errors() -> Iterator[None]:
    """Turn what the database says into errors that tell an application what to do."""
    try:
        yield
    except sa.exc.SQLAlchemyError as error:
        # The driver's error may hold a request's body: it must not be chained or shown.
        raise _translated(error) from None


def _translated(error: sa.exc.SQLAlchemyError) -> LLMBatchError:
    kind = type(translated(error, TABLE))
    line = str(getattr(error, "orig", None) or type(error).__name__).partition("\n")[0]
    if kind is TransientError:
        return TransientError(f"The queue's database did not answer: {line}. Call again.")
    if kind is ConfigurationError:
        return ConfigurationError(
            f"The queue cannot be used: {line}. Its tables are made by the owner of the ledger "
            "(python -m include.request_queue --url URL create); docs/request-queue.md has the "
            "rights that an application needs."
        )
    return PermanentError(
        f"Table {TABLE}: the database refused ({type(error).__name__}; its message may quote a "
        "request and is left out)."
    )


def _request(item: Mapping[str, Any]) -> QueueRequest:
    try:
        return QueueRequest(**item)
    except TypeError:
        allowed = ", ".join(QueueRequest.__dataclass_fields__)
        raise RequestRefusedError(
            f"its fields are {', '.join(map(str, item))}; expected request_id and some of {allowed}"
        ) from None


def _check_same(connection: Connection, requests: Sequence[StoredRequest]) -> None:
    """Raise `RequestRefusedError` when an id of `requests` stands for another request."""
    query = sa.select(*_STORED_COLUMNS).where(
        tables.queue.c.request_id.in_([one.request_id for one in requests])
    )
    there = {row["request_id"]: row for row in connection.execute(query).mappings()}
    for one in requests:
        found = there.get(one.request_id)
        if found is not None and not is_same(one, StoredRequest(**found)):
            raise RequestRefusedError(
                f"Request {one.request_id!r} is there already and asks something else. An id "
                "stands for one request for good: put the new one under another id."
            )


def _unknown(request_id: str) -> UnknownRequestError:
    return UnknownRequestError(
        f"The queue has no request {request_id!r}. It was never put, or was deleted after it ended."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Create the tables, or print the statistics."""
    parser = argparse.ArgumentParser(prog="python -m include.request_queue")
    parser.add_argument("--url", required=True, help="SQLAlchemy URL of the ledger's database")
    parser.add_argument("command", choices=("create", "statistics"))
    chosen = parser.parse_args(arguments)
    queue = RequestQueue(chosen.url)
    try:
        if chosen.command == "create":
            queue.create()
        found = queue.statistics()
    except LLMBatchError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    for name, value in asdict(found).items():
        sys.stdout.write(f"{name:17} {'-' if value is None else value}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

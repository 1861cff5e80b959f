"""The ledger: the durable record of runs, their rounds, and their batches.

A change of state is one method, one transaction. What it does to batches is in `ledger_batches`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, RowMapping

from include import ledger_database
from include import ledger_queries as queries
from include import ledger_tables as tables
from include.errors import ConfigurationError
from include.ledger_batches import BatchLedger
from include.ledger_records import (
    AT_REST,
    Batch,
    BatchState,
    NewBatch,
    Partition,
    Round,
    Run,
    RunState,
    digest,
    now,
)
from include.rival_runs import overtaken_by


class Ledger(BatchLedger):
    """Runs, rounds and batches in one SQL database.

    `engine` is a SQLAlchemy engine on SQLite or PostgreSQL. Creating a ledger applies missing
    migrations. Every method raises `TransientError` when the database does not answer.
    """

    # Runs

    def open_run(
        self,
        partition: Partition,
        *,
        spec_digest: str,
        spec: str,
        mode: str,
        dag_id: str,
        dag_run_id: str,
        begin: Callable[[Connection, str], None] | None = None,
    ) -> Run:
        """Return the open run of this partition and spec, or begin the next generation.

        An open run goes on with the limits, budget and alert that `spec` has now. A closed one is
        opened again while its artifacts are there, and no other run has loaded its rows: what it
        has paid for is not paid twice.

        Two Airflow runs over one partition share one run here, so all that they do is the same
        work with the same ids. `begin` gets the id of a run that begins, in its transaction: what
        it does happens with the run or, when it raises, neither does.
        """
        with ledger_database.writing(self.engine) as connection:
            ledger_database.exclusive(connection)
            last = queries.last_run(connection, partition, spec_digest, mode)
            if last is not None and _goes_on(connection, last):
                queries.reopen(connection, last)
                queries.take_part(connection, last.run_id, dag_id, dag_run_id)
                return self._joined(connection, last, spec)
            generation = 1 if last is None else last.generation + 1
            run_id = digest(
                partition.job,
                partition.start.astimezone(UTC).isoformat(),
                partition.end.astimezone(UTC).isoformat(),
                spec_digest,
                mode,
                generation,
            )
            connection.execute(
                sa.insert(tables.run).values(
                    run_id=run_id,
                    job=partition.job,
                    interval_start=partition.start,
                    interval_end=partition.end,
                    spec_digest=spec_digest,
                    mode=mode,
                    generation=generation,
                    state=RunState.OPEN,
                    spec=spec,
                    dag_id=dag_id,
                    dag_run_id=dag_run_id,
                    created_at=now(),
                )
            )
            queries.take_part(connection, run_id, dag_id, dag_run_id)
            queries.note(connection, run_id, None, None, RunState.OPEN, f"generation {generation}")
            if begin is not None:
                begin(connection, run_id)
            return queries.run(connection, run_id)

    def last_run(self, partition: Partition, *, spec_digest: str, mode: str) -> Run | None:
        """Return the newest generation of a partition's run, if there is one."""
        with ledger_database.reading(self.engine) as connection:
            return queries.last_run(connection, partition, spec_digest, mode)

    def run(self, run_id: str) -> Run:
        """Return one run; raises `ConfigurationError` when the ledger does not know it."""
        with ledger_database.reading(self.engine) as connection:
            return queries.run(connection, run_id)

    def runs(self, job: str | None = None, limit: int = 1000) -> list[Run]:
        """Return the newest runs first, of one job or of all."""
        query = sa.select(tables.run).order_by(tables.run.c.created_at.desc()).limit(limit)
        if job is not None:
            query = query.where(tables.run.c.job == job)
        with ledger_database.reading(self.engine) as connection:
            return [Run(**row) for row in connection.execute(query).mappings()]

    def keep_snapshot(
        self, run_id: str, snapshot: str, rows: int, *, instead_of: str | None
    ) -> Run:
        """Record the snapshot if the run still has `instead_of` (None: none yet).

        Two tasks may extract at once: the first one stays, and everybody goes on with the
        returned run's snapshot.
        """
        has_changed = tables.run.c.snapshot.is_distinct_from(instead_of)
        with ledger_database.writing(self.engine) as connection:
            connection.execute(
                sa.update(tables.run)
                .where(tables.run.c.run_id == run_id, sa.not_(has_changed))
                .values(snapshot=snapshot, rows=rows)
            )
            return queries.run(connection, run_id)

    def count_run(self, run_id: str, **values: Any) -> None:
        """Set counts and money of an open run (`reused`, `rejected`, `estimate_usd`, …)."""
        with ledger_database.writing(self.engine) as connection:
            queries.count(connection, run_id, values)

    def count_first(self, run_id: str, **values: Any) -> bool:
        """Set what a build of round 1 has counted; False when another build has been faster.

        Then the run has the counts of the files that are sent, and keeps them.
        """
        with ledger_database.writing(self.engine) as connection:
            ledger_database.exclusive(connection)
            is_open = queries.run(connection, run_id).state == RunState.OPEN
            if not is_open or queries.round_of(connection, run_id, 1) is not None:
                return False
            queries.count(connection, run_id, values)
            return True

    def finish_run(self, run_id: str, **values: Any) -> bool:
        """Move a run from OPEN to DONE; False when it is DONE already."""
        with ledger_database.writing(self.engine) as connection:
            changed = connection.execute(
                sa.update(tables.run)
                .where(tables.run.c.run_id == run_id, tables.run.c.state == RunState.OPEN)
                .values(state=RunState.DONE, done_at=now(), **values)
            ).rowcount
            if changed:
                queries.note(connection, run_id, None, RunState.OPEN, RunState.DONE)
            return bool(changed)

    def close_run(
        self,
        run_id: str,
        *,
        end: Callable[[Connection], dict[str, int]] = lambda _connection: {},
        **values: Any,
    ) -> bool:
        """Move a run from OPEN to CLOSED, with its counts and money; False when it is not OPEN.

        `end` returns more counts: what it does happens with the closing or, when it raises,
        neither does. Raises `ConfigurationError` when one of its batches is not collected, or may
        be made.
        """
        with ledger_database.writing(self.engine) as connection:
            ledger_database.exclusive(connection)
            for one in queries.batches(connection, run_id):
                if one.state not in AT_REST:
                    raise ConfigurationError(
                        f"{one} is {one.state}: its run cannot be closed before it is collected."
                    )
            is_open = (tables.run.c.run_id == run_id, tables.run.c.state == RunState.OPEN)
            change = sa.update(tables.run).where(*is_open)
            state = {"state": RunState.CLOSED, "done_at": now()}
            if not connection.execute(change.values(**state, **values)).rowcount:
                return False
            counts = end(connection)
            if counts:
                ours = tables.run.c.run_id == run_id
                connection.execute(sa.update(tables.run).where(ours).values(**counts))
            queries.note(connection, run_id, None, RunState.OPEN, RunState.CLOSED)
            return True

    # Rounds

    def build_round(
        self,
        run_id: str,
        number: int,
        batches: Sequence[NewBatch],
        *,
        check: Callable[[Connection], None] | None = None,
    ) -> list[Batch]:
        """Record a round with its request files, or return those that are recorded already.

        A new round is recorded only if `check` does not raise: it looks at the ledger under the
        same lock, so what it has seen is still true when the round is there.
        """
        with ledger_database.writing(self.engine) as connection:
            ledger_database.exclusive(connection)
            queries.check_not_closed(connection, run_id)
            if queries.round_of(connection, run_id, number) is None:
                if check is not None:
                    check(connection)
                connection.execute(
                    sa.insert(tables.round_).values(
                        run_id=run_id,
                        round=number,
                        state="BUILT",
                        requests=sum(new.requests for new in batches),
                        built_at=now(),
                    )
                )
                for new in batches:
                    self._prepare(connection, new)
            return queries.batches(connection, run_id, number)

    def settle_round(self, run_id: str, number: int) -> Round:
        """Add up a round whose batches are all collected; raises `ConfigurationError` before."""
        with ledger_database.writing(self.engine) as connection:
            batches = queries.batches(connection, run_id, number)
            open_ = [one for one in batches if one.state != BatchState.COLLECTED]
            if open_:
                raise ConfigurationError(
                    f"Round {number} of run {run_id} cannot be settled: {open_[0]} is "
                    f"{open_[0].state}. Clear its task; the rest of the round goes on from there."
                )
            totals = {
                name: sum(getattr(one, name) for one in batches)
                for name in ("requests", "succeeded", "retry", "failed", "missing")
            }
            connection.execute(
                sa.update(tables.round_)
                .where(tables.round_.c.run_id == run_id, tables.round_.c.round == number)
                .values(state="SETTLED", settled_at=now(), **totals)
            )
            found = queries.round_of(connection, run_id, number)
            if found is None:
                raise ConfigurationError(f"Run {run_id} has no round {number}.")
            return found

    def rounds(self, run_id: str) -> list[Round]:
        """Return the rounds of a run in order."""
        query = (
            sa.select(tables.round_)
            .where(tables.round_.c.run_id == run_id)
            .order_by(tables.round_.c.round)
        )
        with ledger_database.reading(self.engine) as connection:
            return [Round(**row) for row in connection.execute(query).mappings()]

    def history(self, run_id: str) -> list[RowMapping]:
        """Return every change of state of a run, oldest first."""
        query = (
            sa.select(tables.event)
            .where(tables.event.c.run_id == run_id)
            .order_by(tables.event.c.event_id)
        )
        with ledger_database.reading(self.engine) as connection:
            return list(connection.execute(query).mappings())

    # Inside a transaction

    def _joined(self, connection: Connection, run: Run, spec: str) -> Run:
        """Take over what of the spec does not shape requests: limits, rounds, budget, alert."""
        if run.spec == spec:
            return run
        connection.execute(
            sa.update(tables.run).where(tables.run.c.run_id == run.run_id).values(spec=spec)
        )
        changed = "limits, rounds, canary, budget or alert of the job have changed"
        queries.note(connection, run.run_id, None, RunState.OPEN, RunState.OPEN, changed)
        return queries.run(connection, run.run_id)

    def _prepare(self, connection: Connection, new: NewBatch) -> None:
        known = connection.execute(
            sa.select(tables.batch.c.state).where(tables.batch.c.submission_id == new.submission_id)
        ).first()
        if known is not None:
            return
        connection.execute(
            sa.insert(tables.batch).values(
                submission_id=new.submission_id, state=BatchState.PREPARED, **vars(new)
            )
        )
        queries.note(connection, new.run_id, new.submission_id, None, BatchState.PREPARED)


def _goes_on(connection: Connection, run: Run) -> bool:
    if run.state == RunState.CLOSED:
        # One that has sent nothing has nothing to keep, and one that was overtaken cannot go on:
        # what they would send may be, or is, loaded by now.
        batches = queries.batches(connection, run.run_id)
        has_sent = any(one.state == BatchState.COLLECTED for one in batches)
        is_whole = has_sent and run.artifacts_deleted_at is None
        return is_whole and overtaken_by(connection, batches) is None
    return run.state == RunState.OPEN

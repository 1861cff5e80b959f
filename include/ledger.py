"""The ledger: the durable record of runs, rounds and batches.

Every change of state is one method here, one transaction, guarded by compare-and-set: it says
which states it may leave, and does nothing when another process was faster. Each change also
writes a line of history, so that the way of every batch can be told afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, timedelta
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, RowMapping

from include import batch_status, ledger_database
from include import ledger_queries as queries
from include import ledger_tables as tables
from include.errors import ConfigurationError
from include.ledger_records import (
    AT_REST,
    Batch,
    BatchState,
    Claim,
    NewBatch,
    Partition,
    Round,
    Run,
    RunState,
    digest,
    now,
)
from include.rival_runs import check_not_overtaken


class Ledger:
    """Runs, rounds and batches in one SQL database.

    `engine` is a SQLAlchemy engine on SQLite or PostgreSQL. Creating a ledger applies missing
    migrations. Every method raises `TransientError` when the database does not answer.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = ledger_database.prepare(engine)
        ledger_database.migrate(self.engine)

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
        opened again while its artifacts are there: what it has paid for is not paid twice.

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

    # Batches

    def batch(self, submission_id: str) -> Batch:
        """Return one batch; raises `ConfigurationError` when the ledger does not know it."""
        with ledger_database.reading(self.engine) as connection:
            return queries.batch(connection, submission_id)

    def batches(self, run_id: str, number: int | None = None) -> list[Batch]:
        """Return the batches of a run, or of one of its rounds, in order."""
        with ledger_database.reading(self.engine) as connection:
            return queries.batches(connection, run_id, number)

    def batch_by_id(self, batch_id: str) -> Batch | None:
        """Return the row of a batch by the API's own id."""
        query = sa.select(tables.batch).where(tables.batch.c.batch_id == batch_id)
        with ledger_database.reading(self.engine) as connection:
            row = connection.execute(query).mappings().first()
            return None if row is None else Batch(**row)

    def claim(
        self, submission_id: str, *, owner: str, lease: timedelta, enqueued_tokens: int | None
    ) -> Claim | None:
        """Take the right to create this batch, or None when somebody else has it or must go first.

        A claim whose holder has been silent for `lease` is taken over. With `enqueued_tokens`,
        a batch that would exceed this limit of its connection and model has to wait, and the
        shards of a round go in order. Raises `ConfigurationError` when its run is closed, or when
        another run has loaded, or sent, its rows meanwhile.
        """
        with ledger_database.writing(self.engine) as connection:
            ledger_database.exclusive(connection)
            batch = queries.batch(connection, submission_id)
            queries.check_not_closed(connection, batch.run_id)
            check_not_overtaken(connection, batch)
            silent_since = now() - lease
            was_claimed = batch.state == BatchState.SUBMITTING
            if was_claimed and batch.intent_at is not None and batch.intent_at > silent_since:
                return None
            if not was_claimed and not queries.is_admitted(connection, batch, enqueued_tokens):
                return None
            is_ours = self._move(
                connection,
                batch,
                (BatchState.PREPARED, BatchState.SUBMITTING),
                BatchState.SUBMITTING,
                epoch=batch.epoch + 1,
                owner=owner,
                intent_at=now(),
                first_intent_at=batch.first_intent_at or now(),
                error=None,
            )
            if not is_ours:
                return None
            return Claim(queries.batch(connection, submission_id), is_takeover=was_claimed)

    def uploaded(self, claim: Batch, file_id: str) -> bool:
        """Record the file that the batch will be created from; False when it was taken over.

        It is kept after the batch names another one: a batch made from it may be listed late.
        """
        with ledger_database.writing(self.engine) as connection:
            is_ours = self._hold(connection, claim, intent_at=now(), file_id=file_id)
            if is_ours:
                queries.keep_input_file(connection, claim.submission_id, file_id)
            return is_ours

    def input_files(self, submission_ids: Sequence[str]) -> dict[str, str]:
        """Return the submission of each file that was ever uploaded for one of these."""
        table = tables.input_file
        query = sa.select(table).where(table.c.submission_id.in_(submission_ids))
        with ledger_database.reading(self.engine) as connection:
            found = connection.execute(query).mappings()
            return {row["file_id"]: row["submission_id"] for row in found}

    def still_ours(self, claim: Batch, **values: Any) -> bool:
        """Say that the holder is alive, and record `values` (`file_id`); False when taken over."""
        return self._touch(claim, intent_at=now(), **values)

    def submitted(self, claim: Batch, batch_id: str, api_status: str) -> bool:
        """Record the batch that the API made for this claim; False when it was taken over."""
        return self._leave_submitting(
            claim,
            BatchState.SUBMITTED,
            batch_id,
            batch_id=batch_id,
            api_status=batch_status.normal(api_status),
            submitted_at=now(),
            progress_at=now(),
        )

    def release(self, claim: Batch, error: str) -> bool:
        """Give a claim back: the API refused for certain, no batch was made."""
        return self._leave_submitting(claim, BatchState.PREPARED, error, error=error)

    def abandon(self, claim: Batch) -> bool:
        """Let anybody take the claim over at once; a batch may have been made, so they look."""
        return self._touch(claim, intent_at=None)

    def _touch(self, claim: Batch, **values: Any) -> bool:
        """Record `values` while the claim is held; no change of state, so no line of history."""
        with ledger_database.writing(self.engine) as connection:
            return self._hold(connection, claim, **values)

    def _hold(self, connection: Connection, claim: Batch, **values: Any) -> bool:
        columns = tables.batch.c
        changed = connection.execute(
            sa.update(tables.batch)
            .where(
                columns.submission_id == claim.submission_id,
                columns.state == BatchState.SUBMITTING,
                columns.epoch == claim.epoch,
            )
            .values(**values)
        ).rowcount
        return bool(changed)

    def requeue(self, batch: Batch) -> bool:
        """Move a batch that only hit the token limit back to PREPARED, to be created again.

        The refused batch is kept in `llm_batch_duplicate`, so that nobody adopts it. A `batch`
        read before it was submitted says nothing about the batch that was made since.
        """
        if batch.batch_id is None:
            return False
        with ledger_database.writing(self.engine) as connection:
            changed = self._move(
                connection,
                batch,
                (BatchState.SUBMITTED,),
                BatchState.PREPARED,
                f"{batch.batch_id} hit the token limit",
                batch_id=None,
                api_status=None,
            )
            if changed:
                connection.execute(
                    sa.insert(tables.duplicate).values(
                        batch_id=batch.batch_id,
                        submission_id=batch.submission_id,
                        kept_batch_id="",
                        found_at=now(),
                        api_status="failed",
                    )
                )
            return changed

    def _leave_submitting(self, claim: Batch, to: BatchState, detail: str, **values: Any) -> bool:
        with ledger_database.writing(self.engine) as connection:
            return self._move(
                connection, claim, (BatchState.SUBMITTING,), to, detail, epoch=claim.epoch, **values
            )

    def polled(self, batch_id: str, *, api_status: str, done: int, failed: int) -> None:
        """Record what a poll saw; `progress_at` moves only when something has changed."""
        status = batch_status.normal(api_status)
        columns = tables.batch.c
        with ledger_database.writing(self.engine) as connection:
            changed = sa.or_(
                columns.api_status.is_distinct_from(status),
                columns.done_requests != done,
                columns.failed_requests != failed,
            )
            connection.execute(
                sa.update(tables.batch)
                .where(columns.batch_id == batch_id, columns.state == BatchState.SUBMITTED)
                .values(
                    api_status=status,
                    done_requests=done,
                    failed_requests=failed,
                    polled_at=now(),
                    progress_at=sa.case((changed, now()), else_=columns.progress_at),
                )
            )

    def ended(self, batch: Batch, *, api_status: str, done: int, failed: int) -> bool:
        """Move a batch to ENDED with its final status; False when it is there already."""
        with ledger_database.writing(self.engine) as connection:
            return self._move(
                connection,
                batch,
                (BatchState.SUBMITTED,),
                BatchState.ENDED,
                api_status,
                api_status=batch_status.normal(api_status),
                done_requests=done,
                failed_requests=failed,
                polled_at=now(),
                ended_at=now(),
            )

    def collected(self, batch: Batch, *, reasons: Mapping[str, int], **values: Any) -> bool:
        """Move a batch to COLLECTED with its counts, tokens and money."""
        with ledger_database.writing(self.engine) as connection:
            return self._move(
                connection,
                batch,
                (BatchState.ENDED,),
                BatchState.COLLECTED,
                collected_at=now(),
                reasons=json.dumps(dict(reasons), sort_keys=True),
                **values,
            )

    # Duplicates

    def record_duplicate(
        self, batch_id: str, *, kept: Batch, api_status: str, done: int, cost: Decimal | None
    ) -> bool:
        """Record a second batch of one request file; False when it was known."""
        with ledger_database.writing(self.engine) as connection:
            ledger_database.exclusive(connection)
            table = tables.duplicate
            found = {
                "api_status": batch_status.normal(api_status),
                "done_requests": done,
                "cost_usd": cost,
            }
            changed = connection.execute(
                sa.update(table).where(table.c.batch_id == batch_id).values(**found)
            ).rowcount
            if changed:
                return False
            connection.execute(
                sa.insert(table).values(
                    batch_id=batch_id,
                    submission_id=kept.submission_id,
                    kept_batch_id=kept.batch_id,
                    found_at=now(),
                    **found,
                )
            )
            return True

    def duplicates(self, submission_ids: Sequence[str]) -> list[RowMapping]:
        """Return the recorded duplicates of these submissions."""
        query = sa.select(tables.duplicate).where(
            tables.duplicate.c.submission_id.in_(submission_ids)
        )
        with ledger_database.reading(self.engine) as connection:
            return list(connection.execute(query).mappings())

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

    def _move(
        self,
        connection: Connection,
        batch: Batch,
        from_states: Sequence[BatchState],
        to: BatchState,
        detail: str | None = None,
        **values: Any,
    ) -> bool:
        """Change the state if it is still one of `from_states` and nobody has claimed it since."""
        columns = tables.batch.c
        changed = connection.execute(
            sa.update(tables.batch)
            .where(
                columns.submission_id == batch.submission_id,
                columns.state.in_(from_states),
                columns.epoch == batch.epoch,
            )
            .values(state=to, **values)
        ).rowcount
        if changed:
            was = from_states[0] if len(from_states) == 1 else batch.state
            queries.note(connection, batch.run_id, batch.submission_id, was, to, detail)
        return bool(changed)


def _goes_on(connection: Connection, run: Run) -> bool:
    if run.state == RunState.CLOSED:
        # One that has sent nothing has nothing to keep: what it would send may be loaded by now.
        batches = queries.batches(connection, run.run_id)
        has_sent = any(one.state == BatchState.COLLECTED for one in batches)
        return has_sent and run.artifacts_deleted_at is None
    return run.state == RunState.OPEN

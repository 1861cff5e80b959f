"""The batches of the ledger: who may create one, what the API made of it, how it ended.

Every change of state is one method here, one transaction, guarded by compare-and-set: it says
which states it may leave, and does nothing when another process was faster. Each change also
writes a line of history, so that the way of every batch can be told afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, RowMapping

from include import batch_status, ledger_database
from include import ledger_queries as queries
from include import ledger_tables as tables
from include.ledger_records import Batch, BatchState, Claim, now
from include.rival_runs import check_not_overtaken


class BatchLedger:
    """The part of `include.ledger.Ledger` that is about single batches.

    `engine` is a SQLAlchemy engine on SQLite or PostgreSQL. Creating a ledger applies missing
    migrations. Every method raises `TransientError` when the database does not answer.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = ledger_database.prepare(engine)
        ledger_database.migrate(self.engine)

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

    # Inside a transaction

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

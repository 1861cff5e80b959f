"""Cleaning up behind the runs: orphan batches, files at the provider, artifacts, the ledger.

Every chore first finds what is due, and touches it only with `apply`. It touches only what this
ledger knows to be ours: a batch by the `submission_id` in its metadata, a file by the id that the
ledger has recorded, artifacts by the folder of a run. A run that is open, and a batch that is not
final, is left alone. What a chore has done it records last, so that one that was killed at any
line does the same again, to the same end. A connection that fails does not keep the others back: a
chore does what it can, and raises that connection's error at its end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from include import ledger_database
from include import ledger_tables as tables
from include.artifacts import Artifacts
from include.batch_view import BatchView
from include.chore import Chore, Failing
from include.errors import LLMBatchError, NotOfferedError, NotThereError
from include.figures import counted
from include.ledger import Ledger
from include.ledger_records import OVER, Batch, BatchState, Run, RunState, now
from include.rival_runs import overtaken_by
from include.submission import drop_duplicate

if TYPE_CHECKING:
    from include.batch_api import BatchApi

log = logging.getLogger(__name__)

PAGE = 200  # rows of the ledger at a time
WORTH_IT = ".jsonl"  # files to compress: Parquet is compressed already
HOLDER = "housekeeping"


@dataclass(frozen=True)
class Keep:
    """For how long what is kept, in days after its run was loaded or closed; 0 keeps it for ever.

    `files_days` is different: 0 deletes the files at the provider as soon as the run is loaded.
    """

    files_days: float = 1.0  #: input, output and error files at the provider
    plain_days: float = 14.0  #: artifacts as they are; compressed afterwards
    artifacts_days: float = 90.0  #: artifacts at all
    requests_days: float = 0.0  #: requests of the queue, after they have ended
    history_days: float = 730.0  #: history in the ledger; runs, batches and their money stay
    orphan_days: float = 8.0  #: how far back orphan batches are looked for at the API
    quiet_hours: float = 1.0  #: of silence before a submission counts as left behind


@dataclass
class Housekeeping:
    """The chores over one ledger; `api` opens a connection by its id."""

    ledger: Ledger
    artifacts: Artifacts
    api: Callable[[str], BatchApi]
    keep: Keep = field(default_factory=Keep)
    apply: bool = False
    clock: Callable[[], datetime] = now

    def orphans(self) -> Chore:
        """Adopt or cancel batches that carry an id of ours, and that the ledger does not name.

        Adopted is the batch of a submission that waits and that nobody has been at for
        `quiet_hours`. Cancelled is one beside another of the same submission. Batches with an id
        that this ledger does not know are somebody else's.
        """
        chore = Chore("orphan batches", self.apply)
        since = self._ago(days=self.keep.orphan_days)
        failing = Failing()
        for conn_id in self._conn_ids(tables.batch.c.first_intent_at >= since):
            with failing.apart(conn_id):
                self._orphans_of(conn_id, since, chore)
        failing.tell()
        return chore

    def _orphans_of(self, conn_id: str, since: datetime, chore: Chore) -> None:
        api = self.api(conn_id)
        try:
            for view in api.newest(since):
                self._orphan(view, conn_id, api, chore)
        except NotOfferedError:
            chore.lines.append(f"{conn_id}: the server lists no batches.")

    def _orphan(self, view: BatchView, conn_id: str, api: BatchApi, chore: Chore) -> None:
        batch = self._owner(view)
        if batch is None or batch.conn_id != conn_id:
            chore.note("not ours, left alone")
            return
        if batch.batch_id == view.batch_id or self._is_settled(view):
            chore.note("known")
        elif batch.batch_id is not None:
            chore.note("second batches", f"{batch}: {view.batch_id} ({view.status}) is beside it.")
            if self.apply:
                drop_duplicate(self.ledger, api, batch, view)
        elif view.status == "failed":
            chore.note("known")  # refused: nothing was processed, nothing to adopt
        else:
            self._adopt(batch, view, chore)

    def _owner(self, view: BatchView) -> Batch | None:
        if view.submission_id is None:
            return None
        query = sa.select(tables.batch).where(tables.batch.c.submission_id == view.submission_id)
        with ledger_database.reading(self.ledger.engine) as connection:
            row = connection.execute(query).mappings().first()
        return None if row is None else Batch(**row)

    def _is_settled(self, view: BatchView) -> bool:
        """Tell whether it is a known duplicate that needs no cancelling any more."""
        found = self.ledger.duplicates([str(view.submission_id)])
        return view.is_final and view.batch_id in {one["batch_id"] for one in found}

    def _adopt(self, batch: Batch, view: BatchView, chore: Chore) -> None:
        if self.ledger.run(batch.run_id).state == RunState.CLOSED:
            self._cancel_late(batch, view, chore, "of closed runs")
            return
        if self._is_overtaken(batch):
            self._cancel_late(batch, view, chore, "of overtaken runs")
            return
        silent = self.clock() - (batch.intent_at or view.created_at)
        if silent < timedelta(hours=self.keep.quiet_hours):
            chore.note("being submitted, left alone")
            return
        chore.note("adopted", f"{batch}: {view.batch_id} ({view.status}) is its batch.")
        if not self.apply:
            return
        claim = self.ledger.claim(
            batch.submission_id, owner=HOLDER, lease=timedelta(0), enqueued_tokens=None
        )
        if claim is not None:
            self.ledger.submitted(claim.batch, view.batch_id, view.status)

    def _is_overtaken(self, batch: Batch) -> bool:
        """Tell whether another run has loaded, or sent, its rows: nobody may submit it any more."""
        with ledger_database.reading(self.ledger.engine) as connection:
            return overtaken_by(connection, [batch]) is not None

    def _cancel_late(self, batch: Batch, view: BatchView, chore: Chore, what: str) -> None:
        """Cancel a batch that was listed only when nobody could collect it any more."""
        if view.is_final:
            chore.note("known")
            return
        chore.note(what, f"{batch}: {view.batch_id} ({view.status}) is cancelled.")
        if self.apply:
            self.api(batch.conn_id).cancel(view.batch_id)

    def files(self) -> Chore:
        """Delete input, output and error files at the provider of runs that are loaded."""
        chore = Chore("files at the provider", self.apply)
        columns = tables.batch.c
        is_due = (
            columns.state == BatchState.COLLECTED,
            columns.files_deleted_at.is_(None),
            columns.run_id.in_(self._done_before(self.keep.files_days)),
        )
        failing = Failing()
        for batch in self._batches(*is_due):
            if batch.conn_id in failing.errors:
                continue
            with failing.apart(batch.conn_id):
                number = self.delete_files(batch) if self.apply else len(self._file_ids(batch))
                chore.counts["files"] = chore.counts.get("files", 0) + number
                chore.note("batches", f"{batch}: {counted(number, 'file')}.")
        failing.tell()
        return chore

    def delete_files(self, batch: Batch) -> int:
        """Delete the files of one batch at the provider; return how many."""
        ids = self._file_ids(batch)
        for one in ids:
            self.api(batch.conn_id).delete_file(one)
        self._note_deleted(batch)
        return len(ids)

    def _note_deleted(self, batch: Batch) -> None:
        table = tables.batch
        with ledger_database.writing(self.ledger.engine) as connection:
            connection.execute(
                sa.update(table)
                .where(table.c.submission_id == batch.submission_id)
                .values(files_deleted_at=self.clock())
            )

    def _file_ids(self, batch: Batch) -> list[str]:
        """Return the files of a batch; a release before this one did not record the results'."""
        known = [
            *self.ledger.input_files([batch.submission_id]),
            *(batch.file_id, batch.output_file_id, batch.error_file_id),
        ]
        if batch.output_file_id is None and batch.error_file_id is None and batch.batch_id:
            known += self._result_files(batch)
        ids = dict.fromkeys(one for one in known if one)
        return [one for one in ids if not self._is_in_use(one)]

    def _is_in_use(self, file_id: str) -> bool:
        """Tell whether an open run has the file: some servers name files by their content."""
        file, batch, run = tables.input_file.c, tables.batch.c, tables.run.c
        query = (
            sa.select(file.file_id)
            .join(tables.batch, batch.submission_id == file.submission_id)
            .join(tables.run, run.run_id == batch.run_id)
            .where(file.file_id == file_id, run.state == RunState.OPEN)
        )
        with ledger_database.reading(self.ledger.engine) as connection:
            return connection.execute(query.limit(1)).first() is not None

    def _result_files(self, batch: Batch) -> list[str | None]:
        try:
            view = self.api(batch.conn_id).retrieve(str(batch.batch_id))
        except NotThereError:
            return []
        if view.submission_id != batch.submission_id:
            return []
        return [view.output_file_id, view.error_file_id]

    def old_artifacts(self) -> Chore:
        """Compress the artifacts of loaded runs, and delete them when they are old."""
        chore = Chore("artifacts", self.apply)
        run = tables.run.c
        if self.keep.artifacts_days:
            old = self._runs(*self._is_old(self.keep.artifacts_days), run.artifacts_deleted_at)
            for one in old:
                self._delete_artifacts(one, chore)
        if self.keep.plain_days:
            plain = (run.artifacts_compressed_at, run.artifacts_deleted_at)
            for one in self._runs(*self._is_old(self.keep.plain_days), *plain):
                self._compress_artifacts(one, chore)
        return chore

    def _delete_artifacts(self, run: Run, chore: Chore) -> None:
        chore.note("runs deleted", f"{run}: {self.artifacts.uri(run.directory)} is deleted.")
        if self.apply:
            self.delete_artifacts(run)

    def delete_artifacts(self, run: Run) -> None:
        """Delete every artifact of one run."""
        self.artifacts.delete_folder(run.directory)
        self.ledger.count_run(run.run_id, artifacts_deleted_at=self.clock())

    def _compress_artifacts(self, run: Run, chore: Chore) -> None:
        if self._is_due_for_deletion(run):
            return  # dry run: it is listed as deleted already
        for path in list(self.artifacts.files(run.directory)):
            if path.endswith(WORTH_IT):
                chore.note("files compressed")
                if self.apply:
                    self.artifacts.compress(path)
        chore.note("runs compressed")
        if self.apply:
            self.ledger.count_run(run.run_id, artifacts_compressed_at=self.clock())

    def _is_due_for_deletion(self, run: Run) -> bool:
        days = self.keep.artifacts_days
        return bool(days) and run.done_at is not None and run.done_at < self._ago(days=days)

    def old_requests(self) -> Chore:
        """Delete requests of the queue that ended long ago, with their answers."""
        from include.request_queue import RequestQueue

        chore = Chore("requests of the queue", self.apply)
        if not self.keep.requests_days:
            return chore
        queue = RequestQueue(self.ledger.engine, jobs_root=None)
        before = self._ago(days=self.keep.requests_days)
        count = queue.delete_finished(before) if self.apply else queue.count_finished(before)
        if count:
            chore.counts["requests"] = count
        return chore

    def old_history(self) -> Chore:
        """Delete the history of old runs from the ledger; runs and batches keep their money.

        Only of runs whose artifacts are gone: the audit of a run needs both.
        """
        chore = Chore("history", self.apply)
        if not self.keep.history_days:
            return chore
        is_due = (
            *self._is_old(self.keep.history_days),
            tables.run.c.artifacts_deleted_at.is_not(None),
            tables.run.c.run_id.in_(sa.select(tables.event.c.run_id)),
        )
        for run in self._runs(*is_due):
            chore.note("runs", f"{run}: its history is deleted.")
            if self.apply:
                with ledger_database.writing(self.ledger.engine) as connection:
                    connection.execute(
                        sa.delete(tables.event).where(tables.event.c.run_id == run.run_id)
                    )
        return chore

    def quota(self) -> Chore:
        """Count what is stored at the provider, and the tokens that wait there, by model."""
        chore = Chore("quota", applied=True)
        for conn_id in self._conn_ids():
            files = size = 0
            try:
                for one in self.api(conn_id).files():
                    files, size = files + 1, size + one.size
            except NotOfferedError:
                chore.lines.append(f"{conn_id}: the server lists no files.")
                continue
            except LLMBatchError as error:
                chore.lines.append(f"{conn_id}: {error}")
                continue
            chore.counts["files"] = chore.counts.get("files", 0) + files
            chore.lines.append(
                f"{conn_id}: {counted(files, 'file')}, {size / (1 << 30):.2f} GiB stored."
            )
        for row in self._in_flight():
            chore.counts["tokens in flight"] = (
                chore.counts.get("tokens in flight", 0) + row["tokens"]
            )
            chore.lines.append(
                f"{row['conn_id']}, {row['model']}: {counted(row['tokens'], 'input token')} of "
                f"{counted(row['batches'], 'batch')} in flight."
            )
        return chore

    def _in_flight(self) -> list[Any]:
        columns = tables.batch.c
        query = (
            sa.select(
                columns.conn_id,
                columns.model,
                sa.cast(sa.func.sum(columns.input_tokens), sa.BigInteger).label("tokens"),
                sa.func.count().label("batches"),
            )
            .where(columns.state.in_((BatchState.SUBMITTING, BatchState.SUBMITTED)))
            .group_by(columns.conn_id, columns.model)
            .order_by(columns.conn_id, columns.model)
        )
        with ledger_database.reading(self.ledger.engine) as connection:
            return list(connection.execute(query).mappings())

    # What is due

    def _ago(self, *, days: float) -> datetime:
        return self.clock() - timedelta(days=days)

    def _conn_ids(self, *which: sa.ColumnElement[bool]) -> list[str]:
        conn_id = tables.batch.c.conn_id
        query = sa.select(conn_id).where(*which).distinct().order_by(conn_id)
        with ledger_database.reading(self.ledger.engine) as connection:
            return list(connection.scalars(query))

    def _is_old(self, days: float) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
        run = tables.run.c
        return run.state.in_(OVER), run.done_at < self._ago(days=days)

    def _done_before(self, days: float) -> sa.Select[tuple[str]]:
        return sa.select(tables.run.c.run_id).where(*self._is_old(days))

    def _batches(self, *is_due: sa.ColumnElement[bool]) -> Iterator[Batch]:
        for row in self._pages(tables.batch, tables.batch.c.submission_id, is_due):
            yield Batch(**row)

    def _runs(self, *is_due: sa.ColumnElement[Any]) -> Iterator[Run]:
        """Yield runs; a condition that is a mere column means: it is empty."""
        conditions = [one.is_(None) if isinstance(one, sa.Column) else one for one in is_due]
        for row in self._pages(tables.run, tables.run.c.run_id, conditions):
            yield Run(**row)

    def _pages(self, table: sa.Table, key: sa.Column[str], is_due: Any) -> Iterator[Any]:
        """Yield rows in the order of `key`, a page at a time: nothing is locked in between."""
        last = ""
        while True:
            query = sa.select(table).where(*is_due, key > last).order_by(key).limit(PAGE)
            with ledger_database.reading(self.ledger.engine) as connection:
                page = list(connection.execute(query).mappings())
            yield from page
            if len(page) < PAGE:
                return
            last = page[-1][key.name]

"""Moves batches through their statuses, by the clock, in threads of its own."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import orjson

from include.simulator.answers import Answers
from include.simulator.batch_work import Work
from include.simulator.fault_book import FaultBook, trait, traits_of
from include.simulator.faults import (
    Expire,
    FailBatch,
    Fault,
    FileShape,
    LongIds,
    OutputLost,
    Stuck,
    TokenLimit,
    number_of,
)
from include.simulator.line_plan import LinePlan
from include.simulator.records import FINAL, BatchRecord, FileRecord
from include.simulator.request_check import check_requests
from include.simulator.result_files import ResultFile
from include.simulator.settings import Settings
from include.simulator.store import Store

LOG = logging.getLogger("simulator")
LONGEST_NAP = 0.5
NEVER = 1e12


class BatchRunner:
    """One clock thread and a pool of workers over one store.

    Nothing of a batch counts before its one transaction at the end of the work, so a killed
    simulator starts the work again and bills each line once.
    """

    def __init__(self, settings: Settings, store: Store, faults: FaultBook) -> None:
        self._settings = settings
        self._store = store
        self._faults = faults
        self._pool = ThreadPoolExecutor(settings.workers, thread_name_prefix="answers")
        self._busy: dict[int, Future[None]] = {}
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._clock = threading.Thread(target=self._tick, name="clock", daemon=True)

    def start(self) -> None:
        """Go on where the last run stopped."""
        self._clock.start()

    def stop(self) -> None:
        """Stop soon; work in hand is thrown away and done again at the next start."""
        self._stopped.set()
        self._wake.set()
        self._clock.join()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def wake(self) -> None:
        """Look for due batches now."""
        self._wake.set()

    def wait_for(self, batch_no: int, seconds: float) -> None:
        """Give a batch that takes no time the chance to end; one that a fault holds is left."""
        until = time.time() + seconds
        self.wake()
        while time.time() < until:
            due = self._store.batch_no(batch_no).next_at
            if due is None or due > until:
                return
            time.sleep(0.005)

    def first_status(self, traits: list[Fault]) -> dict[str, Any]:
        """The columns of a batch that begins now."""
        return {"status": "validating", "next_at": self._end_of("validating", traits)}

    def cancel(self, batch: BatchRecord) -> None:
        """Begin to cancel, unless the batch has ended meanwhile."""
        moved = self._store.change_batch(
            batch,
            status="cancelling",
            cancelling_at=time.time(),
            next_at=self._end_of("cancelling", traits_of(batch)),
        )
        if not moved:
            newer = self._store.batch_no(batch.no)
            if newer.status not in FINAL and newer.status != "cancelling":
                self.cancel(newer)
        self.wake()

    def seconds_of_work(self, batch: BatchRecord) -> float:
        """How long the batch is in progress, with what a fault adds."""
        stuck = trait(batch, Stuck)
        seconds = self._settings.timing.in_progress
        if stuck is None or stuck.status != "in_progress":
            return seconds
        return NEVER if stuck.seconds is None else seconds + stuck.seconds

    def _tick(self) -> None:
        while not self._stopped.is_set():
            try:
                self._advance()
            except Exception:
                LOG.exception("the clock stumbled")
            self._wake.wait(self._nap())
            self._wake.clear()

    def _nap(self) -> float:
        due = self._store.next_due()
        if due is None:
            return LONGEST_NAP
        return min(LONGEST_NAP, max(0.005 if not self._busy else 0.02, due - time.time()))

    def _advance(self) -> None:
        steps: dict[str, Callable[[BatchRecord], None]] = {
            "validating": self._validate,
            "in_progress": self._answer,
            "finalizing": self._finish,
            "cancelling": self._cancel,
        }
        for batch in self._store.due(time.time()):
            if batch.no in self._busy:
                continue
            if batch.status == "finalizing" or (batch.status == "cancelling" and batch.answered):
                steps[batch.status](batch)
                self.wake()
            else:
                self._employ(steps[batch.status], batch)

    def _employ(self, step: Callable[[BatchRecord], None], batch: BatchRecord) -> None:
        def work() -> None:
            try:
                if not self._stopped.is_set():
                    step(batch)
            except Exception:
                LOG.exception("batch %s could not be worked on", batch.id)
                self._fail(batch, [_error("server_error", "The simulator could not go on.")])
            finally:
                self._busy.pop(batch.no, None)
                self.wake()

        # The entry has to be there before the work can take it away again.
        self._busy[batch.no] = Future()
        self._pool.submit(work)

    def _end_of(self, status: str, traits: list[Fault]) -> float:
        """When a status that is entered now will be over."""
        seconds: float = getattr(self._settings.timing, status)
        for rule in traits:
            if isinstance(rule, Stuck) and rule.status == status:
                self._faults.fired(rule.id)
                seconds += NEVER if rule.seconds is None else rule.seconds
        return time.time() + seconds

    def _validate(self, batch: BatchRecord) -> None:
        file = self._store.file(batch.input_file_id)
        if file is None:
            self._fail(batch, [_error("invalid_request", "The input file was not found.")])
            return
        check = check_requests(self._store.content(file), batch.endpoint, self._settings)
        errors = check.errors or self._refusals(batch)
        if errors:
            self._fail(batch, errors, model=check.model)
            return
        with self._store.transaction():
            # What holds the batch may have been taken away since the clock's look at it.
            traits = traits_of(self._store.batch_no(batch.no))
            self._store.change_batch(
                batch,
                status="in_progress",
                in_progress_at=time.time(),
                next_at=self._end_of("in_progress", traits),
                model=check.model,
                total=check.requests,
                enqueued_tokens=check.input_tokens,
            )

    def _refusals(self, batch: BatchRecord) -> list[dict[str, Any]]:
        limit = trait(batch, TokenLimit)
        if limit is not None:
            return [_error("token_limit_exceeded", limit_message(limit, batch.model))]
        rule = trait(batch, FailBatch)
        if rule is None:
            return []
        self._faults.fired(rule.id)
        lines: tuple[int | None, ...] = rule.lines or (None,)
        return [_error(rule.code, rule.message, line) for line in lines]

    def _fail(
        self, batch: BatchRecord, errors: list[dict[str, Any]], *, model: str | None = None
    ) -> None:
        self._store.change_batch(
            batch,
            status="failed",
            failed_at=time.time(),
            next_at=None,
            model=model or batch.model,
            enqueued_tokens=0,
            errors=orjson.dumps({"object": "list", "data": errors}).decode(),
        )

    def _answer(self, batch: BatchRecord) -> None:
        expire = trait(batch, Expire)
        if expire is not None:
            self._faults.fired(expire.id)
            self._work(batch, int(batch.total * expire.fraction), "batch_expired")
        else:
            self._work(batch, batch.total, "batch_expired")

    def _cancel(self, batch: BatchRecord) -> None:
        if batch.answered or batch.in_progress_at is None:
            self._end(batch, "cancelled")
            return
        done = batch.answered_by(batch.cancelling_at or time.time(), self.seconds_of_work(batch))
        self._work(batch, done, "batch_cancelled")

    def _work(self, batch: BatchRecord, answered: int, left_code: str) -> None:
        file = self._store.file(batch.input_file_id)
        if file is None:
            self._fail(batch, [_error("invalid_request", "The input file is gone.")])
            return
        work = self._work_on(batch, file, answered, left_code)
        if work.run(lambda: not self._stopped.is_set()):
            self._commit(batch, work)

    def _work_on(self, batch: BatchRecord, file: FileRecord, answered: int, left_code: str) -> Work:
        shape = trait(batch, FileShape)
        # By what it is, where it says so: the order in which batches come differs from day to day.
        seed = None if self._settings.keep_order else number_of(batch.metadata or str(batch.no))
        return Work(
            batch_no=batch.no,
            endpoint=batch.endpoint,
            source=self._store.content(file),
            output=ResultFile(self._store.scratch(), shape, shuffled=seed),
            error=ResultFile(self._store.scratch(), shape, shuffled=seed),
            answers=Answers(
                batch.endpoint,
                created=int(time.time()),
                cache_from_tokens=self._settings.cache_from_tokens,
            ),
            plan=LinePlan(traits_of(batch), self._times_before),
            answered=answered,
            left_code=left_code,
            unique=secrets.token_hex(8),
            three_error_lines=self._settings.dialect.three_error_lines,
            start=0 if seed is None else number_of(str(seed)) % file.bytes,
        )

    def _times_before(self, rule_id: str, custom_id: str) -> int:
        sql = "SELECT times FROM rule_hit WHERE rule_id = ? AND custom_id = ?"
        found = self._store.rows(sql, (rule_id, custom_id))
        return int(found[0]["times"]) if found else 0

    def _commit(self, batch: BatchRecord, work: Work) -> None:
        ends_as = "expired" if work.left_code == "batch_expired" else "cancelled"
        whole = work.answered >= batch.total
        with self._store.transaction() as db:
            now = self._store.batch_no(batch.no)
            if now.answered or now.status in FINAL:
                # The clock's look at it was stale: it is done, and billed, since then.
                work.discard()
                return
            status = "cancelling" if now.status == "cancelling" else "finalizing"
            moment = {} if status == "cancelling" else {"finalizing_at": time.time()}
            self._store.change_batch(
                now,
                **self._files_of(batch, work),
                **moment,
                status=status,
                next_at=self._end_of(status, traits_of(batch)),
                answered=1,
                ends_as="completed" if whole else ends_as,
                completed=work.completed,
                failed=work.failed,
                billed=work.completed,
                error_lines=len(work.bill) - work.completed,
                input_tokens=work.tokens[0],
                cached_tokens=work.tokens[1],
                output_tokens=work.tokens[2],
                reasoning_tokens=work.tokens[3],
            )
            db.executemany("INSERT INTO bill_line VALUES (?, ?, ?, ?, ?, ?, ?)", work.bill)
            db.executemany(
                "INSERT INTO rule_hit VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET times = times + 1",
                work.plan.hits,
            )
        for rule_id, times in work.plan.fired.items():
            self._faults.fired(rule_id, times)

    def _files_of(self, batch: BatchRecord, work: Work) -> dict[str, str | None]:
        lost = trait(batch, OutputLost)
        if lost is not None:
            self._faults.fired(lost.id)
            work.output.empty()
        keep_output = work.output.lines > 0 and (lost is None or lost.mode == "empty")
        shape = trait(batch, FileShape)
        if shape is not None:
            self._faults.fired(shape.id)
        return {
            "output_file_id": self._keep(batch, work.output, "output", wanted=keep_output),
            "error_file_id": self._keep(
                batch,
                work.error,
                "error",
                wanted=work.error.lines > 0 or self._settings.dialect.always_error_file,
            ),
        }

    def _keep(
        self, batch: BatchRecord, result: ResultFile, kind: str, *, wanted: bool
    ) -> str | None:
        if not wanted:
            result.path.unlink()
            return None
        record = self._store.add_file(
            result.path,
            filename=f"{batch.id[:40]}_{kind}.jsonl",
            purpose="batch_output",
            lifetime=batch.output_seconds,
            long=trait(batch, LongIds) is not None or self._settings.dialect.long_ids,
        )
        return record.id

    def _finish(self, batch: BatchRecord) -> None:
        self._end(batch, batch.ends_as)

    def _end(self, batch: BatchRecord, status: str) -> None:
        moment = {f"{status}_at": time.time()}
        self._store.change_batch(batch, status=status, next_at=None, enqueued_tokens=0, **moment)


def limit_message(limit: TokenLimit, model: str | None) -> str:
    """What the API says when too many tokens are enqueued."""
    return (
        f"Enqueued token limit reached for {model} in organization org-simulator."
        f" Limit: {limit.enqueued_tokens:,} enqueued tokens."
        " Please try again once some in_progress batches have been completed."
    )


def _error(code: str, message: str, line: int | None = None) -> dict[str, Any]:
    return {"code": code, "line": line, "message": message, "param": None}

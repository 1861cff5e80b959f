"""Waits for one batch in the triggerer, without a worker.

All triggers of one process and connection share one lister (`include.batch_watch`). The trigger
only reads; it cancels a batch only when its task really has been failed, marked or removed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from include.batch_api import AsyncBatchApi
from include.batch_status import BatchStatus
from include.batch_view import BatchView
from include.batch_watch import BatchWatch
from include.errors import LLMBatchError
from include.ledger import Ledger
from include.waiting import WaitPolicy
from llm_batch import connections

OVER = frozenset({"failed", "success", "skipped", "removed", "upstream_failed"})
_watches: dict[tuple[int, str], BatchWatch] = {}
_ledgers: list[Ledger] = []


def watch(conn_id: str) -> BatchWatch:
    """Return this process's one lister for a connection."""

    async def connect() -> AsyncBatchApi:
        return await connections.async_batch_api(conn_id)

    key = (id(asyncio.get_running_loop()), conn_id)
    return _watches.setdefault(key, BatchWatch(connect))


def ledger() -> Ledger:
    """Return this process's one ledger; call it in a thread, it talks to a database."""
    if not _ledgers:
        _ledgers.append(connections.ledger())
    return _ledgers[0]


class BatchTrigger(BaseTrigger):
    """Fires once: when `batch_id` is final, or at `late_at` or `deadline` if it is not by then.

    Its event is `{"batch_id": …, "status": <final status>, "late" or "deadline"}`. Times are
    ISO-8601 UTC, durations seconds. Any number of failed polls is tolerated until the deadline,
    which is absolute: a restart of the triggerer does not move it. Every argument but the ids has a
    default, so that a trigger stored by an earlier release still loads.
    """

    def __init__(
        self,
        *,
        conn_id: str,
        batch_id: str,
        deadline: str,
        submitted_at: str = "",
        poll_interval: float = 60.0,
        first_poll: float = 10.0,
        requests: int = 0,
        late_at: str = "",
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.conn_id = conn_id
        self.batch_id = batch_id
        self.deadline = deadline
        self.submitted_at = submitted_at
        self.poll_interval = poll_interval
        self.first_poll = first_poll
        self.requests = requests
        self.late_at = late_at

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return exactly the arguments that the trigger was made with."""
        return (
            "llm_batch.triggers.BatchTrigger",
            {
                "conn_id": self.conn_id,
                "batch_id": self.batch_id,
                "deadline": self.deadline,
                "submitted_at": self.submitted_at,
                "poll_interval": self.poll_interval,
                "first_poll": self.first_poll,
                "requests": self.requests,
                "late_at": self.late_at,
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Yield one event, as the class says."""
        # A trigger that fires within about 5 s of the deferral makes the scheduler of Airflow
        # 3.3.2 fail the task: it still waits for the executor's own word on the deferral.
        await asyncio.sleep(self.first_poll)
        until = datetime.fromisoformat(self.late_at or self.deadline)
        try:
            async with asyncio.timeout((until - datetime.now(UTC)).total_seconds()):
                status = await self._final_status()
        except TimeoutError:
            status = "late" if self.late_at else "deadline"
        event = {"batch_id": self.batch_id, "status": status}
        yield TriggerEvent(event)  # type: ignore[no-untyped-call]

    async def _final_status(self) -> str:
        last: BatchView | None = None
        lost_since: datetime | None = None
        updates = watch(self.conn_id).follow(self.batch_id, interval=self.poll_interval)
        async for news in updates:
            if isinstance(news, LLMBatchError):
                self.log.warning(
                    "%s: %s Polling goes on until %s.", *self._who(), news, self.deadline
                )
                continue
            if last is None or _moved(last, news):
                self.log.info("%s", self._progress(news))
                await self._record(news)
                await self._show(news)
            last = news
            is_unknown = news.status == BatchStatus.LOST
            lost_since = (lost_since or datetime.now(UTC)) if is_unknown else None
            # Of one that may come back the task would only defer itself again: see `waiting.look`.
            if news.is_final and (lost_since is None or WaitPolicy().is_lost(lost_since)):
                return news.status
        raise AssertionError("a watch never ends by itself")

    def _who(self) -> tuple[str]:
        return (f"Batch {self.batch_id} on {self.conn_id}",)

    def _progress(self, view: BatchView) -> str:
        total = view.total or self.requests
        seen = f"{self._who()[0]}: {view.status}, {view.done} done and {view.failed} failed"
        if view.is_final:
            return f"{seen} of {total}{self._age()}."
        return (
            f"{seen} of {total}{self._age()}; asked again in about {self.poll_interval:.0f} s, "
            f"deadline {self.deadline}."
        )

    def _age(self) -> str:
        if not self.submitted_at:
            return ""
        waited = datetime.now(UTC) - datetime.fromisoformat(self.submitted_at)
        return f", submitted {int(waited.total_seconds())} s ago"

    async def _record(self, view: BatchView) -> None:
        """Show progress to whoever looks at the ledger; waiting does not depend on it."""
        try:
            await asyncio.to_thread(self._record_now, view)
        except LLMBatchError as error:
            self.log.warning("%s: progress was not recorded: %s", *self._who(), error)

    async def _show(self, view: BatchView) -> None:
        """Keep the XCom `progress` of the deferred task up to date, for its tab in the UI."""
        try:
            await asyncio.to_thread(self._show_now, view)
        except Exception as error:  # noqa: BLE001  # a wait outlives whatever cannot be shown
            self.log.debug("%s: no XCom was written: %s", *self._who(), type(error).__name__)

    def _show_now(self, view: BatchView) -> None:
        from airflow.sdk.execution_time.xcom import XCom

        ti = self.task_instance
        if ti is None:
            return
        XCom.set(
            key="progress",
            value={
                "batch_id": view.batch_id,
                "status": view.status,
                "done": view.done,
                "failed": view.failed,
                "total": view.total or self.requests,
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
            },
            dag_id=ti.dag_id,
            task_id=ti.task_id,
            run_id=ti.run_id,
            map_index=-1 if ti.map_index is None else ti.map_index,
        )

    def _record_now(self, view: BatchView) -> None:
        ledger().polled(view.batch_id, api_status=view.status, done=view.done, failed=view.failed)

    async def on_kill(self) -> None:
        """Cancel the batch, but only when its task is over.

        Airflow 3.3.2 calls this on a clear as well (when the next try may have re-attached to the
        batch already) and after a stall of the triggerer (when another one has taken over).
        """
        if not await asyncio.to_thread(self._is_over):
            return
        api = await connections.async_batch_api(self.conn_id)
        try:
            await api.cancel(self.batch_id)
        finally:
            await api.close()
        self.log.warning("%s: its task was ended, so cancelling was asked for.", *self._who())

    def _is_over(self) -> bool:
        from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

        ti = self.task_instance
        if ti is None:
            return False
        states = RuntimeTaskInstance.get_task_states(
            dag_id=ti.dag_id, task_ids=[ti.task_id], run_ids=[ti.run_id], map_index=ti.map_index
        )
        name = ti.task_id if ti.map_index < 0 else f"{ti.task_id}_{ti.map_index}"
        state = (states or {}).get(ti.run_id, {}).get(name)
        return state is None or state in OVER


def _moved(before: BatchView, after: BatchView) -> bool:
    return (before.status, before.done, before.failed) != (after.status, after.done, after.failed)

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
from include.batch_view import BatchView
from include.batch_watch import BatchWatch
from include.errors import LLMBatchError
from include.ledger import Ledger
from llm_batch import connections

OVER = frozenset({"failed", "success", "skipped", "removed", "upstream_failed"})
_watches: dict[tuple[int, str], BatchWatch] = {}
_ledgers: list[Ledger] = []


def watch(conn_id: str) -> BatchWatch:
    """Return this process's one lister for a connection."""

    async def connect() -> AsyncBatchApi:
        return AsyncBatchApi(await connections.async_openai_client(conn_id))

    key = (id(asyncio.get_running_loop()), conn_id)
    return _watches.setdefault(key, BatchWatch(connect))


def ledger() -> Ledger:
    """Return this process's one ledger; call it in a thread, it talks to a database."""
    if not _ledgers:
        _ledgers.append(connections.ledger())
    return _ledgers[0]


class BatchTrigger(BaseTrigger):
    """Fires once: when `batch_id` is final, or at `deadline` if it is not final by then.

    Its event is `{"batch_id": …, "status": <final status> or "deadline"}`. Times are ISO-8601 UTC,
    durations seconds. Any number of failed polls is tolerated until the deadline, which is
    absolute: a restart of the triggerer does not move it. Every argument but the ids has a
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
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.conn_id = conn_id
        self.batch_id = batch_id
        self.deadline = deadline
        self.submitted_at = submitted_at
        self.poll_interval = poll_interval
        self.first_poll = first_poll
        self.requests = requests

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
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Yield one event, as the class says."""
        # A trigger that fires within about 5 s of the deferral makes the scheduler of Airflow
        # 3.3.2 fail the task: it still waits for the executor's own word on the deferral.
        await asyncio.sleep(self.first_poll)
        deadline = datetime.fromisoformat(self.deadline)
        try:
            async with asyncio.timeout((deadline - datetime.now(UTC)).total_seconds()):
                status = await self._final_status()
        except TimeoutError:
            status = "deadline"
        event = {"batch_id": self.batch_id, "status": status}
        yield TriggerEvent(event)  # type: ignore[no-untyped-call]

    async def _final_status(self) -> str:
        last: BatchView | None = None
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
            last = news
            if news.is_final:
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

    def _record_now(self, view: BatchView) -> None:
        ledger().polled(view.batch_id, api_status=view.status, done=view.done, failed=view.failed)

    async def on_kill(self) -> None:
        """Cancel the batch, but only when its task is over.

        Airflow 3.3.2 calls this on a clear as well (when the next try may have re-attached to the
        batch already) and after a stall of the triggerer (when another one has taken over).
        """
        if not await asyncio.to_thread(self._is_over):
            return
        async with await connections.async_openai_client(self.conn_id) as client:
            await AsyncBatchApi(client).cancel(self.batch_id)
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

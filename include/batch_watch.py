"""One lister for everybody in this process who waits for a batch of one connection.

A thousand deferred tasks cost ten list calls a poll, not a thousand reads. Batches that the first
pages no longer reach are read one by one, a few per poll. A failed poll is told to everybody who
waits and tried again: no single error ends a wait.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from include.batch_view import BatchView
from include.errors import ConfigurationError, LLMBatchError, NotOfferedError, TransientError

if TYPE_CHECKING:
    from include.batch_api import AsyncBatchApi

PAGES = 10  # list calls per poll at most
READS = 2  # single reads per poll at most, of batches that the pages do not reach
MOST_READS = 50  # where the pages reach nothing, or the oldest batches first
SLOWEST = 10  # a batch without progress is asked for this many times more seldom
POLL_TIMEOUT = 120.0  # seconds that one poll may take


@dataclass(eq=False)
class Waiter:
    """One task that waits: how often it wants to hear, and what it has not heard yet."""

    batch_id: str
    interval: float
    news: asyncio.Queue[BatchView | LLMBatchError] = field(default_factory=asyncio.Queue)
    last: tuple[str, int, int] | None = None
    changed_at: float = field(default_factory=time.monotonic)
    read_at: float = 0.0

    def tell(self, view: BatchView) -> None:
        """Pass a view on and remember when the batch last moved."""
        seen = (view.status, view.done, view.failed)
        if seen != self.last:
            self.last, self.changed_at = seen, time.monotonic()
        self.news.put_nowait(view)

    def wanted(self) -> float:
        """Return the seconds until this waiter would like the next poll."""
        idle = time.monotonic() - self.changed_at
        return min(max(idle / 4, self.interval), self.interval * SLOWEST)


class BatchWatch:
    """Polls for all waiters of one connection; must be used from one event loop."""

    def __init__(self, connect: Callable[[], Awaitable[AsyncBatchApi]]) -> None:
        self._connect = connect
        self._waiters: list[Waiter] = []
        self._task: asyncio.Task[None] | None = None
        self._is_refused = False

    async def follow(
        self, batch_id: str, *, interval: float
    ) -> AsyncIterator[BatchView | LLMBatchError]:
        """Yield what every poll sees of `batch_id`, or the error that the poll ended with."""
        waiter = Waiter(batch_id, interval)
        self._waiters.append(waiter)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        try:
            while True:
                yield await waiter.news.get()
        finally:
            self._waiters.remove(waiter)

    async def _run(self) -> None:
        api: AsyncBatchApi | None = None
        try:
            while self._waiters:
                try:
                    api = api or await self._connect()
                    async with asyncio.timeout(POLL_TIMEOUT):
                        await self._poll(api)
                except Exception as error:  # noqa: BLE001  # a wait outlives any failed poll
                    self._tell_all(error)
                if self._is_refused:
                    # The connection may be mended meanwhile: read it again for the next poll.
                    await _closed(api)
                    api, self._is_refused = None, False
                await self._sleep()
        finally:
            # Whoever comes while connections are closed must not rely on this poll any more.
            if self._task is asyncio.current_task():
                self._task = None
            await _closed(api)

    def _tell_all(self, error: Exception) -> None:
        known = error if isinstance(error, LLMBatchError) else None
        told = known or TransientError(f"The poll failed ({type(error).__name__}).")
        self._is_refused |= isinstance(told, ConfigurationError)
        for waiter in self._waiters:
            waiter.news.put_nowait(told)

    async def _sleep(self) -> None:
        wanted = min((one.wanted() for one in self._waiters), default=0.0)
        await asyncio.sleep(wanted * random.uniform(0.9, 1.1))  # noqa: S311

    async def _poll(self, api: AsyncBatchApi) -> None:
        missing: dict[str, list[Waiter]] = {}
        for waiter in self._waiters:
            missing.setdefault(waiter.batch_id, []).append(waiter)
        reads = READS if api.profile.newest_first else MOST_READS
        if len(missing) > READS and not await self._list(api, missing):
            reads = MOST_READS
        await self._read(api, missing, reads)

    async def _list(self, api: AsyncBatchApi, missing: dict[str, list[Waiter]]) -> bool:
        """Tell what the pages say; False when the server has no list."""
        if not api.profile.lists_batches:
            return False
        pages = 0
        try:
            async for page in api.pages():
                for view in page:
                    for waiter in missing.pop(view.batch_id, ()):
                        waiter.tell(view)
                await asyncio.sleep(0)  # a hundred views are parsed and told: let others run
                pages += 1
                if not missing or pages >= PAGES:
                    break
        except NotOfferedError:
            return False
        return True

    async def _read(self, api: AsyncBatchApi, missing: dict[str, list[Waiter]], most: int) -> None:
        longest_unread = sorted(missing.values(), key=lambda group: group[0].read_at)
        for group in longest_unread[:most]:
            news = await self._retrieved(api, group[0].batch_id)
            for waiter in group:
                waiter.read_at = time.monotonic()
                if isinstance(news, LLMBatchError):
                    waiter.news.put_nowait(news)
                else:
                    waiter.tell(news)

    async def _retrieved(self, api: AsyncBatchApi, batch_id: str) -> BatchView | LLMBatchError:
        try:
            return await api.retrieve(batch_id)
        except LLMBatchError as error:
            self._is_refused |= isinstance(error, ConfigurationError)
            return error


async def _closed(api: AsyncBatchApi | None) -> None:
    if api is not None:
        with suppress(Exception):
            await api.close()

"""One lister for all who wait, against a real HTTP server: few calls, and no error ends a wait."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx2
import openai
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from include.batch_api import AsyncBatchApi
from include.batch_view import BatchView
from include.batch_watch import PAGES, SLOWEST, BatchWatch, Waiter
from include.errors import LLMBatchError, TransientError

INTERVAL = 0.05  # seconds
PATIENCE = 120.0  # seconds
News = BatchView | LLMBatchError


class Api:
    """A Batch API over HTTP that holds `count` batches, newest first."""

    def __init__(self, count: int) -> None:
        self.status = {f"batch_{number}": "in_progress" for number in range(count)}
        self.calls: Counter[str] = Counter()
        self.read: list[str] = []
        self.broken = False
        self.url = ""

    def app(self) -> Starlette:
        routes = [Route("/v1/batches", self._list), Route("/v1/batches/{name}", self._read)]
        return Starlette(routes=routes)

    async def _list(self, request: Request) -> Response:
        self.calls["list"] += 1
        if self.broken:
            return JSONResponse({"error": {"message": "no"}}, status_code=500)
        names = list(self.status)
        after = request.query_params.get("after")
        start = names.index(after) + 1 if after else 0
        page = names[start : start + int(request.query_params["limit"])]
        return JSONResponse({"object": "list", "data": [self._batch(name) for name in page]})

    async def _read(self, request: Request) -> Response:
        name = request.path_params["name"]
        self.calls["read"] += 1
        self.read.append(name)
        if name not in self.status:
            return JSONResponse({"error": {"message": "no"}}, status_code=404)
        return JSONResponse(self._batch(name))

    def _batch(self, name: str) -> dict[str, Any]:
        counts = {"total": 9, "completed": 1, "failed": 0}
        return {"id": name, "status": self.status[name], "created_at": 1, "request_counts": counts}


@asynccontextmanager
async def served(count: int) -> AsyncIterator[tuple[Api, BatchWatch]]:
    """Serve `count` batches and yield the server and a watch that polls it."""
    api = Api(count)
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    api.url = url
    server = uvicorn.Server(uvicorn.Config(api.app(), log_level="warning"))
    serving = asyncio.create_task(server.serve(sockets=[listener]))

    async def connect() -> AsyncBatchApi:
        return AsyncBatchApi(openai.AsyncOpenAI(api_key="k", base_url=url))

    watch = BatchWatch(connect)
    try:
        yield api, watch
    finally:
        await polling_ended(watch)
        server.should_exit = True
        await serving


async def polling_ended(watch: BatchWatch) -> None:
    """Wait until the watch polls no longer, which it must do by itself."""
    if watch._task is not None:
        async with asyncio.timeout(PATIENCE):
            await watch._task


async def until(
    watch: BatchWatch,
    name: str,
    enough: Callable[[News], bool],
    seen: Callable[[News], None] = lambda _: None,
) -> list[News]:
    """Follow a batch until some news is enough; return all of its news."""
    found: list[News] = []
    updates = watch.follow(name, interval=INTERVAL)
    async with asyncio.timeout(PATIENCE):
        async for news in updates:
            found.append(news)
            seen(news)
            if enough(news):
                break
    await updates.aclose()  # type: ignore[attr-defined]
    return found


def is_view(news: News) -> bool:
    return isinstance(news, BatchView)


def is_final(news: News) -> bool:
    return isinstance(news, BatchView) and news.is_final


async def test_a_thousand_waiters_cost_twelve_calls_a_poll() -> None:
    """Ten pages of a hundred, and none of them asks for its own batch."""
    async with served(1_000) as (api, watch):
        await asyncio.gather(*(until(watch, name, is_view) for name in list(api.status)))

    assert api.calls["list"] + api.calls["read"] <= 12
    assert api.calls["read"] == 0


async def test_old_batches_are_read_a_few_at_a_time_and_in_turn() -> None:
    """The pages do not reach them; each is read before one is read again."""
    out_of_reach = PAGES * 100
    async with served(out_of_reach + 6) as (api, watch):
        old = list(api.status)[out_of_reach:]
        await asyncio.gather(*(until(watch, name, is_view) for name in old))
        polls = api.calls["list"] / PAGES

    assert sorted(api.read) == sorted(old)
    assert api.calls["list"] % PAGES == 0
    # The last two need no list: so few are read straight away.
    assert polls >= len(old) / 2 - 1


async def test_one_who_waits_alone_needs_no_list() -> None:
    """Reading one batch is cheaper than a page of a hundred."""
    async with served(300) as (api, watch):
        await until(watch, "batch_299", is_view)

    assert api.calls == {"read": 1}


async def test_a_failed_poll_ends_no_wait() -> None:
    """Everybody hears of it, and then of the next one that works."""
    async with served(5) as (api, watch):
        api.broken = True

        def mend(news: News) -> None:
            api.broken = not isinstance(news, LLMBatchError)

        found = await asyncio.gather(*(until(watch, name, is_view, mend) for name in api.status))

    for news in found:
        assert isinstance(news[0], TransientError)
        assert is_view(news[-1])


async def test_everybody_hears_of_the_end_of_a_batch() -> None:
    """Also two who wait for the same one."""
    async with served(4) as (api, watch):
        names = ["batch_0", "batch_1", "batch_1", "batch_2", "batch_3"]

        def end(news: News) -> None:
            assert is_view(news)
            api.status = dict.fromkeys(api.status, "completed")  # they were seen at work

        found = await asyncio.gather(*(until(watch, name, is_final, end) for name in names))

    for name, news in zip(names, found, strict=True):
        first, last = news[0], news[-1]
        assert isinstance(first, BatchView)
        assert isinstance(last, BatchView)
        assert first.status == "in_progress"
        assert (last.batch_id, last.status) == (name, "completed")


async def test_a_lost_batch_is_told_to_who_waits_for_it() -> None:
    """404 is a final status, not an error that is tried again for ever."""
    async with served(1) as (_, watch):
        found = await until(watch, "batch_gone", is_final)

    assert [news.status for news in found if isinstance(news, BatchView)] == ["lost"]


async def test_polling_stops_when_nobody_waits() -> None:
    """And begins again with the next one who does."""
    async with served(3) as (api, watch):
        await until(watch, "batch_0", is_view)
        await polling_ended(watch)
        before = api.calls.total()
        await asyncio.sleep(INTERVAL * 4)
        idle = api.calls.total() - before
        await until(watch, "batch_1", is_view)

    assert idle == 0
    assert api.calls.total() > before


async def test_a_wait_that_is_given_up_leaves_the_others() -> None:
    """A cancelled task takes only itself away."""
    async with served(3) as (api, watch):
        heard = asyncio.Event()
        given_up = asyncio.create_task(until(watch, "batch_0", is_final, lambda _news: heard.set()))
        staying = asyncio.create_task(until(watch, "batch_1", is_final))
        async with asyncio.timeout(PATIENCE):
            await heard.wait()
        given_up.cancel()
        with suppress(asyncio.CancelledError):
            await given_up
        api.status["batch_1"] = "completed"
        found = await staying

    assert is_final(found[-1])


def test_the_interval_grows_without_progress() -> None:
    """A batch that stands still is asked for up to ten times more seldom, until it moves."""
    waiter = Waiter("batch_0", interval=60)
    fresh = waiter.wanted()
    waiter.changed_at -= 1_200
    standing = waiter.wanted()
    waiter.changed_at -= 1_000_000
    longest = waiter.wanted()
    waiter.tell(view_of("in_progress", done=5))

    assert fresh == 60
    assert 299 < standing < 301
    assert longest == 60 * SLOWEST
    assert waiter.wanted() == 60


def view_of(status: str, done: int) -> BatchView:
    """Return a batch that has come so far."""
    from include.batch_api import view_of as view

    return view({"id": "batch_0", "status": status, "request_counts": {"completed": done}})


class SlowGoodbye(httpx2.AsyncHTTPTransport):
    """Closes its connections when it may."""

    def __init__(self, leaving: asyncio.Event, may_leave: asyncio.Event) -> None:
        super().__init__()
        self._leaving = leaving
        self._may_leave = may_leave

    async def aclose(self) -> None:
        self._leaving.set()
        await self._may_leave.wait()
        await super().aclose()


async def test_who_comes_while_the_last_one_leaves_is_told_as_well() -> None:
    """The poll that nobody needs any more is closing its connections: a new one begins."""
    leaving, may_leave = asyncio.Event(), asyncio.Event()
    async with served(2) as (api, _):

        async def connect() -> AsyncBatchApi:
            transport = httpx2.AsyncClient(transport=SlowGoodbye(leaving, may_leave))
            client = openai.AsyncOpenAI(api_key="k", base_url=api.url, http_client=transport)
            return AsyncBatchApi(client)

        watch = BatchWatch(connect)
        await until(watch, "batch_0", is_view)
        async with asyncio.timeout(PATIENCE):
            await leaving.wait()
        found = await until(watch, "batch_1", is_view)
        may_leave.set()
        await polling_ended(watch)

    assert is_view(found[-1])

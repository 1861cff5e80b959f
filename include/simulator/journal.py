"""Which calls came in: a bounded log for people, lasting counts for tests."""

from __future__ import annotations

import re
import secrets
import time
from collections import Counter, deque
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from include.simulator.store import Store

LAST_CALLS = 20_000
IDENTITY = re.compile(r"^(/v1/(?:files|batches))/[^/]+")


class Journal:
    """ASGI middleware, the outermost: counts calls and gives each its `x-request-id`.

    Counts are kept as "POST /v1/batches", "GET /v1/batches/{id}" and so on, refused and broken
    calls included.
    """

    def __init__(self, app: ASGIApp, store: Store) -> None:
        self._app = app
        self._store = store
        self._calls: deque[dict[str, Any]] = deque(maxlen=LAST_CALLS)
        self._counts = Counter(store.counts())
        self._kept = self._counts.copy()  # as the store has them

    def calls(self) -> list[dict[str, Any]]:
        """The last calls, oldest first; status 0 means that no answer was sent."""
        return list(self._calls)

    def counts(self) -> dict[str, int]:
        """How often each call came in, since the state was new."""
        return dict(self._counts.copy())

    def flush(self) -> None:
        """Make the new counts last."""
        now = self._counts.copy()  # calls go on coming in, in another thread
        new = now - self._kept
        if new:
            self._store.add_counts(new)
            self._kept = now

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Note the call and pass it on."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        # Only the server's own `send` knows the connection, which resets need.
        owner: Any = getattr(send, "__self__", None)
        scope["simulator.transport"] = owner.transport
        route = IDENTITY.sub(r"\1/{id}", scope["path"])
        self._counts[f"{scope['method']} {route}"] += 1
        await self._noted(scope, receive, send)

    async def _noted(self, scope: Scope, receive: Receive, send: Send) -> None:
        identity = f"req_{secrets.token_hex(16)}"
        call = {
            "method": scope["method"],
            "path": scope["path"],
            "query": scope["query_string"].decode("latin-1"),
            "status": 0,
            "at": time.time(),
            "seconds": 0.0,
            "request_id": identity,
        }
        self._calls.append(call)
        begun = time.perf_counter()

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                call["status"] = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = identity
            await send(message)

        try:
            await self._app(scope, receive, answer)
        finally:
            call["seconds"] = round(time.perf_counter() - begun, 6)

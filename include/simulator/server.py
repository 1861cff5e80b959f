"""The application: the parts of one simulator, wired together."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from include.simulator.admin import Admin
from include.simulator.api_error import ApiError, show_error, show_http_error, show_nothing
from include.simulator.batch_runner import BatchRunner
from include.simulator.batches_api import BatchesApi
from include.simulator.call_faults import CallFaults
from include.simulator.fault_book import FaultBook
from include.simulator.files_api import FilesApi
from include.simulator.journal import Journal
from include.simulator.settings import Settings
from include.simulator.store import Store

LOG = logging.getLogger("simulator")
FLUSH_SECONDS = 0.1
REFUSED_KEY = b"wrong"


class Rooted:
    """ASGI middleware: the public API is below another path, as `/openai/v1`, and only there."""

    def __init__(self, app: ASGIApp, root: str) -> None:
        self._app = app
        self._root = root

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the call on without the root."""
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            await show_nowhere(scope)(scope, receive, send)
            return
        path = scope.get("path", "")
        if scope["type"] == "http" and path.startswith(f"{self._root}/v1/"):
            scope = {**scope, "path": path.removeprefix(self._root)}
        await self._app(scope, receive, send)


def show_nowhere(scope: Scope) -> JSONResponse:
    """The answer to a path that the server does not have."""
    message = f"Resource not found: {scope['path']}"
    return ApiError(404, message, code="404").response()


class KeyCheck:
    """ASGI middleware: the public API wants a bearer key.

    Taken is `accepted`, or any key but those that begin with "wrong" when there is none.
    """

    def __init__(self, app: ASGIApp, accepted: str | None = None) -> None:
        self._app = app
        self._accepted = None if accepted is None else accepted.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse with 401 or pass on."""
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            refusal = _refusal(dict(scope["headers"]), self._accepted)
            if refusal is not None:
                await refusal.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _refusal(headers: dict[bytes, bytes], accepted: bytes | None) -> ApiError | None:
    given = headers.get(b"authorization", b"")
    key = given[7:].strip() if given[:7].lower() == b"bearer " else headers.get(b"api-key", b"")
    if not key:
        return ApiError(401, "You didn't provide an API key.")
    if key.startswith(REFUSED_KEY) or accepted not in (None, key):
        return ApiError(401, "Incorrect API key provided.", code="invalid_api_key")
    return None


def build(settings: Settings, store: Store, faults: FaultBook) -> ASGIApp:
    """The whole ASGI application over a store; it starts and stops its own threads."""
    runner = BatchRunner(settings, store, faults)
    admin = Admin(store, faults, settings.deployments)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        runner.start()
        flushing = asyncio.create_task(_flush(journal))
        yield
        flushing.cancel()
        with suppress(asyncio.CancelledError):
            await flushing
        await asyncio.to_thread(runner.stop)
        journal.flush()
        store.close()

    api = Starlette(
        routes=[
            *FilesApi(settings, store).routes(),
            *BatchesApi(settings, store, faults, runner).routes(),
            *admin.routes(),
        ],
        exception_handlers={
            ApiError: show_error,
            HTTPException: show_http_error,
            ClientDisconnect: show_nothing,
        },
        lifespan=lifespan,
    )
    journal = admin.journal = Journal(CallFaults(KeyCheck(api, settings.key), faults), store)
    root = settings.dialect.root
    return Rooted(journal, root) if root else journal


async def _flush(journal: Journal) -> None:
    while True:
        await asyncio.sleep(FLUSH_SECONDS)
        await asyncio.to_thread(journal.flush)


class Server(uvicorn.Server):
    """A uvicorn server that says on one line when and where it is ready."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then print the line that `include.simulator.process` waits for."""
        await super().startup(sockets)
        if sockets and not self.should_exit:
            host, port = sockets[0].getsockname()[:2]
            print(f"simulator ready on http://{host}:{port}", flush=True)  # noqa: T201


def _end_with_stdin() -> None:
    """Wait until the other end of standard input is closed, then stop in good order."""
    while os.read(0, 4096):
        pass
    LOG.info("the process that started the simulator has gone: stopping")
    os.kill(os.getpid(), signal.SIGTERM)


def serve(app: ASGIApp, host: str, port: int, *, until_stdin_closes: bool = False) -> None:
    """Serve until SIGINT or SIGTERM; port 0 takes a free one.

    With `until_stdin_closes` it also stops when the process that started it has gone.
    """
    if until_stdin_closes:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    # Proxy headers would wrap the `send` that resets need.
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        timeout_graceful_shutdown=2,
        timeout_keep_alive=75,
        backlog=2048,
    )
    Server(config).run(sockets=[listener])

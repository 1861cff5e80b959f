"""ASGI middleware: call faults happen here, around an application that knows nothing of them."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import struct
from contextlib import suppress
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from include.simulator.api_error import ApiError
from include.simulator.fault_book import FaultBook
from include.simulator.faults import CallFault, Corrupt, Fail, Kill, Reset, Stall, Truncate

LOG = logging.getLogger("simulator")
PID_HEADER = b"x-llm-batch-pid"
NEWLINE = 10
LARGE_BODY = 1 << 20
ABORT_ON_CLOSE = struct.pack("ii", 1, 0)


class CallFaults:
    """Wraps the public API; calls outside /v1 are never disturbed."""

    def __init__(self, app: ASGIApp, faults: FaultBook) -> None:
        self._app = app
        self._faults = faults

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the call on, with the faults that are chosen for it."""
        public = scope["type"] == "http" and scope["path"].startswith("/v1/")
        if not public or not self._faults.concerns_calls():
            await self._app(scope, receive, send)
            return
        chosen = await run_in_threadpool(self._faults.for_call, scope["method"], scope["path"])
        await self._disturbed(chosen, scope, receive, send)

    async def _disturbed(
        self, chosen: list[CallFault], scope: Scope, receive: Receive, send: Send
    ) -> None:
        for fault in chosen:
            if isinstance(fault, Stall) and fault.fault == "stall_before":
                receive = await _received(scope, receive)
                await asyncio.sleep(fault.seconds)
            elif isinstance(fault, Kill) and fault.fault == "kill_before":
                await _kill(fault, scope)
                return
            elif isinstance(fault, Fail) and fault.fault == "fail_before":
                await _drain(receive)
                await _error(fault)(scope, receive, send)
                return
            elif isinstance(fault, Reset) and fault.fault == "reset_before":
                await _reset(scope)
                return
        await self._after(chosen, scope, receive, send)

    async def _after(
        self, chosen: list[CallFault], scope: Scope, receive: Receive, send: Send
    ) -> None:
        for fault in chosen:
            if isinstance(fault, Stall) and fault.fault == "stall_after":
                send = Delayed(send, fault.seconds)
            elif isinstance(fault, Truncate):
                send = Truncated(send, fault, scope)
            elif isinstance(fault, Corrupt):
                send = Corrupted(send, fault)
        last = [fault for fault in chosen if fault.fault.endswith("_after")]
        swallow = any(isinstance(fault, Fail | Reset | Kill) for fault in last)
        await self._app(scope, receive, _nowhere if swallow else send)
        for fault in last:
            if isinstance(fault, Kill):
                await _kill(fault, scope)
                return
            if isinstance(fault, Fail):
                await _error(fault)(scope, receive, send)
                return
        if swallow:
            await _reset(scope)


class Delayed:
    """Sends what it is given, the first message some seconds later."""

    def __init__(self, send: Send, seconds: float) -> None:
        self._send = send
        self._seconds = seconds

    async def __call__(self, message: Message) -> None:
        """Wait once, then pass on."""
        seconds, self._seconds = self._seconds, 0.0
        await asyncio.sleep(seconds)
        await self._send(message)


class Truncated:
    """Sends the first bytes of a body only."""

    def __init__(self, send: Send, fault: Truncate, scope: Scope) -> None:
        self._send = send
        self._fault = fault
        self._scope = scope
        self._left = 0
        self._over = False

    async def __call__(self, message: Message) -> None:
        """Pass on until the cut; then close, or end the body as if it were whole."""
        if self._over:
            return
        if message["type"] == "http.response.start":
            message = self._start(message)
        else:
            body = message.get("body", b"")[: self._left]
            self._left -= len(body)
            self._over = self._left <= 0
            keep_open = self._fault.content_length or not self._over
            message = {**message, "body": body, "more_body": keep_open}
        await self._send(message)
        if self._over and self._fault.content_length:
            await _close(self._scope)

    def _start(self, message: Message) -> Message:
        headers = [(k.lower(), v) for k, v in message["headers"]]
        size = int(dict(headers).get(b"content-length", b"0"))
        cut = self._fault.at_bytes
        self._left = min(size, int(size * self._fault.fraction) if cut is None else cut)
        if not self._fault.content_length:
            headers = [(k, v) for k, v in headers if k != b"content-length"]
        return {**message, "headers": headers}


class Corrupted:
    """Changes a few bytes in the middle of one line of a body."""

    def __init__(self, send: Send, fault: Corrupt) -> None:
        self._send = send
        self._line = fault.line
        self._bytes = fault.bytes

    async def __call__(self, message: Message) -> None:
        """Pass on, changed where the line is."""
        body = message.get("body")
        if body and self._bytes:
            message = {**message, "body": self._changed(bytearray(body))}
        await self._send(message)

    def _changed(self, body: bytearray) -> bytes:
        start = 0
        while self._line > 1:
            end = body.find(b"\n", start)
            if end < 0:
                return bytes(body)
            self._line -= 1
            start = end + 1
        for place in range(start, len(body)):
            if self._bytes and place - start >= 8 and body[place] != NEWLINE:
                body[place] ^= 0x80
                self._bytes -= 1
        return bytes(body)


async def _nowhere(_message: Message) -> None:
    """Swallow the answer of a call whose effect alone is wanted."""


def _error(fault: Fail) -> Any:
    kind = fault.type if fault.status >= 500 or fault.type != "server_error" else "requests"
    return ApiError(
        fault.status,
        fault.message,
        code=fault.code,
        kind=kind,
        retry_after=fault.retry_after,
    ).response()


async def _received(scope: Scope, receive: Receive) -> Receive:
    """A small body, read now: the call takes effect later even if its client has gone by then."""
    if int(dict(scope["headers"]).get(b"content-length", b"0")) > LARGE_BODY:
        return receive
    messages = [await receive()]
    while messages[-1].get("more_body"):
        messages.append(await receive())
    waiting = iter(messages)

    async def again() -> Message:
        return next(waiting, None) or await receive()

    return again


async def _drain(receive: Receive) -> None:
    while (await receive()).get("more_body"):
        pass


async def _reset(scope: Scope) -> None:
    """Close the connection with a TCP reset."""
    connection = scope["simulator.transport"]
    plain = connection.get_extra_info("socket")
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT_ON_CLOSE)
    connection.abort()
    await asyncio.sleep(0.02)


async def _close(scope: Scope) -> None:
    """Close the connection after what has been written."""
    scope["simulator.transport"].close()
    await asyncio.sleep(0.02)


async def _kill(fault: Kill, scope: Scope) -> None:
    """Kill the process that the rule or the call names, then drop the connection."""
    header = dict(scope["headers"]).get(PID_HEADER, b"")
    pid = fault.pid or (int(header) if header.isdigit() else 0)
    if pid > 1:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    else:
        LOG.error("rule %s has no process to kill: give pid or the header", fault.id)
    await _reset(scope)

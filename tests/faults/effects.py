"""Counts everything that a run does to the world outside, and lets the n-th thing go wrong.

Three ports are watched: HTTP calls, SQL commits and file renames.
"""

from __future__ import annotations

import errno
import logging
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import httpx2
import sqlalchemy as sa

from include.errors import LLMBatchError
from include.report import RunReport
from tests.faults.world import World

Done = TypeVar("Done")
Some = TypeVar("Some", bound=World)

BEFORE = "error before"  #: It never happened.
AFTER = "answer lost"  #: It happened, and nobody was told.
EXIT_BEFORE = "exit before"
EXIT_AFTER = "exit after"
REFUSED = "refused"  #: No connection: HTTP only, as all below.
LATE = ("late by 1", "late by 2", "late by 3", "late by 4", "late by 5")  #: calls that overtake it
EXIT_LATE = "exit, late by 2"
KINDS = (BEFORE, AFTER, EXIT_BEFORE, EXIT_AFTER, REFUSED, *LATE, EXIT_LATE)
LASTS = 8  # times that a lasting fault strikes, unless the run has been given up before
OF_HTTP = {REFUSED, *LATE, EXIT_LATE}


class ProcessExit(BaseException):
    """The process ends here: nothing of ours may catch it and go on."""


@dataclass
class Effects:
    """Counts effects, and disturbs the `n`-th; with `lasting`, those of its port until `lift`.

    For the kinds of HTTP alone, only HTTP calls are counted. n = 0 disturbs nothing.
    """

    n: int
    kind: str
    lasting: bool = False
    count: int = 0
    fired: int = 0
    what: str = ""
    _is_over: bool = False
    _port: str = ""
    _is_lifted: bool = False
    _calls: int = 0
    _late: list[tuple[int, httpx2.Request]] = field(default_factory=list)

    def lift(self) -> None:
        """End a lasting fault."""
        self._is_lifted = True

    def _goes_on(self) -> bool:
        return self.lasting and not self._is_lifted and 0 < self.fired < LASTS

    def around(
        self, port: str, name: str, effect: Callable[[], Done], error: Callable[[], Exception]
    ) -> Done:
        """Let the effect happen, or not, or without an answer."""
        if not self._strikes(port, name):
            return effect()
        if self.kind in {AFTER, EXIT_AFTER}:
            effect()
        if self.kind.startswith("exit"):
            raise ProcessExit(name)
        raise error()

    def _strikes(self, port: str, name: str) -> bool:
        if self._is_over or (self.kind in OF_HTTP and port != "http"):
            return False
        self.count += 1
        again = self._goes_on() and port == self._port
        if self.count != self.n and not again:
            return False
        if not self.fired:
            self.what, self._port = f"{port}: {name}", port
        self.fired += 1
        return True

    # HTTP

    def transport(self, inner: httpx2.BaseTransport) -> httpx2.BaseTransport:
        """Return `inner`, watched."""
        return _Watched(self, inner)

    def send(self, request: httpx2.Request, inner: httpx2.BaseTransport) -> httpx2.Response:
        """Pass one call on; calls that are late arrive before the call that is due then."""
        self._calls += 1
        self._arrive(inner)
        name = f"{request.method} {request.url.path}"
        if (
            self.kind in {*LATE, EXIT_LATE}
            and request.method == "POST"
            and self._strikes("http", name)
        ):
            body = request.read()
            due = self._calls + int(self.kind.split()[-1])
            late = httpx2.Request(
                request.method, request.url, headers=request.headers, content=body
            )
            self._late.append((due, late))
            if self.kind == EXIT_LATE:
                raise ProcessExit(name)
            raise httpx2.ReadTimeout("no answer in time", request=request)
        if self.kind in {*LATE, EXIT_LATE}:
            return inner.handle_request(request)

        def call() -> httpx2.Response:
            response = inner.handle_request(request)
            if self.count == self.n or self._goes_on():
                response.read()
            return response

        kind = httpx2.ConnectError if self.kind == REFUSED else httpx2.ReadError
        return self.around("http", name, call, lambda: kind("injected", request=request))

    def end(self, inner: httpx2.BaseTransport) -> None:
        """Disturb nothing from here on; calls that are still late arrive."""
        self._is_over = True
        self._arrive(inner)

    def _arrive(self, inner: httpx2.BaseTransport) -> None:
        """Let the calls that are due reach the API; their answers reach nobody."""
        for due, request in list(self._late):
            if self._is_over or due < self._calls:
                self._late.remove((due, request))
                inner.handle_request(request).read()

    # SQL

    def prepare(self, engine: sa.Engine) -> None:
        """Watch the commits of an engine."""
        commit = engine.dialect.do_commit
        name = f"commit in {Path(str(engine.url.database)).stem}"

        def watched(connection: Any) -> None:
            self.around(
                "sql",
                name,
                lambda: commit(connection),
                lambda: sqlite3.OperationalError("disk I/O error (injected)"),
            )

        engine.dialect.do_commit = watched  # type: ignore[method-assign, assignment]

    # Files

    @contextmanager
    def renames(self, folder: Path) -> Iterator[None]:
        """Watch the renames below a folder."""
        rename = Path.replace

        def watched(path: Path, target: Any) -> Path:
            if not path.is_relative_to(folder):
                return rename(path, target)
            return self.around(
                "file",
                f"rename to {Path(target).name}",
                lambda: rename(path, target),
                lambda: OSError(errno.EIO, "injected"),
            )

        with patch.object(Path, "replace", watched):
            yield


class _Watched(httpx2.BaseTransport):
    def __init__(self, effects: Effects, inner: httpx2.BaseTransport) -> None:
        self._effects = effects
        self._inner = inner

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        return self._effects.send(request, self._inner)


class Said(logging.Handler):
    """Keeps all that is logged and raised, as text."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one record."""
        self.lines.append(self.format(record))

    def raised(self, error: BaseException) -> None:
        """Keep an error, its class included, and all that it came from."""
        seen: BaseException | None = error
        while seen is not None:
            self.lines.append(f"{type(seen).__name__}: {seen}")
            seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to all loggers."""
        root = logging.getLogger()
        level = root.level
        root.addHandler(self)
        root.setLevel(logging.INFO)
        try:
            yield
        finally:
            root.removeHandler(self)
            root.setLevel(level)

    def __str__(self) -> str:
        return "\n".join(self.lines)


def until_done(
    world: World,
    said: Said,
    *,
    effects: Effects | None = None,
    restarts: int = 12,
    mode: str = "normal",
) -> RunReport:
    """Run, and start again after each interruption, until the run is done (I9)."""
    for _ in range(restarts):
        fired = effects.fired if effects else 0
        try:
            report = world.run(mode=mode)
        except (LLMBatchError, OSError, ProcessExit) as error:
            said.raised(error)
            world.close()
            if effects:
                effects.lift()
        else:
            exits = effects is not None and effects.kind.startswith("exit")
            assert not (exits and effects.fired > fired), "somebody swallowed the process's end"
            return report
    raise AssertionError(f"I9: not done after {restarts} starts:\n{said}")


def finished(world: Some, effects: Effects, network: Any, said: Said) -> Some:
    """Run the world until it is done; nothing is counted any more when it is returned."""
    with effects.renames(world.folder):
        until_done(world, said, effects=effects)
    effects.end(network)
    world.prepare = lambda _engine: None
    world.close()
    return world

"""One long-running process of the stack: started, watched, hurt on purpose, stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from include.errors import ConfigurationError
from include.local_stack.environment import MARKER

TAIL_LINES = 25
KILL_TIMEOUT = 60.0  # seconds
KILL_TRIES = 10  # each ends what the ones before have not seen
GRACE = ((signal.SIGINT, 12.0), (signal.SIGTERM, 4.0), (signal.SIGKILL, 4.0))  # seconds each


class ComponentDiedError(ConfigurationError):
    """A component of the stack ended by itself; the message holds the end of its log."""


class Component:
    """A process in a session of its own, with its output appended to `log`."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str]
    ) -> None:
        self.name = name
        self.log = log
        self._command = list(command)
        self._env = dict(env)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id of the running component."""
        if self._process is None:
            msg = f"{self.name} has not been started"
            raise ConfigurationError(msg)
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process; a process that still runs is an error of the caller."""
        if self.is_running:
            msg = f"{self.name} already runs with pid {self.pid}"
            raise ConfigurationError(msg)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        _restore_interrupt()
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        """SIGKILL to the process and all below it; harmless when it has ended already."""
        if not self.is_running:
            return
        for victim in _stopped_tree(self.pid):
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        self.wait(KILL_TIMEOUT)

    def pause(self) -> None:
        """SIGSTOP the process and its children: a machine that hangs."""
        _stopped_tree(self.pid)

    def resume(self) -> None:
        """SIGCONT what `pause` stopped."""
        for process in _tree(self.pid):
            with suppress(psutil.NoSuchProcess):
                process.resume()

    def restart(self) -> None:
        """Start again after `kill`, or stop gracefully and start again."""
        if self.is_running:
            stop_all([self])
        self.start()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process itself, if it still runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def wait(self, seconds: float) -> bool:
        """Wait for the end of the process; False when it still runs after `seconds`."""
        if self._process is None:
            return True
        try:
            self._process.wait(max(seconds, 0.01))
        except subprocess.TimeoutExpired:
            return False
        return True

    def check(self) -> None:
        """Raise `ComponentDiedError` with the end of the log when the process has ended."""
        if self.is_running:
            return
        code = None if self._process is None else self._process.returncode
        msg = f"{self.name} ended with exit code {code}; the end of {self.log}:\n{self.tail()}"
        raise ComponentDiedError(msg)

    def tail(self, lines: int = TAIL_LINES) -> str:
        """The last lines of the log."""
        if not self.log.exists():
            return "(no log)"
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.split("\n")[-lines - 1 :]).rstrip()


def stop_all(components: Iterable[Component]) -> None:
    """Stop components together: SIGINT, then SIGTERM, then SIGKILL to whole process trees."""
    running = [component for component in components if component.is_running]
    trees = [process for component in running for process in _tree(component.pid)]
    for number, grace in GRACE:
        for component in running:
            component.signal(number)
            component.signal(signal.SIGCONT)  # a paused process cannot react
        running = _still_running(running, grace)
        if not running:
            break
    kill_processes(trees)


def marked_processes(home: Path) -> list[Any]:
    """Every `psutil.Process` that a stack of this home started, whoever its parent is now."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARKER) == str(home):
                found.append(process)
    return found


def kill_marked(home: Path) -> None:
    """SIGKILL every process of a stack of this home, also those that begin meanwhile."""
    for _ in range(KILL_TRIES):
        found = marked_processes(home)
        if not found:
            return
        kill_processes(found)


def kill_processes(processes: Iterable[Any]) -> None:
    """SIGKILL processes (of `psutil`) that are still there, and wait until they are gone."""
    alive = [process for process in processes if process.is_running()]
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)


def _tree(pid: int) -> list[Any]:
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    return []


def _stopped_tree(pid: int) -> list[Any]:
    """The process and all below it, stopped: none of them starts another one meanwhile."""
    stopped: list[Any] = []
    while new := [process for process in _tree(pid) if process not in stopped]:
        for process in new:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        stopped += new
    return stopped


def _still_running(components: list[Component], grace: float) -> list[Component]:
    deadline = time.monotonic() + grace
    return [one for one in components if not one.wait(deadline - time.monotonic())]


def _restore_interrupt() -> None:
    """Undo an inherited "ignore SIGINT" (a shell's `command &`): a child would inherit it too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

"""A simulator in a process of its own, for tests, the demo and the fault harness."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from include.simulator.dialects import DIALECTS, OPENAI

ROOT = Path(__file__).resolve().parents[2]
READY = "simulator ready on "
PATIENCE = 120.0  # seconds to start in, and to end in good order, on a busy machine too


class SimulatorError(RuntimeError):
    """The simulator did not start, or refused an admin call; the message says why."""


class Simulator:
    """One running simulator. Use it as a context manager, or call `stop` at the end.

    `base_url` is what an OpenAI client takes, `url` the root without `/v1`. It keeps its port and
    state over `restart`, and ends when the process that started it ends.
    """

    def __init__(self, state: Path, options: list[str]) -> None:
        self.state = state
        self.url = ""
        self._options = options
        self._port = 0
        self._root = ""
        self._process: subprocess.Popen[str] | None = None

    @classmethod
    def start(cls, state: str | os.PathLike[str], **options: Any) -> Self:
        """Start on a free port and wait until it answers.

        Options are those of the command line with underscores: `seconds_in_progress=0.1`,
        `instant=True`, `demo_faults=True`, `port=8765`, `profile="azure"`. `faults` may be a list
        of rules.
        Raises `SimulatorError` when it is not ready within two minutes.
        """
        rules = options.pop("faults", None)
        folder = Path(state)
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(rules, list):
            script = folder / "faults.json"
            script.write_text(json.dumps(rules), encoding="utf-8")
            rules = script
        port = options.pop("port", 0)
        simulator = cls(folder, _command_line({**options, "faults": rules}))
        simulator._port = port
        simulator._root = DIALECTS[options.get("profile", OPENAI.name)].root
        simulator._launch()
        return simulator

    @property
    def base_url(self) -> str:
        """The address for an OpenAI client."""
        return f"{self.url}{self._root}/v1"

    @property
    def pid(self) -> int:
        """The process id, for signals."""
        return self._running().pid

    def stop(self) -> None:
        """End it in good order; harmless when it has ended already."""
        self._end(kill=False)

    def kill(self) -> None:
        """End it with SIGKILL, as a crash would."""
        self._end(kill=True)

    def restart(self) -> None:
        """Start it again with the same state, port and options, ending it first if need be."""
        self._end(kill=False)
        self._launch()

    def bill(self) -> dict[str, Any]:
        """Totals and bill by batch (see `include.simulator.bill`)."""
        bill: dict[str, Any] = self.admin("GET", "/_sim/bill")
        return bill

    def bill_lines(self) -> Iterator[dict[str, Any]]:
        """Each (batch, custom_id) with `billed` and `errors` counts, streamed."""
        with urllib.request.urlopen(f"{self.url}/_sim/bill/lines", timeout=600) as answer:  # noqa: S310 our own URL
            for line in answer:
                yield json.loads(line)

    def batches(self) -> dict[str, Any]:
        """All batches, oldest first, under `batches`; call counts under `calls`."""
        batches: dict[str, Any] = self.admin("GET", "/_sim/batches")
        return batches

    def requests(self) -> list[dict[str, Any]]:
        """The last calls of the public API."""
        calls: list[dict[str, Any]] = self.admin("GET", "/_sim/requests")
        return calls

    def faults(self) -> list[dict[str, Any]]:
        """All fault rules with `seen` and `fired`."""
        rules: list[dict[str, Any]] = self.admin("GET", "/_sim/faults")
        return rules

    def fired(self, rule_id: str) -> int:
        """How often one rule has fired."""
        return next(int(rule["fired"]) for rule in self.faults() if rule["id"] == rule_id)

    def add_faults(self, *rules: dict[str, Any]) -> list[dict[str, Any]]:
        """Add rules; answers with them, their ids included."""
        added: list[dict[str, Any]] = self.admin("POST", "/_sim/faults", list(rules))
        return added

    def clear_faults(self) -> None:
        """Forget all fault rules."""
        self.admin("DELETE", "/_sim/faults")

    def release(self) -> int:
        """Let every batch go on that a fault holds, and return how many there were."""
        return int(self.admin("POST", "/_sim/release"))

    def admin(self, method: str, path: str, body: Any = None) -> Any:
        """One admin call; raises `SimulatorError` with the server's message when refused."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, method=method)  # noqa: S310 our own URL
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 our own URL
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise SimulatorError(f"{method} {path}: {error.read().decode()}") from error
        except OSError as error:
            raise SimulatorError(f"{method} {path}: {error}; {self._condition()}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise SimulatorError("the simulator is not running; call restart() first")
        return self._process

    def _condition(self) -> str:
        """Whether it runs, and the end of its log."""
        code = None if self._process is None else self._process.poll()
        state = "it is running" if code is None and self._process else f"it ended with {code}"
        return f"{state}; its log ends with:\n{self._log()}"

    def _log(self) -> str:
        path = self.state / "simulator.log"
        return path.read_text(encoding="utf-8", errors="replace")[-2000:]

    def _launch(self) -> None:
        command = [sys.executable, "-m", "include.simulator", "--port", str(self._port)]
        with (self.state / "simulator.log").open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [*command, "--state", str(self.state), "--until-stdin-closes", *self._options],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.url = self._wait_until_ready(self._process)
        self._port = int(self.url.rpartition(":")[2])

    def _wait_until_ready(self, process: subprocess.Popen[str]) -> str:
        lines: list[str] = []
        reader = threading.Thread(target=_first_line, args=(process, lines), daemon=True)
        reader.start()
        reader.join(PATIENCE)
        if not lines or not lines[0].startswith(READY):
            self._end(kill=True)
            raise SimulatorError(f"the simulator did not start:\n{self._log()}")
        return lines[0].removeprefix(READY).strip()

    def _end(self, *, kill: bool) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if kill:
            process.kill()
        else:
            process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _first_line(process: subprocess.Popen[str], lines: list[str]) -> None:
    if process.stdout is not None:
        lines.append(process.stdout.readline())


def _command_line(options: dict[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words += [flag, str(value)]
    return words


def wait_for_status(client: Any, batch_id: str, *statuses: str, seconds: float = PATIENCE) -> Any:
    """Retrieve a batch with an OpenAI client until it has one of the statuses; the batch."""
    until = time.monotonic() + seconds
    while True:
        batch = client.batches.retrieve(batch_id)
        if batch.status in statuses:
            return batch
        if time.monotonic() > until:
            raise SimulatorError(f"batch {batch_id} is still {batch.status} after {seconds:g} s")
        time.sleep(0.02)

"""The option `--all-faults`, and the table that the fault tests end with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from include.audit import Finding
from include.simulator.process import Simulator
from tests.faults.effects import Said

COLUMNS = ("fault", "fired", "rows", "billed twice", "lost", "orphans")


@dataclass
class Tally:
    """What the fault tests of a session have seen, by fault."""

    lines: dict[str, list[int]] = field(default_factory=dict)

    def add(self, fault: str, *, fired: int, rows: int, findings: list[Finding]) -> None:
        """Count one audited run."""
        found = [sum(one.invariant == name for one in findings) for name in ("I2", "I1", "I3")]
        line = self.lines.setdefault(fault, [0] * 5)
        for place, number in enumerate((fired, rows, *found)):
            line[place] += number

    def merge(self, lines: dict[str, list[int]]) -> None:
        """Add what another process has counted."""
        for fault, counted in lines.items():
            line = self.lines.setdefault(fault, [0] * len(counted))
            self.lines[fault] = [a + b for a, b in zip(line, counted, strict=True)]

    def text(self) -> list[str]:
        """Return the table as lines."""
        rows = [COLUMNS, *((fault, *map(str, line)) for fault, line in sorted(self.lines.items()))]
        totals = [sum(column) for column in zip(*self.lines.values(), strict=True)]
        rows.append(("all", *map(str, totals)))
        wide = max(len(row[0]) for row in rows)
        return [f"{row[0]:{wide}}" + "".join(f"{cell:>14}" for cell in row[1:]) for row in rows]


TALLY = Tally()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--all-faults` runs every fault instead of the fast part."""
    parser.addoption("--all-faults", action="store_true", help="every fault, some minutes")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand what this worker process of pytest-xdist has counted to the one that prints."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["faults"] = TALLY.lines


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take what a worker process has counted."""
    TALLY.merge(getattr(node, "workeroutput", {}).get("faults", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table."""
    if TALLY.lines:
        terminalreporter.section("faults")
        for line in TALLY.text():
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def tally() -> Tally:
    """Where every audited run is counted."""
    return TALLY


@pytest.fixture(scope="session")
def all_faults(pytestconfig: pytest.Config) -> bool:
    """Whether everything is wanted, or the fast part."""
    return bool(pytestconfig.getoption("--all-faults", default=False))


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that are repeated wait milliseconds."""
    monkeypatch.setattr("include.batch_api.FIRST_PAUSE", 0.002)
    monkeypatch.setattr("include.collecting.PAUSE", 0.01)


@pytest.fixture
def said() -> Iterator[Said]:
    """All that is logged and raised during a test."""
    heard = Said()
    with heard.listening():
        yield heard


@pytest.fixture
def network() -> Iterator[httpx2.HTTPTransport]:
    """A real transport that several worlds may share."""
    with httpx2.HTTPTransport(verify=False) as transport:
        yield transport


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    """One simulator for the tests of a module."""
    with Simulator.start(tmp_path_factory.mktemp("simulator"), instant=True) as simulator:
        yield simulator


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where worlds live."""
    return tmp_path

"""The command that the README begins with prints what the README shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from include.local_stack.component import kill_marked
from include.local_stack.environment import PROJECT

pytestmark = [pytest.mark.system, pytest.mark.long]

PATIENCE = 900.0  # seconds
LEFT_OUT = "…"


def test_the_demo_prints_what_the_readme_shows(tmp_path: Path) -> None:
    """Every figure of its table; said again, all rows are reused, and the bill stays as it was."""
    printed = demo(tmp_path)

    shown = table_of_the_readme()
    assert [line for line in shown if line not in printed] == []

    again = demo(tmp_path)

    assert figures(again, "total")[:7] == ["440", "0", "0", "440", "0", "0", "0"]
    assert bill(again) == bill(printed)


def demo(home: Path) -> list[str]:
    """The lines of one whole `make demo`, with its files below `home`."""
    command = [sys.executable, "-m", "include.local_stack", "demo", "--home", str(home)]
    try:
        ended = subprocess.run(
            command, cwd=PROJECT, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    finally:
        kill_marked(home)  # nothing is left, unless it was ended for taking too long
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout.splitlines()


def table_of_the_readme() -> list[str]:
    """What the README shows of it from the table on: what comes before is a matter of seconds."""
    block = (PROJECT / "README.md").read_text().split("$ make demo\n")[1].split("```")[0]
    lines = block.splitlines()
    (header,) = (number for number, line in enumerate(lines) if line.startswith("day "))
    return [line for line in lines[header:] if line != LEFT_OUT]


def figures(lines: list[str], first: str) -> list[str]:
    """The figures of a line of the table."""
    (line,) = (line for line in lines if line.startswith(first))
    return line.split()[1:]


def bill(lines: list[str]) -> str:
    """The line with the simulator's own bill."""
    (line,) = (line for line in lines if line.startswith("The simulator's own bill"))
    return line.partition(";")[0]

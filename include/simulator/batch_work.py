"""Answering one batch: its input file in, output and error file and bill lines out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from include.simulator.answers import Answers
from include.simulator.faults import LineError, number_of
from include.simulator.line_plan import (
    LinePlan,
    bare_error_line,
    damaged,
    damages_of,
    ending_of,
    error_of,
    http_error_line,
    is_dropped,
    refused_line,
    top_error_line,
    unanswered_line,
)
from include.simulator.refusals import refusal
from include.simulator.result_files import ResultFile

BillLine = tuple[int, str, int, int, int, int, int]  # the columns of the table bill_line
UNANSWERED = 0
REFUSED = 400
BREATHS = 2048


def _from(file: BinaryIO, start: int) -> Iterator[bytes]:
    """All lines once, those after `start` first."""
    left = 0
    if start:
        file.seek(start)
        file.readline()
        left = file.tell()
        yield from file
        file.seek(0)
    for line in file:
        if start and left <= 0:
            return
        left -= len(line)
        yield line


@dataclass
class Work:
    """One batch to answer, and what came of it.

    The file is read from the first line after the byte `start` to its end, then from its
    beginning. Only the first `answered` requests are answered; the others end with `left_code`.
    """

    batch_no: int
    endpoint: str
    source: Path
    output: ResultFile
    error: ResultFile
    answers: Answers
    plan: LinePlan
    answered: int
    left_code: str
    unique: str
    three_error_lines: bool = False
    start: int = 0
    completed: int = 0
    failed: int = 0
    bill: list[BillLine] = field(default_factory=list)
    tokens: list[int] = field(default_factory=lambda: [0, 0, 0, 0])

    def run(self, may_go_on: Callable[[], bool]) -> bool:
        """Answer all lines; False when it was told to stop half-way."""
        number = 0
        with self.source.open("rb", buffering=1 << 20) as file:
            for raw in _from(file, self.start):
                if raw.isspace():
                    continue
                request = orjson.loads(raw)
                if number < self.answered:
                    self._answer(request, f"{self.unique}{number:06x}")
                else:
                    self._leave(request["custom_id"], f"{self.unique}{number:06x}")
                number += 1
                if number % BREATHS == 0:
                    if not may_go_on():
                        return False
                    time.sleep(0)  # lets the server's thread take its turn
        self.output.close()
        self.error.close()
        return True

    def discard(self) -> None:
        """Throw both files away."""
        self.output.path.unlink()
        self.error.path.unlink()

    def _leave(self, custom_id: str, unique: str) -> None:
        self.error.write(unanswered_line(unique, custom_id, self.left_code))
        self.bill.append((self.batch_no, custom_id, UNANSWERED, 0, 0, 0, 0))

    def _answer(self, request: dict[str, Any], unique: str) -> None:
        refused = refusal(self.endpoint, request["body"])
        if refused is not None:
            self._turn_down(
                request["custom_id"], refused_line(unique, request["custom_id"], refused)
            )
            return
        if self.plan:
            self._answer_with_faults(request, unique)
            return
        self.output.write(orjson.dumps(self._paid_line(request, unique, "")))

    def _turn_down(self, custom_id: str, line: bytes) -> None:
        self.error.write(line)
        self.bill.append((self.batch_no, custom_id, REFUSED, 0, 0, 0, 0))
        self.failed += 1

    def _paid_line(self, request: dict[str, Any], unique: str, ending: str) -> dict[str, Any]:
        custom_id: str = request["custom_id"]
        answer = self.answers.answer(request["body"], unique, ending=ending)
        self._pay(custom_id, answer.usage)
        self.completed += 1
        return {
            "id": f"batch_req_{unique}",
            "custom_id": custom_id,
            "response": {"status_code": 200, "request_id": unique, "body": answer.body},
            "error": None,
        }

    def _pay(self, custom_id: str, usage: tuple[int, int, int, int]) -> None:
        self.bill.append((self.batch_no, custom_id, 200, *usage))
        tokens = self.tokens
        tokens[0] += usage[0]
        tokens[1] += usage[1]
        tokens[2] += usage[2]
        tokens[3] += usage[3]

    def _answer_with_faults(self, request: dict[str, Any], unique: str) -> None:
        custom_id: str = request["custom_id"]
        rules = self.plan.struck(custom_id)
        error = error_of(rules)
        if error is not None:
            self._refuse(unique, custom_id, error)
            self.bill.append((self.batch_no, custom_id, error.status, 0, 0, 0, 0))
            self.failed += 1
            return
        line = self._paid_line(request, unique, ending_of(rules))
        if is_dropped(rules):
            return
        for into_errors, raw in damaged(line, damages_of(rules)):
            (self.error if into_errors else self.output).write(raw)

    def _refuse(self, unique: str, custom_id: str, error: LineError) -> None:
        """Write the line of a refused request: as OpenAI does, or in one of three ways."""
        way = number_of(custom_id) % 3 if self.three_error_lines else 0
        if way == 0:
            self.error.write(http_error_line(unique, custom_id, error))
        elif way == 1:
            self.error.write(top_error_line(unique, custom_id, error))
        else:
            self.output.write(bare_error_line(unique, custom_id, error))

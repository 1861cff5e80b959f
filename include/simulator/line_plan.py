"""Which lines of one batch go wrong, and what is written for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container
from typing import Any

import orjson

from include.simulator.faults import (
    Fault,
    LineDamage,
    LineDrop,
    LineEnding,
    LineError,
    LineRule,
    number_of,
)
from include.simulator.refusals import Refusal

ERRORS: dict[int, tuple[str, str, str]] = {
    400: ("invalid_request_error", "invalid_value", "The request could not be processed."),
    408: ("timeout", "request_timeout", "The request timed out."),
    409: ("conflict", "conflict", "The request conflicts with another one."),
    429: ("rate_limit_error", "rate_limit_exceeded", "Rate limit reached. Please try again."),
    500: ("server_error", "server_error", "The server had an error while processing the request."),
    503: ("server_error", "service_unavailable", "The service is temporarily overloaded."),
}
Written = list[tuple[bool, bytes]]  # (into the error file?, line without its end)


class LinePlan:
    """The line rules of one batch, in order; the first error, drop or ending wins.

    `times_before(rule id, custom_id)` says how often a rule has struck an id in earlier batches.
    """

    def __init__(self, rules: list[Fault], times_before: Callable[[str, str], int]) -> None:
        self._rules = [rule for rule in rules if isinstance(rule, LineRule)]
        self._times_before = times_before
        self.hits: list[tuple[str, str]] = []
        self.fired: Counter[str] = Counter()

    def __bool__(self) -> bool:
        return bool(self._rules)

    def struck(self, custom_id: str) -> list[LineRule]:
        """The rules that strike the line with this id, noted as fired."""
        found: list[LineRule] = []
        number = number_of(custom_id)
        for rule in self._rules:
            if rule.selects(custom_id, number) and self._in_time(rule, custom_id):
                self.fired[rule.id] += 1
                found.append(rule)
        return found

    def _in_time(self, rule: LineRule, custom_id: str) -> bool:
        if rule.first_times is None:
            return True
        if self._times_before(rule.id, custom_id) >= rule.first_times:
            return False
        self.hits.append((rule.id, custom_id))
        return True


def error_of(rules: list[LineRule]) -> LineError | None:
    """The HTTP error that the line gets, None when it is answered."""
    return next((rule for rule in rules if isinstance(rule, LineError)), None)


def ending_of(rules: list[LineRule]) -> str:
    """How the answer has to end, as `Answers.answer` takes it."""
    names = {"cut_off": "length", "schema_invalid": "invalid"}
    for rule in rules:
        if isinstance(rule, LineEnding):
            return names.get(rule.fault, rule.fault)
        if isinstance(rule, LineDamage) and rule.fault == "line_separator":
            return "separators"
    return ""


def damages_of(rules: list[LineRule]) -> list[LineDamage]:
    """What is done to the finished line."""
    return [rule for rule in rules if isinstance(rule, LineDamage)]


def is_dropped(rules: list[LineRule]) -> bool:
    """Whether nothing is written for the line."""
    return any(isinstance(rule, LineDrop) for rule in rules)


def http_error_line(unique: str, custom_id: str, rule: LineError) -> bytes:
    """A refused request, as the API writes it: the error in the body, none at the top."""
    return _error_line(unique, custom_id, rule.status, _error_object(rule))


def refused_line(unique: str, custom_id: str, refused: Refusal) -> bytes:
    """A request that the endpoint refuses for what is in it."""
    kind, _, _ = ERRORS[400]
    body = {"message": refused.message, "type": kind, "param": refused.param, "code": refused.code}
    return _error_line(unique, custom_id, 400, body)


def _error_line(unique: str, custom_id: str, status: int, body: dict[str, Any]) -> bytes:
    response = {"status_code": status, "request_id": unique, "body": {"error": body}}
    line = {"id": f"batch_req_{unique}", "custom_id": custom_id, "response": response}
    return orjson.dumps({**line, "error": None})


def top_error_line(unique: str, custom_id: str, rule: LineError) -> bytes:
    """A refused request as the published schema has it: an error at the top, no response."""
    line = {"id": f"batch_req_{unique}", "custom_id": custom_id, "response": None}
    return orjson.dumps({**line, "error": _error_object(rule)})


def bare_error_line(unique: str, custom_id: str, rule: LineError) -> bytes:
    """A refused request as other servers write it: a status without body, a code as a number."""
    line = {"id": unique, "custom_id": custom_id, "response": {"status_code": rule.status}}
    error = {**_error_object(rule), "object": "error", "code": rule.status}
    return orjson.dumps({**line, "error": error})


def _error_object(rule: LineError) -> dict[str, Any]:
    kind, code, message = ERRORS.get(rule.status, ERRORS[400 if rule.status < 500 else 500])
    return {"message": message, "type": kind, "param": None, "code": rule.code or code}


def unanswered_line(unique: str, custom_id: str, code: str) -> bytes:
    """A request that was never answered: `batch_expired` or `batch_cancelled`."""
    reason = {
        "batch_expired": "before the completion window expired",
        "batch_cancelled": "before the batch was cancelled",
    }[code]
    error = {"code": code, "message": f"This request could not be executed {reason}."}
    line = {"id": f"batch_req_{unique}", "custom_id": custom_id, "response": None}
    return orjson.dumps({**line, "error": error})


def damaged(line: dict[str, Any], damages: list[LineDamage]) -> Written:
    """The lines that are written in place of `line`."""
    kinds: dict[str, LineDamage] = {damage.fault: damage for damage in damages}
    raw = _damaged_text(_damaged_object(line, kinds), kinds)
    if "torn_line" in kinds:
        raw = raw[: len(raw) // 2]
    written = [("in_error_file" in kinds, raw)]
    if "duplicate_line" in kinds:
        written.append((False, raw))
    if "foreign_line" in kinds:
        written.append((False, orjson.dumps({**line, "custom_id": f"foreign-{line['id']}"})))
    return written


def _damaged_object(line: dict[str, Any], kinds: Container[str]) -> dict[str, Any]:
    if "body_as_string" in kinds:
        text = orjson.dumps(line["response"]["body"]).decode()
        line = {**line, "response": {**line["response"], "body": text}}
    if "nul" in kinds:
        line = {**line, "trace": "a\x00b"}
    if "line_separator" in kinds:
        line = {**line, "trace": "a\u2028b"}
    return line


def _damaged_text(line: dict[str, Any], kinds: dict[str, LineDamage]) -> bytes:
    """What no JSON encoder writes is put in front of the closing brace."""
    raw = orjson.dumps(line)
    if "nan" in kinds:
        raw = raw[:-1] + b',"latency":NaN}'
    if "lone_surrogate" in kinds:
        raw = raw[:-1] + b',"note":"\\ud83d"}'
    if "long_line" in kinds:
        raw = raw[:-1] + b',"filling":"' + b"x" * kinds["long_line"].size + b'"}'
    return raw

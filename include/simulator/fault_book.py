"""Which rules there are, how often each was met and how often it fired; kept in the store."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson

from include.simulator.faults import (
    RULE,
    RULES,
    BatchRule,
    CallFault,
    CallRule,
    Fault,
    Rule,
    Stuck,
)
from include.simulator.records import BatchRecord
from include.simulator.store import Store

RuleType = TypeVar("RuleType", bound=Rule)


@dataclass
class Entry:
    """One rule; matches `seen`, times it `fired`, batches it was `chosen` for."""

    rule: Fault
    seen: int = 0
    fired: int = 0
    chosen: int = 0

    def show(self) -> dict[str, Any]:
        """The rule as it was given, its id and its counts."""
        shown = self.rule.model_dump(mode="json", exclude_defaults=True)
        return {**shown, "seen": self.seen, "fired": self.fired}


class FaultBook:
    """The rules in force. All methods may be called from any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        for row in store.rows("SELECT * FROM rule ORDER BY no"):
            rule = RULE.validate_json(row["definition"])
            self._entries[row["id"]] = Entry(rule, row["seen"], row["fired"], row["chosen"])

    def add(self, rules: Any) -> list[dict[str, Any]]:
        """Add a list of rules; raises `pydantic.ValidationError` and adds none if one is wrong.

        A rule with the `id` of an older one takes its place.
        """
        parsed = RULES.validate_python(rules)
        named: list[Fault] = []
        with self._store.transaction() as db:
            taken = db.execute("SELECT ifnull(max(no), 0) FROM rule").fetchone()[0]
            for number, rule in enumerate(parsed, start=taken + 1):
                named.append(rule.model_copy(update={"id": rule.id or f"fault-{number}"}))
                db.execute(
                    "INSERT INTO rule (no, id, definition) VALUES (?, ?, ?)"
                    " ON CONFLICT (id) DO UPDATE SET definition = excluded.definition,"
                    " seen = 0, fired = 0, chosen = 0",
                    (number, named[-1].id, named[-1].model_dump_json()),
                )
        with self._lock:
            self._entries.update({rule.id: Entry(rule) for rule in named})
            return [self._entries[rule.id].show() for rule in named]

    def clear(self) -> None:
        """Forget all rules; batches keep the ones that were chosen for them."""
        with self._store.transaction() as db:
            db.execute("DELETE FROM rule")
            db.execute("DELETE FROM rule_hit")
        with self._lock:
            self._entries.clear()

    def show(self) -> list[dict[str, Any]]:
        """All rules with `seen` and `fired`."""
        with self._lock:
            return [entry.show() for entry in self._entries.values()]

    def concerns_calls(self) -> bool:
        """Whether any rule is about HTTP calls at all."""
        return any(isinstance(entry.rule, CallRule) for entry in self._snapshot())

    def for_call(self, method: str, path: str) -> list[CallFault]:
        """The rules that act on this call, counted as fired."""
        chosen: list[CallFault] = []
        for entry in self._snapshot():
            rule = entry.rule
            if not isinstance(rule, CallFault) or not rule.matches(method, path):
                continue
            if self._meet(entry, counts=True):
                chosen.append(rule)
        return chosen

    def of(self, kind: type[RuleType]) -> list[RuleType]:
        """The rules of one kind, whether or not they can still fire."""
        return [entry.rule for entry in self._snapshot() if isinstance(entry.rule, kind)]

    def strikes(self, rule: Rule) -> bool:
        """Meet a service fault whose condition holds; say whether it is to act, and count it."""
        entry = self._entries.get(rule.id)
        return entry is not None and self._meet(entry, counts=True)

    def for_batch(self, metadata: dict[str, str], endpoint: str) -> list[Fault]:
        """The rules chosen for a batch that is being created. They fire later, by `fired`."""
        chosen: list[Fault] = []
        for entry in self._snapshot():
            rule = entry.rule
            concerned = isinstance(rule, BatchRule) and rule.concerns(metadata, endpoint)
            if concerned and self._meet(entry, counts=False):
                chosen.append(rule)
        return chosen

    def fired(self, rule_id: str, times: int = 1) -> None:
        """Count that a chosen rule has acted."""
        entry = self._entries.get(rule_id)
        if entry is not None and times:
            with self._lock:
                entry.fired += times
            self._write(entry, seen=0, fired=times, chosen=0)

    def _snapshot(self) -> list[Entry]:
        with self._lock:
            return list(self._entries.values())

    def _meet(self, entry: Entry, *, counts: bool) -> bool:
        """Count one match; say whether to act, and count that as fired if it `counts`."""
        with self._lock:
            entry.seen += 1
            limit = entry.fired if counts else entry.chosen
            due = entry.rule.due(entry.seen, limit)
            entry.chosen += due
            entry.fired += due and counts
        self._write(entry, seen=1, fired=int(due and counts), chosen=int(due))
        return due

    def _write(self, entry: Entry, *, seen: int, fired: int, chosen: int) -> None:
        """Keep the counts. Never under the lock: a writer of the store may be waiting for it."""
        with self._store.transaction() as db:
            db.execute(
                "UPDATE rule SET seen = seen + ?, fired = fired + ?, chosen = chosen + ?"
                " WHERE id = ?",
                (seen, fired, chosen, entry.rule.id),
            )

    def release(self) -> int:
        """Take `stuck` away from the batches that have it, and return how many there were."""
        with self._store.transaction() as db:
            held = [one for one in self._store.batches() if one.next_at and trait(one, Stuck)]
            for batch in held:
                left = [rule for rule in traits_of(batch) if not isinstance(rule, Stuck)]
                db.execute(
                    "UPDATE batch SET traits = ?, next_at = min(next_at, ?) WHERE no = ?",
                    (traits_text(left), time.time(), batch.no),
                )
        return len(held)


def traits_text(rules: Sequence[Fault]) -> str:
    """The rules chosen for a batch, as the store keeps them."""
    return orjson.dumps([rule.model_dump(mode="json") for rule in rules]).decode()


def traits_of(batch: BatchRecord) -> list[Fault]:
    """The rules chosen for a batch when it was created."""
    return RULES.validate_json(batch.traits) if len(batch.traits) > 2 else []


def trait(batch: BatchRecord, kind: type[RuleType]) -> RuleType | None:
    """The first rule of a kind that was chosen for a batch."""
    return next((rule for rule in traits_of(batch) if isinstance(rule, kind)), None)

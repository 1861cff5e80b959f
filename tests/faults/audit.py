"""The audit that ends every fault test: the product's own, and what only the simulator knows."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import sqlalchemy as sa

from include import audit as product
from include import ledger_database, spending
from include.audit import Finding
from include.ledger_records import Batch, Run
from tests.faults.queue_world import QueueWorld
from tests.faults.world import KEY, TEXT, World

CANARIES = (KEY, "canary-7c1f", TEXT)
# What differs between two runs that did the same work.
OF_THE_RUN = {"_run_id", "_interval_start", "_interval_end", "_loaded_at", "_failed_at"}
OF_THE_RUN |= {"_batch_id"}
OF_THE_DRAIN = {"run_id", "batch_id", "queued_at", "claimed_at", "ended_at"}


@dataclass(frozen=True)
class Result:
    """What a run left behind that must not depend on what went wrong on the way."""

    files: dict[str, str]  # digests of the request files, by round and shard
    results: list[dict[str, Any]]
    failures: list[dict[str, Any]]


def result_of(world: World) -> Result:
    """Return what the first run of a world came to."""
    artifacts = world.folder / "artifacts"
    return Result(
        {
            f"round-{one.round}/shard-{one.shard}": _digest(artifacts / one.request_file)
            for one in world.ledger().batches(world.run_ids[0])
        },
        rows_of(world, world.spec.target.table),
        rows_of(world, world.spec.target.failures_table),
    )


def rows_of(world: World, table: str) -> list[dict[str, Any]]:
    """Return a target table without what every run writes anew, ordered by key."""
    with world.target().connect() as connection:
        if not sa.inspect(connection).has_table(table):
            return []
        query = sa.select(sa.text("*")).select_from(sa.table(table)).order_by(sa.text("note_id"))
        rows = connection.execute(query).mappings()
        return [{k: v for k, v in row.items() if k not in OF_THE_RUN} for row in rows]


def full_audit(
    world: World, said: str = "", *, like: Result | None = None, first_round_only: bool = False
) -> list[Finding]:
    """Return every broken invariant of all runs of a world.

    `said` is all that was logged and raised. `like` is what the same rows came to without a fault.
    """
    findings = []
    ledger = world.ledger()
    for run_id in dict.fromkeys(world.run_ids):
        run, batches = ledger.run(run_id), ledger.batches(run_id)
        if run_id == world.run_ids[-1]:
            findings += _of_product(world, run_id)
        findings += _of_run(world, run, batches)
    findings += _of_limit(world)
    if like is not None:
        findings += _of_likeness(result_of(world), like, first_round_only=first_round_only)
    return findings + _of_secrecy(world, said)


def queue_audit(
    world: QueueWorld, said: str = "", *, like: dict[str, dict[str, Any]] | None = None
) -> list[Finding]:
    """Return every broken invariant of a queue whose requests have all ended.

    `like` is what the same requests came to without a fault.
    """
    ledger, findings = world.ledger(), []
    for run_id in world.run_ids:
        findings += _of_product(world, run_id)
        findings += _of_run(world, ledger.run(run_id), ledger.batches(run_id))
    findings += [
        Finding("I2" if "billed" in problem else "I1", problem) for problem in world.problems()
    ]
    if like is not None and ended_of(world) != like:
        findings.append(Finding("I1", "the requests have not ended as they do without a fault"))
    # The table of the queue, which holds what is asked, is in the ledger's database.
    return findings + _of_places({"what was logged and raised": said.encode()})


def ended_of(world: QueueWorld) -> dict[str, dict[str, Any]]:
    """Return how each request of a queue ended, without what every drain writes anew."""
    return {
        name: {column: value for column, value in row.items() if column not in OF_THE_DRAIN}
        for name, row in world.rows().items()
    }


def _of_product(world: World, run_id: str) -> list[Finding]:
    """What the product's own audit says of a run."""
    skew = timedelta(seconds=world.policy.skew)
    return product.audit(
        run_id, world.ledger(), world.artifacts(), world.target(), world.api(), skew=skew
    )


def _of_run(world: World, run: Run, batches: list[Batch]) -> list[Finding]:
    """What the simulator knows of a run."""
    return [
        *_of_bill(world, run),
        *_of_money(world, run, batches),
        *_of_truth(world, run, batches),
        *_of_files(world, batches),
    ]


def _of_limit(world: World) -> list[Finding]:
    """I2: the budget that runs share knows what they have cost, and nothing is on its way."""
    if world.limit is None:
        return []
    ledger = world.ledger()
    with ledger_database.reading(ledger.engine) as connection:
        found = spending.of_limit(connection, world.limit.name)
    batches = [one for run_id in set(world.run_ids) for one in ledger.batches(run_id)]
    cost = sum((one.cost_usd or Decimal(0) for one in batches), Decimal(0))
    if (found.spent, found.in_flight) == (cost, Decimal(0)):
        return []
    return [Finding("I2", f"{world.limit.name} has {found}; its runs have cost ${cost}")]


def _of_bill(world: World, run: Run) -> list[Finding]:
    """I2: no (row, round) was processed twice; what was billed is what the ledger says."""
    billed: Counter[tuple[str, str]] = Counter()
    tags = {one["id"]: one["metadata"] or {} for one in world.simulator.batches()["batches"]}
    for line in world.simulator.bill_lines():
        if tags[line["batch_id"]].get("run_id") == run.run_id:
            billed[tags[line["batch_id"]]["round"], line["custom_id"]] += line["billed"]
    twice = [key for key, times in billed.items() if times > 1]
    if twice:
        return [Finding("I2", f"{run}: {len(twice)} (round, row) were billed twice: {twice[:3]}")]
    return []


def _of_money(world: World, run: Run, batches: list[Batch]) -> list[Finding]:
    """I2: the ledger's dollars are the bill's; less only where paid lines never arrived."""
    billed, dollars = bill_of(world, run.run_id)
    ours = sum((one.cost_usd or Decimal(0) for one in batches), Decimal(0))
    is_whole = not any(one.missing or one.quarantined or one.duplicates for one in batches)
    if (is_whole and ours != dollars) or ours > dollars:
        return [Finding("I2", f"{run}: the ledger has ${ours}, the bill ${dollars} for {billed}")]
    return []


def bill_of(world: World, run_id: str) -> tuple[int, Decimal]:
    """Return the requests and dollars that the simulator has billed for a run."""
    lines = [
        one
        for one in world.simulator.bill()["by_batch"]
        if (one["metadata"] or {}).get("run_id") == run_id
    ]
    dollars = sum((Decimal(one["cost_usd"]) for one in lines), Decimal(0))
    return sum(one["requests"] for one in lines), dollars


def _of_truth(world: World, run: Run, batches: list[Batch]) -> list[Finding]:
    """I3 against the simulator's own list, hidden and lost batches included.

    A late POST that the fence has refused may arrive after the last look; it costs nothing.
    """
    every = world.simulator.batches()["batches"]
    ours = [one for one in every if (one["metadata"] or {}).get("run_id") == run.run_id]
    made = {one["id"] for one in ours}
    refused = {one["id"] for one in ours if one["status"] == "failed" and not one["completed"]}
    extra = world.ledger().duplicates([one.submission_id for one in batches])
    known = {one.batch_id for one in batches} | {one["batch_id"] for one in extra}
    return [
        Finding("I3", f"{run}: {problem} {ids}")
        for problem, ids in (("orphans", made - known - refused), ("ghosts", known - made))
        if ids
    ]


def _of_files(world: World, batches: list[Batch]) -> list[Finding]:
    """I6: the files on disk are those that the ledger recorded when they were built."""
    artifacts = world.folder / "artifacts"
    return [
        Finding("I6", f"{one}: its request file has changed")
        for one in batches
        if _size_and_ids(artifacts / one.request_file)
        != (one.bytes, _index_ids(artifacts / str(one.index_file)))
    ]


def _of_likeness(found: Result, like: Result, *, first_round_only: bool) -> list[Finding]:
    """I6 and I4: the same request files and the same tables as without a fault."""
    findings = []
    rounds = "round-1/" if first_round_only else "round-"
    names = [name for name in found.files.keys() | like.files.keys() if name.startswith(rounds)]
    changed = sorted(name for name in names if found.files.get(name) != like.files.get(name))
    if changed:
        findings.append(Finding("I6", f"request files differ: {changed}"))
    tables = (("results", found.results, like.results), ("failures", found.failures, like.failures))
    return findings + [
        Finding("I1", f"{name} differ: {len(ours)} rows, without a fault {len(theirs)}")
        for name, ours, theirs in tables
        if ours != theirs
    ]


def _of_secrecy(world: World, said: str) -> list[Finding]:
    """I10: no key and no row text in the ledger, in a log or in an exception."""
    places = {"what was logged and raised": said.encode()}
    places |= {path.name: path.read_bytes() for path in world.folder.glob("ledger.db*")}
    places["target.db"] = (world.folder / "target.db").read_bytes()
    return _of_places(places)


def _of_places(places: dict[str, bytes]) -> list[Finding]:
    return [
        Finding("I10", f"{canary!r} is in {place}")
        for place, content in places.items()
        for canary in CANARIES
        if canary.encode() in content
    ]


def _size_and_ids(path: Path) -> tuple[int, list[str]]:
    data = path.read_bytes()
    return len(data), [json.loads(line)["custom_id"] for line in data.split(b"\n")[:-1]]


def _index_ids(path: Path) -> list[str]:
    ids: list[str] = pq.read_table(path, columns=["_custom_id"])["_custom_id"].to_pylist()
    return ids


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

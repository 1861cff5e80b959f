"""The audit of many runs, told by invariant: what holds, what does not, what to do about it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import orjson
import pyarrow.parquet as pq

from include.artifacts import Artifacts
from include.audit import Finding, audit
from include.errors import ConfigurationError
from include.figures import counted
from include.job_spec import JobSpec
from include.ledger import Ledger
from include.ledger_records import Batch, Run, RunState
from include.target_place import Place

if TYPE_CHECKING:
    from include.batch_api import BatchApi

PROMISES = {
    "I1": (
        "every row of a partition has ended exactly once",
        "Run the partition again: only what is missing is sent.",
    ),
    "I2": (
        "no request file was processed twice",
        "It is paid for. A longer [llm_batch] submit_grace makes it rarer.",
    ),
    "I3": (
        "every batch at the API is in the ledger, and the reverse",
        "Run the DAG batch_housekeeping: it adopts or cancels what is ours and unknown.",
    ),
    "I5": (
        "every line of the result files is accounted for",
        "Keep the run's artifacts, and report it.",
    ),
    "I6": (
        "request files are those that were recorded",
        "Somebody has changed the artifacts: restore them from the backup.",
    ),
    "I7": ("states moved only along the drawn edges", "Somebody has written into the ledger."),
    "I8": ("rounds and spend are bounded", "Report it; lower budget.max_usd meanwhile."),
}
ONLY_TESTS = {
    "I4": "loading twice is loading once",
    "I9": "when faults stop, a run finishes unaided",
    "I10": "keys and rows appear nowhere else",
}


@dataclass(frozen=True)
class Promise:
    """One invariant over all runs that were looked at."""

    invariant: str
    text: str
    findings: list[str] = field(default_factory=list)
    mend: str = ""

    @property
    def holds(self) -> bool:
        """Whether nothing was found."""
        return not self.findings


@dataclass(frozen=True)
class AuditReport:
    """What was looked at, and each invariant; `skipped` says why a run was not."""

    runs: list[str]
    skipped: dict[str, str]
    promises: list[Promise]

    @property
    def holds(self) -> bool:
        """Whether every invariant holds for every run that was looked at."""
        return all(one.holds for one in self.promises)


def audit_report(
    runs: Sequence[Run],
    ledger: Ledger,
    artifacts: Artifacts,
    target: Callable[[JobSpec], Place],
    api: Callable[[str], BatchApi],
) -> AuditReport:
    """Audit `runs`, newest first; of several runs of one partition only the newest.

    A later run changes the target, so an earlier one cannot be held against it. `api` is called
    with a connection id. Reads only. Raises what the ledger, the API or a target raise when they
    do not answer.
    """
    findings: list[Finding] = []
    done: list[str] = []
    skipped: dict[str, str] = {}
    partitions = set()
    for run in runs:
        partition = (run.job, run.interval_start, run.interval_end)
        reason = _reason_to_skip(run, is_newest=partition not in partitions)
        partitions.add(partition)
        if reason:
            skipped[run.run_id] = reason
            continue
        spec = JobSpec.from_json(run.spec)
        try:
            found = [
                *audit(run.run_id, ledger, artifacts, target(spec), api(spec.request.conn_id)),
                *_of_request_files(run, ledger, artifacts),
                *_of_duplicates(run, ledger),
            ]
        except ConfigurationError as error:
            skipped[run.run_id] = str(error)
            continue
        findings += found
        done.append(run.run_id)
    return AuditReport(done, skipped, _promises(findings))


def _reason_to_skip(run: Run, *, is_newest: bool) -> str | None:
    if run.state != RunState.DONE:
        return "it is not done"
    return None if is_newest else "a later run of its partition is there"


def _promises(findings: Sequence[Finding]) -> list[Promise]:
    return [
        Promise(name, text, [one.message for one in findings if one.invariant == name], mend)
        for name, (text, mend) in PROMISES.items()
    ]


def _of_duplicates(run: Run, ledger: Ledger) -> Iterator[Finding]:
    """I2: as far as the ledger knows; what the provider has billed is on its own invoice."""
    batches = ledger.batches(run.run_id)
    for one in ledger.duplicates([batch.submission_id for batch in batches]):
        if one["done_requests"] and one["kept_batch_id"]:
            yield Finding(
                "I2",
                f"{run}: {one['batch_id']} did {counted(one['done_requests'], 'request')} "
                f"beside {one['kept_batch_id']}.",
            )


def _of_request_files(run: Run, ledger: Ledger, artifacts: Artifacts) -> Iterator[Finding]:
    """I6: the files that are there are those that were recorded when they were built."""
    for batch in ledger.batches(run.run_id):
        if not _is_as_recorded(batch, artifacts):
            yield Finding("I6", f"{batch}: request file {batch.request_file} has changed.")


def _is_as_recorded(batch: Batch, artifacts: Artifacts) -> bool:
    """Whether size and requests are those of the index (a file of the user's own: its digest)."""
    with artifacts.open(batch.request_file) as stream:
        if batch.index_file is None:
            found = hashlib.file_digest(cast("Any", stream), "sha256").hexdigest()
            return found == batch.content_digest
        size, ids = 0, []
        for line in stream:
            size += len(line)
            ids.append(_custom_id(line))
    with artifacts.open(batch.index_file) as stream:
        recorded = pq.read_table(stream, columns=["_custom_id"])["_custom_id"].to_pylist()
    return (size, ids) == (batch.bytes, recorded)


def _custom_id(line: bytes) -> str | None:
    try:
        return str(orjson.loads(line)["custom_id"])
    except (ValueError, TypeError, KeyError):
        return None

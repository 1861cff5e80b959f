"""The steps of a run, one function each; an Airflow operator calls one of them.

    open_run ─► extract ─► round 1 [ build ─► submit ─► wait ─► collect ─► settle ] ─► … ─► load

Every step may be killed and called again at any line: it finds in the ledger what is done, and
does the rest. Later steps work with the spec that the run was opened with.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from sqlalchemy.engine import Engine

from include import cost
from include.artifacts import Artifacts
from include.errors import ConfigurationError
from include.job_spec import JOBS_ROOT, JobSpec
from include.ledger import Ledger
from include.ledger_records import Batch, NewBatch, Partition, Round, Run, RunState
from include.submission import SubmissionPolicy, drop_duplicate
from include.target_place import Place, known_requests, load_into

if TYPE_CHECKING:
    from include.batch_api import BatchApi
    from include.loading import LoadReport
    from include.request_file import BuildResult
    from include.snapshot import Snapshot

log = logging.getLogger(__name__)

NORMAL = "normal"  #: rows that are loaded or have failed for good are left out
REDRIVE = "redrive"  #: only rows that are loaded are left out: the failed ones go again
FORCE = "force"  #: nothing is left out
MODES = (NORMAL, REDRIVE, FORCE)


def open_run(
    ledger: Ledger, spec: JobSpec, partition: Partition, *, mode: str, dag_id: str, dag_run_id: str
) -> Run:
    """Begin a run of this partition, or join the one that is open.

    Raises `ConfigurationError` for a redrive of a partition whose normal run is still open: its
    rows have not failed yet, and the redrive would send them beside it.
    """
    if mode not in MODES:
        raise ConfigurationError(f"Unknown mode {mode!r}; expected one of {', '.join(MODES)}.")
    if mode == REDRIVE:
        _check_finished(ledger, spec, partition)
    return ledger.open_run(
        partition,
        spec_digest=spec.digest,
        spec=spec.to_json(),
        mode=mode,
        dag_id=dag_id,
        dag_run_id=dag_run_id,
    )


def _check_finished(ledger: Ledger, spec: JobSpec, partition: Partition) -> None:
    last = ledger.last_run(partition, spec_digest=spec.digest, mode=NORMAL)
    if last is not None and last.state == RunState.OPEN:
        raise ConfigurationError(
            f"{last} is not finished, so there is nothing to redrive yet. Run the partition "
            "without redrive first: it goes on where it stopped, and pays for nothing again."
        )


def pinned(run: Run) -> JobSpec:
    """Return the spec that the run was opened with, whatever the job folder says by now."""
    return JobSpec.from_json(run.spec)


def extract(run: Run, ledger: Ledger, artifacts: Artifacts, source: Callable[[], Engine]) -> Run:
    """Write the snapshot of the partition's rows, unless the run has one."""
    if run.snapshot is not None and artifacts.exists(snapshot_of(run).path):
        log.info(
            "%s: the snapshot is there (%s rows); the source is not read again.", run, run.rows
        )
        return run
    from include.rows import extract_sql

    snapshot = extract_sql(
        source(),
        pinned(run),
        run.interval_start,
        run.interval_end,
        artifacts=artifacts,
        directory=f"{run.directory}/extract-{uuid4().hex[:12]}",
    )
    kept = ledger.keep_snapshot(
        run.run_id, snapshot.to_json(), snapshot.rows, instead_of=run.snapshot
    )
    log.info("%s: %s rows extracted.", kept, kept.rows)
    return kept


def build(
    run: Run,
    number: int,
    ledger: Ledger,
    artifacts: Artifacts,
    target: Callable[[], Place],
    *,
    most_shards: int,
    jobs_root: Path = JOBS_ROOT,
) -> list[Batch]:
    """Write the request files of round `number`; an empty list when nothing is open.

    A `request.py` is read again below `jobs_root`. Raises `BudgetExceededError` before round 1 is
    recorded when the estimate is over the budget, and `ConfigurationError` when there would be
    more shards than `most_shards`.
    """
    known = [one for one in ledger.rounds(run.run_id) if one.round == number]
    if known:
        log.info("%s: round %s is built already.", run, number)
        return ledger.batches(run.run_id, number)
    if number > 1 and not _has_open_rows(run, number - 1, ledger):
        return []
    spec = pinned(run)
    built = _built(run, number, spec, ledger, artifacts, target, jobs_root)
    if len(built.shards) > most_shards:
        raise ConfigurationError(
            f"{run}: {len(built.shards)} shards, but Airflow maps at most {most_shards} tasks. "
            "Nothing was submitted. Raise [core] max_map_length, raise limits.requests_per_batch, "
            "or schedule shorter intervals."
        )
    if number == 1:
        _count_first(run, spec, ledger, built)
    if not built.shards:
        return []
    return ledger.build_round(
        run.run_id, number, [_new_batch(run, number, spec, shard) for shard in built.shards]
    )


def _has_open_rows(run: Run, number: int, ledger: Ledger) -> bool:
    return any(one.round == number and one.retry > 0 for one in ledger.rounds(run.run_id))


def _built(
    run: Run,
    number: int,
    spec: JobSpec,
    ledger: Ledger,
    artifacts: Artifacts,
    target: Callable[[], Place],
    jobs_root: Path,
) -> BuildResult:
    from include.outcomes import open_rows
    from include.request_file import build_requests

    selection = None
    if number > 1:
        files = outcome_files(ledger.batches(run.run_id, number - 1))
        selection = open_rows(files, artifacts)
    return build_requests(
        spec,
        snapshot=snapshot_of(run),
        artifacts=artifacts,
        # Two runs may build at once; only the files that the ledger records are ever sent.
        directory=f"{run.directory}/round-{number}-{uuid4().hex[:12]}",
        round_number=number,
        selection=selection,
        known=_known(run, spec, target) if number == 1 else None,
        root=jobs_root,
    )


def snapshot_of(run: Run) -> Snapshot:
    """Return the snapshot that the run works on."""
    from include.snapshot import Snapshot

    if run.snapshot is None:
        raise ConfigurationError(f"{run} has no snapshot. Clear its extract task.")
    return Snapshot.from_json(run.snapshot)


def _known(
    run: Run, spec: JobSpec, target: Callable[[], Place]
) -> Callable[[list[str]], set[str]] | None:
    """Return the question which requests need not be sent again; None when all are sent."""
    if run.mode == FORCE:
        return None
    return known_requests(target(), run, spec, include_failures=run.mode != REDRIVE)


def _count_first(run: Run, spec: JobSpec, ledger: Ledger, built: BuildResult) -> None:
    estimate = cost.estimate(
        spec.request.model,
        input_tokens=sum(shard.input_tokens for shard in built.shards),
        requests=sum(shard.requests for shard in built.shards),
        params=spec.request.params,
    )
    ledger.count_run(
        run.run_id,
        reused=built.reused,
        rejected=built.rejected,
        rejected_file=built.rejected_file,
        estimate_usd=estimate,
    )
    requests = sum(shard.requests for shard in built.shards)
    log.info(
        "%s: %s requests in %s shards, %s rows reused, %s rejected; estimate %s.",
        run,
        requests,
        len(built.shards),
        built.reused,
        built.rejected,
        "unknown" if estimate is None else f"${estimate:.4f}",
    )
    cost.check_budget(estimate, spec.budget.max_usd, job=spec.name)


def _new_batch(run: Run, number: int, spec: JobSpec, shard: Any) -> NewBatch:
    return NewBatch(
        run_id=run.run_id,
        job=run.job,
        round=number,
        shard=shard.number,
        conn_id=spec.request.conn_id,
        endpoint=spec.request.endpoint,
        model=spec.request.model,
        request_file=shard.request_file,
        index_file=shard.index_file,
        content_digest=shard.digest,
        requests=shard.requests,
        bytes=shard.bytes,
        input_tokens=shard.input_tokens,
    )


def settle(run: Run, number: int, ledger: Ledger, api: BatchApi, policy: SubmissionPolicy) -> Round:
    """Add the round up, and look for batches that nobody should have made twice."""
    settled = ledger.settle_round(run.run_id, number)
    # Of all rounds so far: one of an earlier round may have been listed only since.
    find_duplicates(ledger.batches(run.run_id), ledger, api, policy)
    log.info(
        "%s: round %s settled: %s requests, %s succeeded, %s try again, %s failed.",
        run,
        number,
        settled.requests,
        settled.succeeded,
        settled.retry,
        settled.failed,
    )
    return settled


def find_duplicates(
    batches: list[Batch], ledger: Ledger, api: BatchApi, policy: SubmissionPolicy
) -> int:
    """Cancel and record batches that carry our ids but are not ours; return how many are new."""
    # One whose answer was lost has no batch to stand by yet: submitting it again adopts it.
    ours = {one.submission_id: one for one in batches if one.batch_id is not None}
    if not ours:
        return 0
    recorded = {one["batch_id"] for one in ledger.duplicates(list(ours))}
    first = min(one.first_intent_at for one in ours.values() if one.first_intent_at)
    found = 0
    for view in api.newest(first - timedelta(seconds=policy.skew)):
        if view.submission_id not in ours:
            continue
        kept = ledger.batch(view.submission_id)  # as it is now: it may have changed since
        if kept.batch_id in {None, view.batch_id}:
            continue
        is_known = view.batch_id in recorded
        # One that is recorded and still at work was not cancelled: somebody died in between.
        if not (is_known and view.is_final):
            drop_duplicate(ledger, api, kept, view)
        found += not is_known
    return found


def outcome_files(batches: list[Batch]) -> list[str]:
    """Return the outcome files of collected batches, in shard order."""
    return [one.outcomes_file for one in batches if one.outcomes_file is not None]


def load(run: Run, ledger: Ledger, artifacts: Artifacts, target: Callable[[], Place]) -> Run:
    """Put every row into the results or the failures, once, and close the run."""
    from include.loading import RoundFiles

    spec = pinned(run)
    rounds = ledger.rounds(run.run_id)
    batches = ledger.batches(run.run_id)
    unsettled = [one for one in rounds if one.state != "SETTLED"]
    if unsettled:
        raise ConfigurationError(
            f"{run}: round {unsettled[0].round} is not settled. Clear its settle task first."
        )
    files = [
        RoundFiles(
            round=one.round,
            outcome_files=tuple(outcome_files([b for b in batches if b.round == one.round])),
            batch_ids=tuple(str(b.batch_id) for b in batches if b.round == one.round),
        )
        for one in rounds
    ]
    report = load_into(target(), run, spec, files, artifacts)
    _check_complete(run, report)
    ledger.finish_run(run.run_id, loaded=report.loaded, failed=report.failed, **_money(batches))
    log.info(
        "%s: %s rows loaded into %s, %s failed into %s.",
        run,
        report.loaded,
        spec.target.results_place,
        report.failed,
        spec.target.failures_place,
    )
    return ledger.run(run.run_id)


def _check_complete(run: Run, report: LoadReport) -> None:
    """The first promise, checked on every run: no row may disappear."""
    ended = report.loaded + report.failed + run.reused
    if ended != run.rows:
        raise ConfigurationError(
            f"{run}: {run.rows} rows were extracted, but {report.loaded} loaded + {report.failed} "
            f"failed + {run.reused} reused = {ended}. The load was made; the run stays open. "
            "Compare the outcome files under its artifacts with the ledger."
        )


def _money(batches: list[Batch]) -> dict[str, Decimal | None]:
    return {
        name: _total(getattr(one, name) for one in batches) for name in ("cost_usd", "realtime_usd")
    }


def _total(amounts: Iterator[Decimal | None]) -> Decimal | None:
    """Return the sum, or None (unknown, never 0) when one of the amounts is unknown."""
    total = Decimal(0)
    for amount in amounts:
        if amount is None:
            return None
        total += amount
    return total

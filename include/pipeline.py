"""The steps of a run, one function each; an Airflow operator calls one of them.

    open_run ─► extract ─► round 1 [ build ─► submit ─► wait ─► collect ─► settle ] ─► … ─► load

Every step may be killed and called again at any line: it finds in the ledger what is done, and
does the rest. Later steps work with the spec that the run was opened with.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from include import ledger_database
from include import ledger_queries as queries
from include.artifacts import Artifacts
from include.budgets import check_priced, left_out_round, record_round
from include.cost import known_total
from include.duplicate_batches import find_duplicates
from include.errors import ConfigurationError
from include.estimates import Estimates
from include.figures import counted, money
from include.job_spec import JOBS_ROOT, JobSpec
from include.ledger import Ledger
from include.ledger_records import Batch, Partition, Round, Run, RunState
from include.provider import OPENAI, ProviderProfile
from include.rival_runs import check_alone
from include.round_files import outcome_files, round_files
from include.round_plan import check_mappable, first_counts, new_batch, size, within_limits
from include.run_mode import FORCE, MODES, NORMAL, REDRIVE
from include.source_place import SourcePlace, extract_from
from include.submission import SubmissionPolicy
from include.target_place import Place, check_target, known_requests, load_into

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection

    from include.batch_api import BatchApi
    from include.loading import LoadReport
    from include.request_file import BuildResult
    from include.snapshot import Snapshot

log = logging.getLogger(__name__)


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
    begun = ledger.last_run(partition, spec_digest=spec.digest, mode=REDRIVE)
    if begun is not None and begun.state == RunState.OPEN:
        return  # it goes on: the normal run that was opened since waits for it
    last = ledger.last_run(partition, spec_digest=spec.digest, mode=NORMAL)
    if last is not None and last.state != RunState.DONE:
        raise ConfigurationError(
            f"{last} is not finished, so there is nothing to redrive yet. Run the partition "
            "without redrive first: it goes on where it stopped, and pays for nothing again."
        )


def pinned(run: Run) -> JobSpec:
    """Return the spec that the run was opened with, whatever the job folder says by now."""
    return JobSpec.from_json(run.spec)


def extract(
    run: Run,
    ledger: Ledger,
    artifacts: Artifacts,
    source: Callable[[], SourcePlace],
    *,
    jobs_root: Path = JOBS_ROOT,
) -> Run:
    """Write the snapshot of the partition's rows, unless the run has one.

    A `rows.py` is read again below `jobs_root`. Raises `ConfigurationError` when the snapshot of
    which requests were made is lost, and the source has other rows by now.
    """
    if run.snapshot is not None and artifacts.exists(snapshot_of(run).path):
        log.info(
            "%s: the snapshot is there (%s); the source is not read again.",
            run,
            counted(run.rows, "row"),
        )
        return run
    snapshot = _extracted(run, artifacts, source, jobs_root)
    if run.snapshot is not None and ledger.rounds(run.run_id):
        _check_same_rows(run, snapshot, artifacts)
    kept = ledger.keep_snapshot(
        run.run_id, snapshot.to_json(), snapshot.rows, instead_of=run.snapshot
    )
    log.info("%s: %s extracted.", kept, counted(kept.rows, "row"))
    return kept


def _check_same_rows(run: Run, snapshot: Snapshot, artifacts: Artifacts) -> None:
    """Later rounds and outcomes name rows by their number: another snapshot has others there."""
    former = snapshot_of(run)
    # The file's name has the digest of its content.
    if snapshot.path.rpartition("/")[2] == former.path.rpartition("/")[2]:
        return
    raise ConfigurationError(
        f"{run}: its snapshot {artifacts.uri(former.path)} is missing, requests were made of it, "
        "and the source has other rows by now. Nothing was sent or loaded. Restore the file from "
        "the backup of the artifacts, then clear this task. Without a backup run the partition "
        "again with the param force=true, which pays for all of it again."
    )


def _extracted(
    run: Run, artifacts: Artifacts, source: Callable[[], SourcePlace], jobs_root: Path
) -> Snapshot:
    return extract_from(
        source,
        pinned(run),
        (run.interval_start, run.interval_end),
        artifacts=artifacts,
        directory=f"{run.directory}/extract-{uuid4().hex[:12]}",
        jobs_root=jobs_root,
        run_id=run.run_id,
    )


def build(
    run: Run,
    number: int,
    ledger: Ledger,
    artifacts: Artifacts,
    target: Callable[[], Place],
    *,
    most_shards: int,
    jobs_root: Path = JOBS_ROOT,
    profile: ProviderProfile = OPENAI,
) -> list[Batch]:
    """Write the request files of round `number`; an empty list when nothing is open.

    A `request.py` is read again below `jobs_root`. `profile` is that of the provider which the
    requests are for. Raises `BudgetExceededError` before round 1 is recorded when the estimate is
    over a budget (a later round is left out instead), and `ConfigurationError` when there would be
    more shards than `most_shards`. While another run of the partition asks the same, raises
    `PartitionBusyError`; `ConfigurationError` when nobody goes on with that one.
    """
    known = [one for one in ledger.rounds(run.run_id) if one.round == number]
    if known:
        log.info("%s: round %s is built already.", run, number)
        return ledger.batches(run.run_id, number)
    if number > 1 and not _has_open_rows(run, number - 1, ledger):
        log.info("%s: round %s is left out: no row is open. Next: load.", run, number)
        return []
    spec = within_limits(pinned(run), profile)
    profile.check_endpoint(spec.request.endpoint, spec.request.conn_id)
    check_priced(spec)
    if number == 1:
        with ledger_database.reading(ledger.engine) as connection:
            _check_alone(connection, run)  # before the work as well: it may have to wait for hours
    built = _built(run, number, spec, ledger, artifacts, target, jobs_root, profile)
    check_mappable(run, built, most_shards)
    estimates = Estimates(ledger, spec)
    counts = first_counts(run, built, estimates) if number == 1 else {}
    if counts and not ledger.count_first(run.run_id, **counts):
        log.info("%s: round 1 was built by another task meanwhile.", run)
        return ledger.batches(run.run_id, number)
    if not built.shards:
        _keep_left_out(run, number, built, artifacts)
        return []
    if number == 1:
        check_target(target(), run, spec, snapshot_of(run).path, artifacts)
    new = [new_batch(run, number, spec, shard, estimates) for shard in built.shards]
    if number > 1:
        requests = sum(shard.requests for shard in built.shards)
        log.info(
            "%s: round %s: %s, %s rejected.",
            run,
            number,
            size(requests, len(new)),
            built.rejected,
        )
    recorded = record_round(
        run, number, new, ledger, spec.budget, check=lambda held: _begin(held, run, counts)
    )
    if not recorded:
        _keep_left_out(run, number, built, artifacts)
    return recorded


def _begin(connection: Connection, run: Run, counts: Mapping[str, Any]) -> None:
    """Keep round 1 back while another run asks the same.

    Of two builds at once, the counts are those of the one that is recorded.
    """
    if counts:
        _check_alone(connection, run)
        queries.count(connection, run.run_id, counts)


def _check_alone(connection: Connection, run: Run) -> None:
    if run.mode != FORCE:  # which asks again on purpose
        check_alone(connection, run)


def _keep_left_out(run: Run, number: int, built: BuildResult, artifacts: Artifacts) -> None:
    """Keep why rows were rejected by a later round that has no batch; round 1 is in the run."""
    if number == 1:
        return
    from include import left_out

    left_out.keep(built.rejected_file, left_out.kept_path(run.directory, number), artifacts)
    if built.rejected:
        log.warning(
            "%s: round %s is not sent; %s rejected, and why is in the failures table.",
            run,
            number,
            counted(built.rejected, "row is", "rows are"),
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
    profile: ProviderProfile,
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
        url=profile.line_url(spec.request.endpoint),
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
    is_redrive = run.mode == REDRIVE
    return known_requests(target(), run.interval_start, spec, include_failures=not is_redrive)


def settle(run: Run, number: int, ledger: Ledger, api: BatchApi, policy: SubmissionPolicy) -> Round:
    """Add the round up, and look for batches that nobody should have made twice."""
    settled = ledger.settle_round(run.run_id, number)
    # Of all rounds so far: one of an earlier round may have been listed only since.
    batches = ledger.batches(run.run_id)
    find_duplicates(batches, ledger, api, policy)
    log.info(
        "%s: round %s settled: %s, %s succeeded, %s try again, %s failed; %s. Next: %s.",
        run,
        number,
        counted(settled.requests, "request"),
        settled.succeeded,
        settled.retry,
        settled.failed,
        f"cost {_dollars(batches)}",
        _next(run, settled),
    )
    return settled


def _dollars(batches: list[Batch]) -> str:
    return money(known_total(one.cost_usd for one in batches))


def _next(run: Run, settled: Round) -> str:
    if settled.retry and settled.round < pinned(run).retry.rounds:
        return f"{counted(settled.retry, 'row goes', 'rows go')} to round {settled.round + 1}"
    return "load"


def load(run: Run, ledger: Ledger, artifacts: Artifacts, target: Callable[[], Place]) -> Run:
    """Put every row into the results or the failures, once, and close the run."""
    if run.state == RunState.CLOSED:
        raise ConfigurationError(f"{run} is closed: nothing of it is loaded.")
    spec = pinned(run)
    rounds = ledger.rounds(run.run_id)
    batches = ledger.batches(run.run_id)
    unsettled = [one for one in rounds if one.state != "SETTLED"]
    if unsettled:
        raise ConfigurationError(
            f"{run}: round {unsettled[0].round} is not settled. Clear its settle task first."
        )
    files = round_files(
        run, rounds, batches, artifacts, over_budget=left_out_round(run.run_id, ledger)
    )
    report = load_into(target(), run, spec, files, artifacts)
    _check_complete(run, report)
    ledger.finish_run(run.run_id, loaded=report.loaded, failed=report.failed, **_money(batches))
    log.info(
        "%s: %s loaded into %s, %s failed into %s; cost %s.",
        run,
        counted(report.loaded, "row"),
        spec.target.results_place,
        report.failed,
        spec.target.failures_place,
        _dollars(batches),
    )
    return ledger.run(run.run_id)


def _check_complete(run: Run, report: LoadReport) -> None:
    """The first promise, checked on every run: no row may disappear."""
    ended = report.loaded + report.failed + run.reused
    if ended != run.rows:
        raise ConfigurationError(
            f"{run}: {counted(run.rows, 'row was', 'rows were')} extracted, but "
            f"{report.loaded} loaded + {report.failed} failed + {run.reused} reused = {ended}. "
            "The load was made; the run stays open. Compare the outcome files under its "
            "artifacts with the ledger."
        )


def _money(batches: list[Batch]) -> dict[str, Decimal | None]:
    return {
        name: known_total(getattr(one, name) for one in batches)
        for name in ("cost_usd", "realtime_usd")
    }

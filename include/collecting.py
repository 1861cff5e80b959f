"""Collect: both result files of an ended batch become one outcome for each of its requests."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from include.artifacts import Artifacts
from include.batch_view import BatchView, lost
from include.errors import ConfigurationError, NotThereError
from include.figures import counted
from include.job_spec import JobSpec
from include.ledger import Ledger
from include.ledger_records import Batch, BatchState

if TYPE_CHECKING:
    from include.batch_api import BatchApi
    from include.outcomes import CollectReport

log = logging.getLogger(__name__)


def collect(batch: Batch, ledger: Ledger, artifacts: Artifacts, api: BatchApi) -> Batch:
    """Download both files of an ended batch and write one outcome for each of its requests."""
    if batch.state == BatchState.COLLECTED:
        log.info("%s is collected already.", batch)
        return batch
    if batch.state != BatchState.ENDED:
        raise ConfigurationError(f"{batch} has not ended ({batch.state}). Clear its wait task.")
    try:
        view = api.retrieve(str(batch.batch_id))
    except NotThereError:
        view = lost(str(batch.batch_id))
    _collect(batch, view, ledger, artifacts, api)
    return ledger.batch(batch.submission_id)


def _collect(
    batch: Batch, view: BatchView, ledger: Ledger, artifacts: Artifacts, api: BatchApi
) -> None:
    from include.outcomes import collect_shard

    if batch.index_file is None:
        raise ConfigurationError(f"{batch} has no index file; it cannot be collected.")
    stem = batch.request_file.removesuffix(".jsonl")
    spec = JobSpec.from_json(ledger.run(batch.run_id).spec)
    report = collect_shard(
        spec,
        index_file=batch.index_file,
        output_file=_fetched(view.output_file_id, f"{stem}.output.jsonl", artifacts, api),
        error_file=_fetched(view.error_file_id, f"{stem}.error.jsonl", artifacts, api),
        artifacts=artifacts,
        outcomes_file=f"{stem}.outcomes.parquet",
        quarantine_file=f"{stem}.quarantine.parquet",
        batch_status=batch.api_status,
        bad_lines={
            one.line: (one.code or "invalid", "The API refused this line of the request file.")
            for one in view.problems
            if one.line is not None
        },
    )
    ledger.collected(
        batch,
        reasons=report.by_reason,
        output_file_id=view.output_file_id,
        error_file_id=view.error_file_id,
        **_columns(report),
    )
    if report.untold:
        log.warning(
            "%s: %s without usage: the server does not tell what they cost.",
            batch,
            counted(report.untold, "answer"),
        )
    log.info(
        "%s (%s): %s succeeded, %s try again, %s failed, %s missing, %s quarantined, cost %s.",
        batch,
        batch.api_status,
        report.succeeded,
        report.retry,
        report.failed,
        report.missing,
        counted(report.quarantined, "line"),
        "unknown" if report.cost_usd is None else f"${report.cost_usd}",
    )


def _columns(report: CollectReport) -> dict[str, Any]:
    """Return what the ledger keeps of a report."""
    return {
        "outcomes_file": report.outcomes_file,
        "succeeded": report.succeeded,
        "retry": report.retry,
        "failed": report.failed,
        "missing": report.missing,
        "quarantined": report.quarantined,
        "duplicates": report.duplicates,
        "used_input_tokens": report.usage.input,
        "used_cached_tokens": report.usage.cached,
        "used_output_tokens": report.usage.output,
        "used_reasoning_tokens": report.usage.reasoning,
        "cost_usd": report.cost_usd,
        "realtime_usd": report.realtime_usd,
    }


def _fetched(file_id: str | None, path: str, artifacts: Artifacts, api: BatchApi) -> str | None:
    """Keep a result file as an artifact; None when the API has none or has lost it."""
    if file_id is None:
        return None
    if artifacts.exists(path):
        return path
    with artifacts.scratch(".jsonl") as local:
        try:
            api.download(file_id, local)
        except NotThereError as error:
            log.warning("%s Its requests count as missing.", error)
            return None
        with artifacts.create(path) as stream, local.open("rb") as source:
            for chunk in iter(lambda: source.read(1 << 20), b""):
                stream.write(chunk)
    return path

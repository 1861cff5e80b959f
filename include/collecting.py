"""Collect: both result files of an ended batch become one outcome for each of its requests.

A batch or a file that the API does not know (404) is asked for again for some minutes, as in
`waiting`: its rows would be sent, and paid for, once more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from include.artifacts import Artifacts
from include.batch_status import BatchStatus
from include.batch_view import BatchView, lost
from include.errors import ConfigurationError, NotThereError
from include.figures import counted
from include.job_spec import JobSpec
from include.ledger import Ledger
from include.ledger_records import Batch, BatchState

if TYPE_CHECKING:
    from include.batch_api import BatchApi
    from include.outcomes import CollectReport

PATIENCE = timedelta(minutes=5)  #: with answers that there is no such batch or file
PAUSE = 15.0  # seconds between them

Found = TypeVar("Found")
Fetch = Callable[[str, Path], int]  # of a file by its id, into that path

log = logging.getLogger(__name__)


def collect(
    batch: Batch,
    ledger: Ledger,
    artifacts: Artifacts,
    api: BatchApi,
    *,
    patience: timedelta = PATIENCE,
) -> Batch:
    """Download both files of an ended batch and write one outcome for each of its requests.

    What the API does not know for as long as `patience` is lost: its requests are missing.
    """
    if batch.state == BatchState.COLLECTED:
        log.info("%s is collected already.", batch)
        return batch
    if batch.state != BatchState.ENDED:
        raise ConfigurationError(f"{batch} has not ended ({batch.state}). Clear its wait task.")
    view = _view(batch, api, patience)

    def fetch(file_id: str, path: Path) -> int:
        return _found(lambda: api.download(file_id, path), patience)

    _collect(batch, view, ledger, artifacts, fetch)
    return ledger.batch(batch.submission_id)


def _view(batch: Batch, api: BatchApi, patience: timedelta) -> BatchView:
    batch_id = str(batch.batch_id)
    if batch.api_status == BatchStatus.LOST:  # whoever waited for it has asked long enough
        patience = timedelta()
    try:
        return _found(lambda: api.retrieve(batch_id), patience)
    except NotThereError:
        return lost(batch_id)


def _found(ask: Callable[[], Found], patience: timedelta) -> Found:
    """Ask until there is an answer; raises `NotThereError` when there is none for so long."""
    until = time.monotonic() + patience.total_seconds()
    while True:
        try:
            return ask()
        except NotThereError as error:
            if time.monotonic() >= until:
                raise
            log.warning("%s Asked again for %s at most.", error, patience)
            time.sleep(PAUSE)


def _collect(
    batch: Batch, view: BatchView, ledger: Ledger, artifacts: Artifacts, fetch: Fetch
) -> None:
    from include.outcomes import collect_shard

    if batch.index_file is None:
        raise ConfigurationError(f"{batch} has no index file; it cannot be collected.")
    stem = batch.request_file.removesuffix(".jsonl")
    spec = JobSpec.from_json(ledger.run(batch.run_id).spec)
    report = collect_shard(
        spec,
        index_file=batch.index_file,
        output_file=_fetched(view.output_file_id, f"{stem}.output.jsonl", artifacts, fetch),
        error_file=_fetched(view.error_file_id, f"{stem}.error.jsonl", artifacts, fetch),
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


def _fetched(file_id: str | None, path: str, artifacts: Artifacts, fetch: Fetch) -> str | None:
    """Keep a result file as an artifact; None when the API has none or has lost it."""
    if file_id is None:
        return None
    if artifacts.exists(path):
        return path
    with artifacts.scratch(".jsonl") as local:
        try:
            fetch(file_id, local)
        except NotThereError as error:
            log.warning("%s Its requests count as missing.", error)
            return None
        with artifacts.create(path) as stream, local.open("rb") as source:
            for chunk in iter(lambda: source.read(1 << 20), b""):
                stream.write(chunk)
    return path

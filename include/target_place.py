"""Where a run's rows end: tables of a database, or the files of a Parquet dataset."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Engine

from include.artifacts import Artifacts

if TYPE_CHECKING:
    from include.job_spec import JobSpec
    from include.ledger_records import Run
    from include.loading import LoadReport, RoundFiles

Place = Engine | Artifacts  #: the database of a table, or the folder of a dataset


def known_requests(
    place: Place, run: Run, spec: JobSpec, *, include_failures: bool
) -> Callable[[list[str]], set[str]]:
    """Return the question which `custom_id`s are loaded, or have failed for good (if included)."""
    if isinstance(place, Artifacts):
        from include import parquet_target

        return parquet_target.known_requests(
            place, run.interval_start, include_failures=include_failures
        )
    from include.loading import known_custom_ids

    def ask(custom_ids: list[str]) -> set[str]:
        return known_custom_ids(place, spec, custom_ids, include_failures=include_failures)

    return ask


def load_into(
    place: Place, run: Run, spec: JobSpec, rounds: list[RoundFiles], artifacts: Artifacts
) -> LoadReport:
    """Put every row of the run into the results or the failures, once."""
    parts: dict[str, Any] = {
        "run_id": run.run_id,
        "interval_start": run.interval_start,
        "interval_end": run.interval_end,
        "rounds": rounds,
        "rejected_file": run.rejected_file,
        "artifacts": artifacts,
    }
    if isinstance(place, Artifacts):
        from include.parquet_target import load_dataset

        return load_dataset(place, spec, **parts)
    from include.loading import load_run

    return load_run(place, spec, **parts)

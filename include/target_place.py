"""Where a run's rows end: tables, the files of a Parquet dataset, or the request queue."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING

from sqlalchemy.engine import Engine

from include.artifacts import Artifacts

if TYPE_CHECKING:
    from include.job_spec import JobSpec
    from include.ledger_records import Run
    from include.loading import LoadReport, RoundFiles

Place = Engine | Artifacts  #: the database of a table, or the folder of a dataset


def known_requests(
    place: Place, interval_start: datetime, spec: JobSpec, *, include_failures: bool
) -> Callable[[list[str]], set[str]]:
    """Return the question which `custom_id`s are loaded, or have failed for good (if included)."""
    if spec.queue is not None:
        return lambda _custom_ids: set()  # a request is claimed by one run only
    if isinstance(place, Artifacts):
        from include import parquet_target

        return parquet_target.known_requests(
            place, interval_start, include_failures=include_failures
        )
    from include.loading import known_custom_ids

    def ask(custom_ids: list[str]) -> set[str]:
        return known_custom_ids(place, spec, custom_ids, include_failures=include_failures)

    return ask


def check_target(
    place: Place, run: Run, spec: JobSpec, snapshot: str, artifacts: Artifacts
) -> None:
    """Create the tables of a job, or check them, before anything is paid for.

    Raises `ConfigurationError` when the results could not be loaded.
    """
    if spec.queue is not None:
        return  # its table is the ledger's
    import pyarrow.parquet as pq

    with artifacts.open(snapshot) as stream:
        schema = pq.read_schema(stream)
    if isinstance(place, Artifacts):
        from include.parquet_target import check_dataset

        check_dataset(place, spec, schema, run.interval_start)
        return
    from include.loading import check_tables

    check_tables(place, spec, schema)


def load_into(
    place: Place, run: Run, spec: JobSpec, rounds: list[RoundFiles], artifacts: Artifacts
) -> LoadReport:
    """Put every row of the run into the results or the failures, once."""
    from include.loading import LoadedRun, RunFiles, load_run

    files = RunFiles(spec, tuple(rounds), run.rejected_file, artifacts)
    loaded = LoadedRun(run.run_id, run.interval_start, run.interval_end)
    if isinstance(place, Artifacts):
        from include.parquet_target import load_dataset

        return load_dataset(place, loaded, files)
    if spec.queue is not None:
        from include.queue_target import load_into_queue

        return load_into_queue(place, loaded, files)
    return load_run(place, loaded, files)

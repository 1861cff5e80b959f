"""Where a run's rows come from: a database, files, the job's own Python, or the request queue."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Engine

from include.artifacts import Artifacts
from include.job_spec import JobSpec
from include.object_storage import Remote

if TYPE_CHECKING:
    from include.snapshot import Snapshot

SourcePlace = Engine | Remote  #: the database of rows.sql, or what makes path objects of URIs


def extract_from(
    place: Callable[[], SourcePlace],
    spec: JobSpec,
    interval: tuple[datetime, datetime],
    *,
    artifacts: Artifacts,
    directory: str,
    jobs_root: Path,
    run_id: str = "",
) -> Snapshot:
    """Write the snapshot of an interval's rows, in whatever form the job's source is.

    `run_id` is that of a run over the request queue.
    """
    out: dict[str, Any] = {"artifacts": artifacts, "directory": directory}
    if spec.source.rows is not None:
        from include.generated_rows import extract_generated

        return extract_generated(jobs_root, spec, *interval, **out)
    found = place()
    if not isinstance(found, Engine):
        from include.file_rows import extract_files

        return extract_files(found, spec, *interval, **out)
    if spec.queue is not None:
        from include.queue_source import extract_queue

        return extract_queue(found, spec, run_id, interval[0], **out)
    from include.rows import extract_sql

    return extract_sql(found, spec, *interval, **out)

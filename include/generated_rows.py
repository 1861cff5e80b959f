"""Extract from Python: `rows(interval_start, interval_end)` of a file in the job folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from include.artifacts import Artifacts
from include.errors import ConfigurationError, LLMBatchError, TransientError
from include.extraction import extraction
from include.job_code import pinned_function
from include.job_spec import JobSpec
from include.snapshot import Snapshot
from include.source_records import Records

# Mistakes in the code: to run it again cannot help. All else may be a service that is away.
MISTAKES = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError,
            TypeError, ValueError, NotImplementedError)  # fmt: skip


def extract_generated(
    jobs_root: Path,
    spec: JobSpec,
    interval_start: datetime,
    interval_end: datetime,
    *,
    artifacts: Artifacts,
    directory: str,
) -> Snapshot:
    """Copy the rows that the job's own function yields into a snapshot.

    It gets the bounds of the interval as aware UTC times. What it yields that is no mapping with
    text as names is refused alone. Raises `ConfigurationError` when the file is not the pinned
    one or has a mistake, and `TransientError` for every other error that it raises.
    """
    if spec.source.rows is None:
        raise ValueError(f"job {spec.name} has no rows.py")
    rows = pinned_function(jobs_root / spec.name, spec.source.rows, "rows")
    with extraction(spec) as found, Records(found.folder) as records:
        with _errors_of(jobs_root / spec.name / spec.source.rows.file):
            for number, row in enumerate(rows(interval_start, interval_end), 1):
                if isinstance(row, Mapping) and all(isinstance(name, str) for name in row):
                    records.add(dict(row))
                else:
                    what = type(row).__name__
                    records.add_broken(
                        f"{spec.source.rows.file}, row {number}: is a {what}, expected a dict with "
                        "names as text"
                    )
        records.copy_to(found)
        return found.publish(artifacts, directory)


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Say where the job's code went wrong; not how, for the message may hold row text."""
    try:
        yield
    except LLMBatchError:
        raise
    except Exception as error:  # noqa: BLE001 (the job's own code may raise anything)
        where = f"{path}, line {_line(error, path)}, raised {type(error).__name__}"
        if isinstance(error, MISTAKES):
            raise ConfigurationError(f"{where}. Mend it and clear this task.") from None
        raise TransientError(f"{where}. It is run again.") from None


def _line(error: BaseException, path: Path) -> int | str:
    """Return the line of the file in which the error came up, the innermost one."""
    found: int | str = "unknown"
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            found = trace.tb_lineno
        trace = trace.tb_next
    return found

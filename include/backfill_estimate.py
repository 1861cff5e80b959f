"""What a backfill would send and cost, per interval, before anything is sent.

Rows go through the job's own extract and build, into a folder that is deleted after each interval:
what is counted here is what a run would send. The API is not asked, the ledger not written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

from include import cost
from include.artifacts import Artifacts
from include.errors import BudgetExceededError, ConfigurationError
from include.estimates import Estimates
from include.figures import dollars
from include.job_spec import JOBS_ROOT, JobSpec
from include.source_place import SourcePlace, extract_from
from include.target_place import Place, known_requests

if TYPE_CHECKING:
    from include.request_file import BuildResult

Interval = tuple[datetime, datetime]  #: aware UTC, start included, end excluded


@dataclass(frozen=True)
class IntervalEstimate:
    """One interval: rows of the source, and what of them would be sent.

    `input_tokens` is estimated from bytes. `cost_usd` is what the first round is expected to cost,
    `upper_usd` what it may; None when the model has no known price. `reused` rows are loaded or
    have failed for good, `rejected` ones cannot become a request.
    """

    start: datetime
    end: datetime
    rows: int
    requests: int
    reused: int
    rejected: int
    batches: int
    input_tokens: int
    cost_usd: Decimal | None
    upper_usd: Decimal | None


def estimate_intervals(
    spec: JobSpec,
    intervals: Iterable[Interval],
    source: SourcePlace,
    target: Place,
    estimates: Estimates,
    *,
    include_failures: bool = True,
    root: Path = JOBS_ROOT,
) -> Iterator[IntervalEstimate]:
    """Yield the estimate of each interval in turn; memory and disk are those of one interval.

    With `include_failures=False`, rows of the failures table count as open: a redrive.
    Raises what extract and build raise: `ConfigurationError`, `TransientError`.
    """
    for start, end in intervals:
        known = known_requests(target, start, spec, include_failures=include_failures)
        rows, built = _built(spec, (start, end), source, known, root)
        yield _of_build((start, end), rows, built, estimates.of(*built.shards))


def _built(
    spec: JobSpec,
    interval: Interval,
    source: SourcePlace,
    known: Callable[[list[str]], set[str]],
    root: Path,
) -> tuple[int, BuildResult]:
    """Return the rows of an interval, and what the build makes of them; its files are deleted."""
    from include.request_file import build_requests

    with tempfile.TemporaryDirectory(prefix="llm-batch-") as folder:
        artifacts = Artifacts(Path(folder))
        snapshot = extract_from(
            lambda: source,
            spec,
            interval,
            artifacts=artifacts,
            directory="extract",
            jobs_root=root,
        )
        built = build_requests(
            spec,
            snapshot=snapshot,
            artifacts=artifacts,
            directory="build",
            known=known,
            root=root,
        )
    return snapshot.rows, built


def _of_build(
    interval: Interval, rows: int, built: BuildResult, price: cost.Estimate | None
) -> IntervalEstimate:
    return IntervalEstimate(
        *interval,
        rows=rows,
        requests=sum(shard.requests for shard in built.shards),
        reused=built.reused,
        rejected=built.rejected,
        batches=len(built.shards),
        input_tokens=sum(shard.input_tokens for shard in built.shards),
        cost_usd=None if price is None else price.expected,
        upper_usd=None if price is None else price.upper,
    )


def check_limit(estimates: Sequence[IntervalEstimate], max_usd: Decimal) -> None:
    """Raise `BudgetExceededError` when all intervals together would cost more than `max_usd`.

    A limit cannot be kept without a price: then it raises `ConfigurationError`.
    """
    total = cost.known_total(one.cost_usd for one in estimates)
    if total is None:
        raise ConfigurationError(
            f"The backfill has a budget of ${max_usd}, but the price of its model is unknown. Add "
            f"the model to a price file and name that in {cost.OVERRIDE_VARIABLE}."
        )
    if total > max_usd:
        raise BudgetExceededError(
            f"The backfill would cost about {dollars(total)}, over its budget of ${max_usd}. "
            "Nothing was started. Raise the budget, or take fewer days, a sample or another model."
        )

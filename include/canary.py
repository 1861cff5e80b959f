"""The canary: a run's first, small batch, judged before the rest is submitted.

It is the first request file of round 1, cut shorter than the others. So its answers count as
answers, its rows are never sent again, and all that holds for batches holds for it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from include import budgets
from include.classification import NEVER_RAN, Reason
from include.errors import CanaryError
from include.figures import counted
from include.job_spec import JobSpec
from include.ledger import Ledger
from include.ledger_records import Batch, BatchState, Run
from include.run_policy import Canary

log = logging.getLogger(__name__)

WORTH_IT = 2  # a round is judged by its canary when it has more than so many times its requests
# What passes by itself and says nothing about the prompt, the schema or the price: all that kept a
# request from running, but for what the API has against it.
PASSING = NEVER_RAN - {Reason.BATCH_FAILED, Reason.INVALID_REQUEST}


@dataclass(frozen=True)
class CanaryFigures:
    """What the canary came to. `judged` requests are those that tell something of the job."""

    requests: int
    judged: int
    failed: int
    reasons: dict[str, int]
    cost_usd: Decimal | None

    @property
    def failure_rate(self) -> Decimal:
        """The failed requests as a share of the judged ones."""
        return Decimal(self.failed) / self.judged if self.judged else Decimal(0)

    @property
    def cost_per_row(self) -> Decimal | None:
        """US dollars for each judged request; None without a price."""
        if self.cost_usd is None or not self.judged:
            return None
        return self.cost_usd / self.judged

    def __str__(self) -> str:
        cost = "unknown" if self.cost_per_row is None else f"${self.cost_per_row:.6f}"
        reasons = ", ".join(f"{name} {n}" for name, n in self.reasons.items())
        return (
            f"{self.failed:,} of {counted(self.judged, 'answer')} failed ({self.failure_rate:.1%}"
            f"{f': {reasons}' if reasons else ''}), {cost} a row"
        )


def canary_of(batches: Sequence[Batch], canary: Canary) -> Batch | None:
    """Return the batch of a first round that is its canary; None when the round is too small.

    Nor has one that is a single file, built before the job had a canary: nothing would be left.
    """
    if canary.requests is None or len(batches) == 1:
        return None
    requests = sum(one.requests for one in batches)
    return batches[0] if requests > WORTH_IT * canary.requests else None


def after_canary(batches: Sequence[Batch], canary: Canary) -> list[Batch]:
    """Return the batches that are submitted when the canary has been judged."""
    first = canary_of(batches, canary)
    return [one for one in batches if first is None or one.shard != first.shard]


def judge(run: Run, ledger: Ledger) -> CanaryFigures:
    """Return the figures of the canary of a run.

    Raises `CanaryError` when more of it failed, or a row costs more, than the job allows. When it
    passes after it had said no, `BudgetExceededError` is raised if others have spent the money.
    """
    spec = JobSpec.from_json(run.spec)
    canary, batch = spec.canary, canary_of(ledger.batches(run.run_id, 1), spec.canary)
    if batch is None or batch.state != BatchState.COLLECTED:
        raise CanaryError(f"{run}: there is no collected canary. Clear the run from extract on.")
    figures = figures_of(batch)
    problems = [*_too_many(figures, canary), *_too_dear(figures, canary)]
    if problems:
        budgets.stop(run, ledger)
        raise CanaryError(
            f"{run}: the canary says no: {figures}; {' and '.join(problems)}. The other requests "
            f"were not sent. Its outcomes are in {batch.outcomes_file}. {_way_out(run, spec)}, or "
            "allow more in job.yaml and clear this run from extract on: the canary is not sent "
            "again."
        )
    budgets.resume(run, ledger, spec.budget)
    if not figures.judged:
        log.warning("%s: none of the canary's requests was answered; nothing to judge.", run)
    log.info("%s: the canary passes: %s.", run, figures)
    return figures


def _way_out(run: Run, spec: JobSpec) -> str:
    if spec.queue is not None:
        return (
            "Mend what is asked and say `python -m llm_batch close "
            f"{run.run_id}`: the requests that were not sent are queued again"
        )
    return (
        "Mend prompt, schema or params and run the partition again (a changed request is a run of "
        "its own)"
    )


def figures_of(batch: Batch) -> CanaryFigures:
    """Return the figures of a collected batch."""
    reasons: dict[str, int] = json.loads(batch.reasons or "{}")
    failed = {name: count for name, count in reasons.items() if name not in PASSING}
    failures = sum(failed.values())
    return CanaryFigures(
        requests=batch.requests,
        judged=batch.succeeded + failures,
        failed=failures,
        reasons=failed,
        cost_usd=batch.cost_usd,
    )


def _too_many(figures: CanaryFigures, canary: Canary) -> list[str]:
    if figures.failure_rate <= canary.max_failure_rate:
        return []
    return [f"canary.max_failure_rate allows {canary.max_failure_rate:.1%}"]


def _too_dear(figures: CanaryFigures, canary: Canary) -> list[str]:
    bound, cost = canary.max_cost_per_row, figures.cost_per_row
    if bound is None or cost is None or cost <= bound:
        return []
    return [f"canary.max_cost_per_row allows ${bound}"]

"""What request files will cost, by what earlier batches of the job have really used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from include import ledger_tables as tables
from include.classification import NEVER_RAN
from include.cost import Calibration, Estimate, LearnedUsage, Usage, estimate
from include.ledger import Ledger
from include.ledger_database import reading
from include.ledger_records import BatchState

if TYPE_CHECKING:
    from include.job_spec import JobSpec
    from include.shard_file import Shard

LATEST = 20  # batches that are looked at


class Estimates:
    """Estimates the request files of one job."""

    def __init__(self, ledger: Ledger, spec: JobSpec) -> None:
        self._request = spec.request
        self._learned = learned_usage(ledger, spec.name, spec.request.model)

    def of(self, *shards: Shard) -> Estimate | None:
        """Return what these request files will cost together; None without a price."""
        return estimate(
            self._request.priced_model,
            input_tokens=sum(shard.input_tokens for shard in shards),
            requests=sum(shard.requests for shard in shards),
            params=self._request.params,
            learned=self._learned,
        )


def learned_usage(ledger: Ledger, job: str, model: str) -> LearnedUsage | None:
    """Return what the job's newest batches with this model tell, None when there are none.

    Only whole batches of a first round count: later rounds hold the odd requests. Of a batch that
    expired, or some of whose requests were refused, the requests that ran count.
    """
    columns = tables.batch.c
    query = (
        sa.select(
            columns.used_input_tokens,
            columns.used_cached_tokens,
            columns.used_output_tokens,
            columns.requests,
            columns.input_tokens,
            columns.reasons,
        )
        .where(
            columns.job == job,
            columns.model == model,
            columns.round == 1,
            columns.state == BatchState.COLLECTED,
            columns.missing == 0,
        )
        .order_by(columns.collected_at.desc())
        .limit(LATEST)
    )
    with reading(ledger.engine) as connection:
        batches = [_that_ran(*row) for row in connection.execute(query)]
    found = [(used, one) for used in batches if (one := _calibration(used)) is not None]
    if not found:
        return None
    together = _calibration([sum(part) for part in zip(*(used for used, _ in found), strict=True)])
    return None if together is None else LearnedUsage(together, tuple(one for _, one in found))


def _that_ran(*row: Any) -> tuple[int, ...]:
    """Return tokens, requests and estimated input of the requests of a batch that were billed."""
    *tokens, requests, estimated, reasons = row
    counts: dict[str, int] = json.loads(reasons or "{}")
    ran = requests - sum(number for name, number in counts.items() if name in NEVER_RAN)
    return (*tokens, ran, round(estimated * ran / requests) if requests else 0)


def _calibration(used: Sequence[int]) -> Calibration | None:
    *tokens, requests, estimated = used
    return Calibration.of(Usage(*tokens), requests=requests, estimated_input=estimated)

"""What a round is going to send, as the ledger keeps it: counts, estimate, a batch per shard."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from include.errors import ConfigurationError
from include.estimates import Estimates
from include.figures import counted
from include.job_spec import JobSpec
from include.ledger_records import NewBatch, Run
from include.provider import ProviderProfile

if TYPE_CHECKING:
    from include.request_file import BuildResult
    from include.shard_file import Shard

log = logging.getLogger(__name__)


def within_limits(spec: JobSpec, profile: ProviderProfile) -> JobSpec:
    """Return the spec with batches that are as small as the provider wants them."""
    limits = {
        name: min(getattr(spec.limits, name), getattr(profile, name))
        for name in ("requests_per_batch", "bytes_per_batch")
    }
    return spec.model_copy(update={"limits": spec.limits.model_copy(update=limits)})


def check_mappable(run: Run, built: BuildResult, most_shards: int) -> None:
    """Raise `ConfigurationError` when Airflow cannot map a task to each shard."""
    if len(built.shards) > most_shards:
        raise ConfigurationError(
            f"{run}: {counted(len(built.shards), 'shard')}, but Airflow maps at most "
            f"{counted(most_shards, 'task')}. Nothing was submitted. Raise [core] max_map_length, "
            "raise limits.requests_per_batch, or schedule shorter intervals."
        )


def first_counts(run: Run, built: BuildResult, estimates: Estimates) -> dict[str, Any]:
    """Return what the ledger keeps of a build of round 1, and log it."""
    estimate = estimates.of(*built.shards)
    requests = sum(shard.requests for shard in built.shards)
    log.info(
        "%s: round 1: %s, %s reused, %s share an answer, %s rejected; "
        "estimate %s. Next: each shard is submitted.",
        run,
        size(requests, len(built.shards)),
        counted(built.reused, "row"),
        built.shared,
        built.rejected,
        estimate or "unknown",
    )
    return {
        "reused": built.reused,
        "rejected": built.rejected,
        "rejected_file": built.rejected_file,
        "shared": built.shared,
        "estimate_usd": estimate.expected if estimate else None,
        "estimate_low_usd": estimate.low if estimate else None,
        "estimate_upper_usd": estimate.upper if estimate else None,
    }


def size(requests: int, shards: int) -> str:
    """Return `500 requests in 3 shards`."""
    return f"{counted(requests, 'request')} in {counted(shards, 'shard')}"


def new_batch(run: Run, number: int, spec: JobSpec, shard: Shard, estimates: Estimates) -> NewBatch:
    """Return one request file of the round as the batch that it will be."""
    estimate = estimates.of(shard)
    return NewBatch(
        run_id=run.run_id,
        job=run.job,
        round=number,
        shard=shard.number,
        conn_id=spec.request.conn_id,
        endpoint=spec.request.endpoint,
        model=spec.request.model,
        request_file=shard.request_file,
        index_file=shard.index_file,
        content_digest=shard.digest,
        requests=shard.requests,
        bytes=shard.bytes,
        input_tokens=shard.input_tokens,
        estimate_usd=estimate.expected if estimate else None,
    )

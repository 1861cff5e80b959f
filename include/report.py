"""What a run came to: rows, rounds, batches, tokens, money, and why rows failed."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any

from include.cost import known_total
from include.errors import FailureRateError
from include.figures import counted, money
from include.job_spec import JobSpec
from include.ledger import Ledger
from include.ledger_records import Batch, BatchState, Run, RunState


@dataclass(frozen=True)
class RunReport:
    """The figures of one run. Money is US dollars; None means that a price is unknown."""

    job: str
    run_id: str
    interval_start: datetime
    interval_end: datetime
    model: str
    rows: int
    loaded: int
    failed: int
    reused: int
    rejected: int
    shared: int
    rounds: int
    batches: int
    requests: int
    quarantined: int
    duplicates: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int
    estimate_usd: Decimal | None
    cost_usd: Decimal | None
    realtime_usd: Decimal | None
    reasons: dict[str, int] = field(default_factory=dict)

    @property
    def failure_rate(self) -> Decimal:
        """Failed rows as a share of the rows that this run had to answer for."""
        asked = self.loaded + self.failed
        return Decimal(self.failed) / asked if asked else Decimal(0)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain JSON values, money as decimal text."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    def metrics(self) -> dict[str, float]:
        """Return the figures that are worth a gauge."""
        names = ("rows", "loaded", "failed", "reused", "requests", "rounds", "batches")
        gauges = {name: float(getattr(self, name)) for name in names}
        if self.cost_usd is not None:
            gauges["cost_usd"] = float(self.cost_usd)
        return gauges

    def text(self) -> str:
        """Return the figures as the lines that somebody reads at night."""
        reasons = ", ".join(f"{name} {n}" for name, n in self.reasons.items()) or "none"
        start, end = (f"{at:%Y-%m-%d %H:%M}" for at in (self.interval_start, self.interval_end))
        return f"""\
Job {self.job}, partition {start} to {end} UTC, run {self.run_id}, model {self.model}
rows {self.rows}: {self.loaded} loaded, {self.failed} failed ({self.rejected} of them never sent), \
{self.reused} reused, {self.shared} shared the answer of an identical request
{counted(self.requests, "request")} in {counted(self.batches, "batch")}, \
{counted(self.rounds, "round")}; problems: {reasons}
{counted(self.quarantined, "line")} quarantined, \
{counted(self.duplicates, "duplicate batch")}
tokens: {self.input_tokens} in ({self.cached_tokens} cached), \
{self.output_tokens} out ({self.reasoning_tokens} reasoning)
cost {money(self.cost_usd)}, estimate {money(self.estimate_usd)}, \
real-time would have cost {money(self.realtime_usd)}"""


def run_report(run: Run, ledger: Ledger) -> RunReport:
    """Add up what the ledger knows of a run."""
    batches = ledger.batches(run.run_id)
    reasons: Counter[str] = Counter()
    for one in batches:
        reasons.update(json.loads(one.reasons or "{}"))

    def total(name: str) -> int:
        return sum(getattr(one, name) for one in batches)

    return RunReport(
        job=run.job,
        run_id=run.run_id,
        interval_start=run.interval_start,
        interval_end=run.interval_end,
        model=JobSpec.from_json(run.spec).request.model,
        rows=run.rows,
        loaded=run.loaded,
        failed=run.failed,
        reused=run.reused,
        rejected=run.rejected,
        shared=run.shared,
        rounds=len(ledger.rounds(run.run_id)),
        batches=len(batches),
        requests=total("requests"),
        quarantined=total("quarantined"),
        duplicates=_duplicates(batches, ledger),
        input_tokens=total("used_input_tokens"),
        cached_tokens=total("used_cached_tokens"),
        output_tokens=total("used_output_tokens"),
        reasoning_tokens=total("used_reasoning_tokens"),
        estimate_usd=run.estimate_usd,
        cost_usd=_money_so_far(run, batches, "cost_usd"),
        realtime_usd=_money_so_far(run, batches, "realtime_usd"),
        reasons=dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
    )


def _money_so_far(run: Run, batches: list[Batch], name: str) -> Decimal | None:
    """Return a run's sum; of an open one that of its collected batches, None without any."""
    if run.state != RunState.OPEN:
        amount: Decimal | None = getattr(run, name)
        return amount
    amounts = [getattr(one, name) for one in batches if one.state == BatchState.COLLECTED]
    return known_total(amounts) if amounts else None


def _duplicates(batches: list[Batch], ledger: Ledger) -> int:
    """Count second batches; one that was refused for the token limit has no batch to stand by."""
    found = ledger.duplicates([one.submission_id for one in batches])
    return sum(bool(one["kept_batch_id"]) for one in found)


def check_failure_rate(run: Run, report: RunReport) -> None:
    """Raise `FailureRateError` when more rows failed than the job's alert allows."""
    spec = JobSpec.from_json(run.spec)
    if not has_too_many_failures(spec, report):
        return
    raise FailureRateError(
        f"{run}: {report.failed:,} of {counted(report.loaded + report.failed, 'row')} failed "
        f"({report.failure_rate:.1%}; alert.failure_rate allows {spec.alert.failure_rate:.1%}). "
        f"Everything good is loaded. Look at the failures table, mend the cause, then run the "
        f"partition again with the param redrive=true."
    )


def has_too_many_failures(spec: JobSpec, report: RunReport) -> bool:
    """Tell whether more rows failed than the job's alert allows."""
    return spec.alert.is_exceeded(report.failed, report.loaded)


def _plain(value: Any) -> Any:
    if isinstance(value, Decimal):
        return format(value, "f")
    return value.isoformat() if isinstance(value, datetime) else value

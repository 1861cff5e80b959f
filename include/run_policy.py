"""How a run behaves: what bounds it, how often it tries, when it stops or somebody is told.

Nothing here shapes a request: a job may change it while a run is open, and the run goes on with it.
DAG files import this module: it needs pydantic and the standard library only.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Self

from pydantic import Field, model_validator

from include.endpoints import MAX_BYTES, MAX_REQUESTS
from include.spec_values import Number, SpecModel, WholeNumber

MAX_ROUNDS = 10


class Limits(SpecModel):
    """The size of one batch. The upper bounds are the API's own (API reference, Create batch)."""

    requests_per_batch: Annotated[WholeNumber, Field(le=MAX_REQUESTS)] = MAX_REQUESTS
    bytes_per_batch: Annotated[WholeNumber, Field(le=MAX_BYTES)] = MAX_BYTES
    enqueued_tokens: WholeNumber | None = None


class Retry(SpecModel):
    """How many passes the rows that may be tried again get, the first one included."""

    rounds: Annotated[WholeNumber, Field(le=MAX_ROUNDS)] = 3


class Budget(SpecModel):
    """Bounds in US dollars, None for no bound: a run, the job in a calendar month (UTC).

    A run whose estimate is above `approve_above_usd` waits for a person.
    """

    max_usd: Annotated[Number, Field(ge=0)] | None = None
    max_usd_per_month: Annotated[Number, Field(ge=0)] | None = None
    approve_above_usd: Annotated[Number, Field(ge=0)] | None = None


class Reuse(SpecModel):
    """Which requests are saved. `identical`: rows with the same request body share one answer."""

    identical: bool = False


class Canary(SpecModel):
    """A small first batch that is judged before the rest of a run is submitted; None: no canary.

    `max_failure_rate` is a share of its answers (0 to 1), `max_cost_per_row` US dollars.
    """

    requests: Annotated[WholeNumber, Field(le=MAX_REQUESTS)] | None = None
    max_failure_rate: Annotated[Number, Field(ge=0, le=1)] = Decimal("0.1")
    max_cost_per_row: Annotated[Number, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _has_requests(self) -> Self:
        if self.requests is None and self.max_cost_per_row is not None:
            raise ValueError("needs requests: how many rows to try first, such as 50")
        return self


class Alert(SpecModel):
    """When somebody is told, as shares from 0 to 1.

    Above `failure_rate` of failed rows a run fails after it has loaded the rest. On small days one
    row is a large share: fewer than `min_failed` rows never fail the run. A batch is late after
    `late_share` of its deadline; a run or a month is near its budget at `budget_share` of it. None
    is never.
    """

    failure_rate: Annotated[Number, Field(ge=0, le=1)] | None = None
    min_failed: WholeNumber = 1
    late_share: Annotated[Number, Field(gt=0, le=1)] | None = Decimal("0.75")
    budget_share: Annotated[Number, Field(gt=0, le=1)] | None = Decimal("0.8")

    def is_exceeded(self, failed: int, loaded: int) -> bool:
        """Tell whether more rows failed than `failure_rate` allows of those that were asked for."""
        if self.failure_rate is None or failed < self.min_failed:
            return False
        return Decimal(failed) > self.failure_rate * (failed + loaded)

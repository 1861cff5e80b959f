"""Estimates learn from the ledger: from whole first-round batches of the same job and model."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest
import sqlalchemy as sa

from include.estimates import learned_usage
from include.ledger import Ledger
from tests.unit.test_budgets import MODEL, collect, planned, run

USED = {"used_input_tokens": 2_000, "used_cached_tokens": 500, "used_output_tokens": 300}


@pytest.fixture
def ledger(empty_database: sa.Engine) -> Ledger:
    return Ledger(empty_database)


def collected(ledger: Ledger, day: int, number: int = 1, **values: object) -> None:
    ours = run(ledger, day)
    (*_, batch) = ledger.build_round(ours.run_id, number, [planned(ours, "1", number=number)])
    collect(ledger, batch, **(USED | values))


def test_batches_teach_by_token_and_by_request(ledger: Ledger) -> None:
    """Two batches of 1,000 estimated tokens and 100 requests each, together and by themselves."""
    collected(ledger, 0)
    collected(ledger, 1, used_output_tokens=500)

    learned = learned_usage(ledger, "job", MODEL)

    assert learned is not None
    assert learned.together.input_ratio == 2
    assert learned.together.output_tokens == 4
    assert learned.together.cached_share == Decimal("0.25")
    assert sorted(one.output_tokens for one in learned.each) == [3, 5]


def test_what_is_not_typical_teaches_nothing(ledger: Ledger) -> None:
    """A later round, a batch that is not whole, another job, another model."""
    collected(ledger, 0, missing=7)
    collected(ledger, 1, model="another")
    collected(ledger, 2, job="another")
    collected(ledger, 3, used_input_tokens=0)
    ours = run(ledger, 4)
    (later,) = ledger.build_round(ours.run_id, 2, [planned(ours, "1", number=2)])
    collect(ledger, later, **USED)

    assert learned_usage(ledger, "job", MODEL) is None


@pytest.mark.parametrize("reason", ["batch_expired", "rate_limited", "invalid_request"])
def test_requests_that_never_ran_teach_nothing(ledger: Ledger, reason: str) -> None:
    """Of 100 requests 75 never ran: the other 25 used what 25 requests use, not 100."""
    used = {name: tokens // 4 for name, tokens in USED.items()}
    collected(ledger, 0)
    collected(ledger, 1, **used, reasons=json.dumps({reason: 75}))
    collected(ledger, 2, **dict.fromkeys(USED, 0), reasons=json.dumps({reason: 100}))

    learned = learned_usage(ledger, "job", MODEL)

    assert learned is not None
    assert learned.each == (learned.together, learned.together)
    assert (learned.together.input_ratio, learned.together.output_tokens) == (2, 3)


def test_answers_that_could_not_be_used_teach_as_well(ledger: Ledger) -> None:
    """An answer that was cut off is billed: nothing is left out of the count."""
    collected(ledger, 0, reasons=json.dumps({"cut_off": 40, "refusal": 20}))

    learned = learned_usage(ledger, "job", MODEL)

    assert learned is not None
    assert learned.together.output_tokens == 3

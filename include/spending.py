"""What a job has spent, and what is on its way to be spent: the other side of a budget.

Read inside the transaction that records a round, under the ledger's lock, so that two runs at once
cannot both take the last of a budget.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from include import cost
from include import ledger_tables as tables
from include.calendar_month import Month
from include.errors import ConfigurationError
from include.ledger_records import BatchState, Run, RunState
from include.ledger_sums import money_sum

STOPPED = "STOPPED"  #: in the history of a run that its canary has stopped
PASSED = "PASSED"  #: and when it has passed after all
USED = ("used_input_tokens", "used_cached_tokens", "used_output_tokens", "used_reasoning_tokens")
AT_WORK = (BatchState.SUBMITTING, BatchState.SUBMITTED, BatchState.ENDED)


@dataclass(frozen=True)
class Spending:
    """US dollars: `spent` by collected batches, `in_flight` for batches that are not collected."""

    spent: Decimal
    in_flight: Decimal

    @property
    def total(self) -> Decimal:
        """Both together."""
        return self.spent + self.in_flight


def of_run(connection: Connection, run: Run) -> Spending:
    """Return what the batches of all recorded rounds of a run cost, or are estimated to cost."""
    ours = tables.batch.c.run_id == run.run_id
    done = tables.batch.c.state == BatchState.COLLECTED
    return Spending(
        _spent(connection, sa.and_(ours, done)), _planned(connection, sa.and_(ours, sa.not_(done)))
    )


def of_limit(connection: Connection, name: str) -> Spending:
    """Return what the runs under a spend limit have cost since each joined, and have on its way.

    On its way is everything that may be sent: not what is left of a run that is closed, that a
    person has rejected, or that its canary has stopped.
    """
    columns, limited = tables.batch.c, tables.limited_run.c
    joined = sa.select(limited.joined_at).where(
        limited.name == name, limited.run_id == columns.run_id
    )
    is_ours = sa.and_(
        # By the runs' ids: every other batch that there ever was is passed over by an index.
        columns.run_id.in_(sa.select(limited.run_id).where(limited.name == name)),
        sa.or_(columns.collected_at.is_(None), columns.collected_at >= joined.scalar_subquery()),
    )
    # Not the bare column: its index would lead to nearly all batches, for they are collected.
    done = sa.func.coalesce(columns.state, "") == BatchState.COLLECTED
    is_refused = sa.and_(columns.state == BatchState.PREPARED, _is_rejected())
    is_held_back = sa.or_(is_refused, _is_held_back())
    return Spending(
        _spent(connection, sa.and_(is_ours, done)),
        _planned(connection, sa.and_(is_ours, sa.not_(done), sa.not_(is_held_back))),
    )


def of_month(connection: Connection, job: str, month: Month, *, but_for: str = "") -> Spending:
    """Return what a job's batches cost that were collected in `month`, and what is on its way.

    Nothing is on its way `but_for` a run, by its id: somebody asks what is left for it.

    On its way is every batch that may be at the API, and every request file that was built this
    month and not sent yet, unless a newer run of its partition has taken its place, a person has
    rejected or closed its run, or its canary has stopped it.
    Raises `ConfigurationError` when a batch has used tokens of a model without a price.
    """
    columns = tables.batch.c
    collected = sa.and_(
        columns.job == job,
        columns.state == BatchState.COLLECTED,
        columns.collected_at >= month.start,
        columns.collected_at < month.end,
    )
    waits = sa.and_(
        columns.state == BatchState.PREPARED,
        _is_awaited(month.start),
        sa.not_(_is_held_back()),
    )
    on_its_way = sa.and_(
        columns.job == job,
        columns.collected_at.is_(None),  # true of all of them: an index passes over the others
        columns.run_id != but_for,
        sa.or_(columns.state.in_(AT_WORK), waits),
    )
    return Spending(_spent(connection, collected), _planned(connection, on_its_way))


def _is_awaited(since: datetime) -> sa.ColumnElement[bool]:
    """Tell of a prepared batch whether it is recent, and its run the newest of its partition."""
    newer = tables.run.alias("newer")
    own, batch, round_ = tables.run.c, tables.batch.c, tables.round_.c
    is_replaced = sa.exists().where(
        own.run_id == batch.run_id,
        newer.c.job == own.job,
        newer.c.interval_start == own.interval_start,
        newer.c.interval_end == own.interval_end,
        newer.c.created_at > own.created_at,
    )
    is_recent = sa.exists().where(
        round_.run_id == batch.run_id, round_.round == batch.round, round_.built_at >= since
    )
    return sa.and_(is_recent, sa.not_(is_replaced), sa.not_(_is_rejected()))


def _is_rejected() -> sa.ColumnElement[bool]:
    """Tell of a batch whether a person has said no to its run, and nobody has said yes."""
    return sa.and_(_was("REJECTED"), sa.not_(_was("APPROVED")))


def _is_held_back() -> sa.ColumnElement[bool]:
    """Tell of a batch whether it is not sent, and its run can send nothing as it stands.

    A run that its canary has stopped counts again when it passes: see `canary.judge`.
    """
    own, batch = tables.run.c, tables.batch.c
    event, later = tables.event.c, tables.event.alias("later").c
    is_closed = sa.exists().where(own.run_id == batch.run_id, own.state == RunState.CLOSED)
    has_passed = sa.exists().where(
        later.run_id == event.run_id, later.became == PASSED, later.event_id > event.event_id
    )
    is_stopped = sa.exists().where(
        event.run_id == batch.run_id, event.became == STOPPED, sa.not_(has_passed)
    )
    return sa.and_(batch.state == BatchState.PREPARED, sa.or_(is_closed, is_stopped))


def last_verdict(connection: Connection, run_id: str) -> str | None:
    """Return what the canary of a run has said last, if that was ever a no."""
    event = tables.event.c
    query = sa.select(event.became).where(
        event.run_id == run_id, event.became.in_((STOPPED, PASSED))
    )
    found: str | None = connection.scalar(query.order_by(event.event_id.desc()).limit(1))
    return found


def _was(decision: str) -> sa.ColumnElement[bool]:
    event = tables.event.c
    return sa.exists().where(event.run_id == tables.batch.c.run_id, event.became == decision)


def _spent(connection: Connection, which: sa.ColumnElement[bool]) -> Decimal:
    """Add up costs; a batch that had no price when it was collected is priced now.

    One whose answers do not say what they used counts as it was estimated.
    """
    total = money_sum(connection, tables.batch.c.cost_usd)
    known = connection.execute(sa.select(total).where(which)).scalar_one() or Decimal(0)
    sums = [sa.func.sum(tables.batch.c[name]) for name in USED]
    unknown = _by_model(connection, sums, sa.and_(which, tables.batch.c.cost_usd.is_(None)))
    priced = sum((_priced(model, cost.Usage(*tokens)) for model, *tokens in unknown), Decimal(0))
    return known + priced + _planned(connection, sa.and_(which, _is_untold()))


def _is_untold() -> sa.ColumnElement[bool]:
    """Tell of a collected batch whether it has answers, and none of them says what it used."""
    columns = tables.batch.c
    nothing = (columns[name] == 0 for name in USED)
    return sa.and_(columns.cost_usd.is_(None), columns.succeeded > 0, *nothing)


def _planned(connection: Connection, which: sa.ColumnElement[bool]) -> Decimal:
    """Add up estimates; batches of an earlier release have none and are estimated now."""
    columns = tables.batch.c
    total = money_sum(connection, columns.estimate_usd)
    known = connection.execute(sa.select(total).where(which)).scalar_one() or Decimal(0)
    sums = [sa.func.sum(columns.input_tokens), sa.func.sum(columns.requests)]
    unknown = _by_model(connection, sums, sa.and_(which, columns.estimate_usd.is_(None)))
    return known + sum(
        (
            _priced(model, cost.Usage(tokens, output=requests * cost.DEFAULT_OUTPUT_LIMIT // 2))
            for model, tokens, requests in unknown
        ),
        Decimal(0),
    )


def _by_model(
    connection: Connection, sums: list[Any], which: sa.ColumnElement[bool]
) -> list[tuple[Any, ...]]:
    """Return sums by the model whose price counts: a deployment's name has none."""
    owner = tables.run.alias("owner")  # the conditions ask of runs as well
    model, spec = tables.batch.c.model, owner.c.spec
    query = sa.select(model, spec, *sums).join(owner, owner.c.run_id == tables.batch.c.run_id)
    found = connection.execute(query.where(which).group_by(model, spec))
    return [(_priced_model(name, text), *map(int, numbers)) for name, text, *numbers in found]


def _priced_model(model: str, spec: str) -> str:
    request = json.loads(spec).get("request") or {}
    return request.get("priced_as") or model


def _priced(model: str, usage: cost.Usage) -> Decimal:
    if usage == cost.Usage():
        return Decimal(0)
    amount = cost.cost(usage, model)
    if amount is None:
        raise ConfigurationError(
            f"What this job has spent is unknown: its batches have used tokens of {model}, which "
            f"has no price. Add one to a price file and name that in {cost.OVERRIDE_VARIABLE}."
        )
    return amount

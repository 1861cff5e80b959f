"""The ledger against a model of it: any order of calls, by any number of workers, stale or not."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from include.errors import ConfigurationError
from include.ledger import Ledger
from include.ledger_records import EDGES, Batch, BatchState, NewBatch, Partition

pytestmark = pytest.mark.faults

SHARDS = 2
REQUESTS = 5
SHARD = st.integers(0, SHARDS - 1)
START = datetime(2026, 11, 1, tzinfo=UTC)
LONG = timedelta(hours=1)


@dataclass
class Expected:
    """What the ledger should say of one request file."""

    state: BatchState = BatchState.PREPARED
    epoch: int = 0
    batch_id: str | None = None
    is_silent: bool = True  # nobody has given a sign of life since the claim was abandoned
    refused: list[str] = field(default_factory=list)


class LedgerMachine(RuleBasedStateMachine):
    """Workers with fresh and with outdated knowledge change one round of two request files."""

    claims = Bundle("claims")  # (shard, the row as the claimer knows it)
    views = Bundle("views")  # the same for those who only read it
    template: Path

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ledger-machine-"))
        shutil.copy(self.template, self.folder / "ledger.db")
        self.ledger = Ledger(sa.create_engine(f"sqlite:///{self.folder}/ledger.db"))
        self.run = self.ledger.open_run(
            Partition("job", START, START + timedelta(days=1)),
            spec_digest="0" * 64,
            spec="{}",
            mode="normal",
            dag_id="job",
            dag_run_id="one",
        )
        self.new = [_new(self.run.run_id, shard) for shard in range(SHARDS)]
        self.ledger.build_round(self.run.run_id, 1, self.new)
        self.expected = [Expected() for _ in range(SHARDS)]
        self.made = 0

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.engine.dispose()
            shutil.rmtree(self.folder)

    def _row(self, shard: int) -> Batch:
        return self.ledger.batch(self.new[shard].submission_id)

    @rule()
    def build_again(self) -> None:
        """A cleared build task records the same round once more."""
        self.ledger.build_round(self.run.run_id, 1, self.new)

    @rule(target=views, shard=SHARD)
    def read(self, shard: int) -> tuple[int, Batch]:
        """Somebody learns where the batch is, and may act on it much later."""
        return shard, self._row(shard)

    @rule(target=claims, shard=SHARD, lease=st.sampled_from([timedelta(0), LONG]))
    def claim(self, shard: int, lease: timedelta) -> object:
        """A claim is given when it is free, or its holder is silent for the lease."""
        now = self.expected[shard]
        in_doubt = now.state == BatchState.SUBMITTING
        free = now.state == BatchState.PREPARED or (in_doubt and (now.is_silent or lease != LONG))
        got = self.ledger.claim(
            self.new[shard].submission_id, owner="worker", lease=lease, enqueued_tokens=None
        )
        assert (got is not None) == free
        if got is None:
            return multiple()
        assert got.is_takeover == in_doubt
        now.state, now.epoch, now.is_silent = BatchState.SUBMITTING, now.epoch + 1, False
        return shard, got.batch

    def _holds(self, claim: tuple[int, Batch]) -> bool:
        now = self.expected[claim[0]]
        return now.state == BatchState.SUBMITTING and now.epoch == claim[1].epoch

    @rule(claim=claims)
    def alive(self, claim: tuple[int, Batch]) -> None:
        """Only the last claimer may go on."""
        holds = self._holds(claim)
        assert self.ledger.still_ours(claim[1], file_id="file-1") == holds
        if holds:
            self.expected[claim[0]].is_silent = False

    @rule(claim=claims)
    def submitted(self, claim: tuple[int, Batch]) -> None:
        """A zombie that comes back with a batch of its own is not believed."""
        holds = self._holds(claim)
        self.made += 1
        batch_id = f"batch_{self.made}"
        assert self.ledger.submitted(claim[1], batch_id, "validating") == holds
        if holds:
            now = self.expected[claim[0]]
            now.state, now.batch_id = BatchState.SUBMITTED, batch_id

    @rule(claim=claims)
    def released(self, claim: tuple[int, Batch]) -> None:
        """The API refused for certain."""
        holds = self._holds(claim)
        assert self.ledger.release(claim[1], "refused") == holds
        if holds:
            self.expected[claim[0]].state = BatchState.PREPARED

    @rule(claim=claims)
    def abandoned(self, claim: tuple[int, Batch]) -> None:
        """The holder gives up without knowing what became of its call."""
        holds = self._holds(claim)
        assert self.ledger.abandon(claim[1]) == holds
        if holds:
            self.expected[claim[0]].is_silent = True

    def _moves(self, view: tuple[int, Batch], state: BatchState) -> bool:
        now = self.expected[view[0]]
        return now.state == state and now.epoch == view[1].epoch

    @rule(view=views)
    def requeued(self, view: tuple[int, Batch]) -> None:
        """The batch hit the token limit; only who has seen this very batch may say so."""
        shard, row = view
        now = self.expected[shard]
        right = self._moves(view, BatchState.SUBMITTED) and row.batch_id == now.batch_id
        assert self.ledger.requeue(row) == right
        if right:
            now.refused.append(str(now.batch_id))
            now.state, now.batch_id = BatchState.PREPARED, None

    @rule(view=views)
    def ended(self, view: tuple[int, Batch]) -> None:
        """Two waiters may both see the end."""
        shard, row = view
        moves = self._moves(view, BatchState.SUBMITTED)
        assert self.ledger.ended(row, api_status="completed", done=REQUESTS, failed=0) == moves
        if moves:
            self.expected[shard].state = BatchState.ENDED

    @rule(view=views, retry=st.integers(0, REQUESTS))
    def collected(self, view: tuple[int, Batch], retry: int) -> None:
        """A batch is collected once, whatever a second collector has found."""
        moves = self._moves(view, BatchState.ENDED)
        counts = {"succeeded": REQUESTS - retry, "retry": retry}
        assert self.ledger.collected(view[1], reasons={}, outcomes_file="o", **counts) == moves
        if moves:
            self.expected[view[0]].state = BatchState.COLLECTED

    @precondition(lambda self: self.made)
    @rule(view=views, number=st.integers(1, 3))
    def duplicate(self, view: tuple[int, Batch], number: int) -> None:
        """A duplicate is new once."""
        found = [f"extra_{number}"]
        known = {one["batch_id"] for one in self.ledger.duplicates([view[1].submission_id])}
        everywhere = {
            one["batch_id"]
            for new in self.new
            for one in self.ledger.duplicates([new.submission_id])
        }
        if view[1].batch_id is None:
            return
        is_new = self.ledger.record_duplicate(
            found[0], kept=view[1], api_status="cancelling", done=0, cost=None
        )
        assert is_new == (found[0] not in everywhere)
        assert known <= everywhere

    @rule()
    def settle(self) -> None:
        """A round is added up when all of it is collected, as often as somebody asks."""
        rows = [self._row(shard) for shard in range(SHARDS)]
        if all(now.state == BatchState.COLLECTED for now in self.expected):
            total = self.ledger.settle_round(self.run.run_id, 1)
            assert total.requests == sum(row.requests for row in rows)
            assert total.succeeded + total.retry + total.failed == total.requests
        else:
            with pytest.raises(ConfigurationError, match="cannot be settled"):
                self.ledger.settle_round(self.run.run_id, 1)

    @invariant()
    def rows_are_as_expected(self) -> None:
        """State, epoch and batch are the model's."""
        if not hasattr(self, "ledger"):
            return
        for shard, now in enumerate(self.expected):
            row = self._row(shard)
            assert (row.state, row.epoch, row.batch_id) == (now.state, now.epoch, now.batch_id)

    @invariant()
    def refused_batches_are_remembered(self) -> None:
        """Nobody may adopt a batch that was given back."""
        if not hasattr(self, "ledger"):
            return
        for shard, now in enumerate(self.expected):
            rows = self.ledger.duplicates([self.new[shard].submission_id])
            assert set(now.refused) <= {one["batch_id"] for one in rows}

    @invariant()
    def history_follows_the_edges(self) -> None:
        """I7, without a gap."""
        if not hasattr(self, "ledger"):
            return
        last: dict[str, str | None] = {}
        for event in self.ledger.history(self.run.run_id):
            name = event["submission_id"]
            if name is None:
                continue
            if name in last:
                assert event["was"] == last[name]
                assert (event["was"], event["became"]) in EDGES
            last[name] = event["became"]


def _new(run_id: str, shard: int) -> NewBatch:
    return NewBatch(
        run_id=run_id,
        job="job",
        round=1,
        shard=shard,
        conn_id="openai_default",
        endpoint="/v1/responses",
        model="gpt-4o-mini",
        request_file=f"shard-{shard}.jsonl",
        index_file=None,
        content_digest=f"{shard}" * 64,
        requests=REQUESTS,
        bytes=100,
        input_tokens=10,
    )


def test_the_ledger_keeps_its_promises(empty_ledger: Path, *, all_faults: bool) -> None:
    """No order of calls leads off the drawn edges, to two batches, or to a lost claim."""
    LedgerMachine.template = empty_ledger

    run_state_machine_as_test(
        LedgerMachine,
        settings=settings(
            max_examples=150 if all_faults else 15,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )

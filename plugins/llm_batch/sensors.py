"""Waits until a batch has ended; see `BatchSensor`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.sdk import BaseSensorOperator, conf

from include.errors import PermanentError
from llm_batch import connections
from llm_batch.links import BatchLink
from llm_batch.operators import defer_until_turn

if TYPE_CHECKING:
    from airflow.sdk import Context

    from include.ledger_records import Batch
    from include.waiting import WaitPolicy

DEADLINE_HOURS = 26.0  # the API promises 24
SAFETY = timedelta(minutes=30)  # Airflow's own timeout comes after our deadline, as a net only


class BatchSensor(BaseSensorOperator):
    """Succeeds when the batch has ended, however it ended: collecting sorts that out.

    `batch` is what `SubmitBatchOperator` returned: a dict with `submission_id`. Deferrable unless
    `[llm_batch] deferrable` says otherwise (one trigger, no worker); with `deferrable=False` it
    pokes, best with `mode="reschedule"`. `deadline_hours` after the submission the batch is
    cancelled; what it has done is kept. Returns the dict with `batch_id` and `status`.
    """

    template_fields: Sequence[str] = ("batch",)
    operator_extra_links = (BatchLink(),)
    ui_color = "#e8f0fe"

    def __init__(
        self,
        *,
        batch: dict[str, Any],
        deferrable: bool = conf.getboolean("llm_batch", "deferrable", fallback=True),
        deadline_hours: float | None = None,
        **kwargs: Any,
    ) -> None:
        hours = deadline_hours or connections.seconds("deadline_hours", DEADLINE_HOURS)
        kwargs.setdefault("poke_interval", connections.seconds("poll_interval", 60.0))
        kwargs.setdefault("timeout", hours * 3600 + 2 * SAFETY.total_seconds())
        super().__init__(**kwargs)
        self.batch = batch
        self.deferrable = deferrable
        self.deadline_hours = deadline_hours

    def execute(self, context: Context) -> dict[str, Any]:
        """Return at once when the batch has ended; otherwise defer, or poke."""
        if not self.deferrable:
            super().execute(context)
        elif not self.poke(context):
            self._defer()
        return self._result()

    def execute_complete(self, context: Context, event: Any = None) -> dict[str, Any]:
        """Go on after a trigger: the batch itself is asked, the event only wakes us up."""
        if event is None:
            raise PermanentError(f"The trigger for {self.batch} sent no event. Clear this task.")
        return self.execute(context)

    def poke(self, context: Context) -> bool:
        """Look once; a file that only hit the token limit is submitted again."""
        from include.submission import SubmitLaterError
        from include.waiting import Verdict, look

        ledger = connections.ledger()
        row = ledger.batch(self.batch["submission_id"])
        api = connections.batch_api(row.conn_id)
        verdict = look(row, ledger, api, self._policy())
        if verdict is not Verdict.RESUBMIT:
            return verdict is Verdict.OVER
        try:
            connections.submission(row.conn_id).submit(
                row.submission_id, enqueued_tokens=self.batch.get("enqueued_tokens")
            )
        except SubmitLaterError as later:
            if self.deferrable:
                defer_until_turn(self, later)
        return False

    def _defer(self) -> NoReturn:
        from llm_batch.triggers import BatchTrigger

        row, policy = self._row(), self._policy()
        deadline = policy.deadline(row)
        if datetime.now(UTC) >= deadline:
            deadline = policy.last_call(row)
        self.defer(
            trigger=BatchTrigger(
                conn_id=row.conn_id,
                batch_id=str(row.batch_id),
                deadline=deadline.isoformat(),
                submitted_at="" if row.submitted_at is None else row.submitted_at.isoformat(),
                poll_interval=self.poke_interval,
                first_poll=connections.seconds("first_poll", 10.0),
                requests=row.requests,
            ),
            method_name="execute_complete",
            timeout=max(deadline - datetime.now(UTC), timedelta(0)) + SAFETY,
        )
        raise AssertionError("defer() does not return")

    def _policy(self) -> WaitPolicy:
        return connections.wait_policy(self.deadline_hours)

    def _row(self) -> Batch:
        return connections.ledger().batch(self.batch["submission_id"])

    def _result(self) -> dict[str, Any]:
        row = self._row()
        return {**self.batch, "batch_id": row.batch_id, "status": row.api_status}

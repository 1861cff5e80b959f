"""Waits until a batch has ended; see `BatchSensor`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.sdk import BaseSensorOperator, conf

from include.errors import PermanentError
from include.provider import PROFILES
from llm_batch import connections
from llm_batch.links import BatchLink
from llm_batch.notices import tell
from llm_batch.steps import come_back, go_on, run_of

if TYPE_CHECKING:
    from airflow.sdk import BaseNotifier, Context

    from include.alerts import Alert
    from include.ledger_records import Batch
    from include.waiting import WaitPolicy

LONGEST_DEADLINE = max(profile.deadline_hours for profile in PROFILES.values())  # hours
SAFETY = timedelta(minutes=30)  # Airflow's own timeout comes after our deadline, as a net only


class BatchSensor(BaseSensorOperator):
    """Succeeds when the batch has ended, however it ended: collecting sorts that out.

    `batch` is what `SubmitBatchOperator` returned: a dict with `submission_id`. Deferrable unless
    `[llm_batch] deferrable` says otherwise (one trigger, no worker); with `deferrable=False` it
    pokes, best with `mode="reschedule"`. `deadline_hours` after the submission (else the setting,
    else what the provider may need) the batch is cancelled; what it has done is kept. `notifiers`
    are told once when `alert.late_share` of that time has gone. Returns the dict
    with `batch_id` and `status`.
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
        notifiers: Sequence[BaseNotifier] = (),
        **kwargs: Any,
    ) -> None:
        hours = deadline_hours or connections.seconds("deadline_hours", LONGEST_DEADLINE)
        kwargs.setdefault("poke_interval", connections.seconds("poll_interval", 60.0))
        kwargs.setdefault("timeout", hours * 3600 + 2 * SAFETY.total_seconds())
        super().__init__(**kwargs)
        self.batch = batch
        self.deferrable = deferrable
        self.deadline_hours = deadline_hours
        self.notifiers = notifiers

    def pre_execute(self, context: Context) -> None:
        """Go on with the run, when its Airflow run had ended and this task was cleared."""
        ledger = connections.ledger()
        go_on(ledger, run_of(self.batch, ledger), context)

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
        verdict = look(row, ledger, api, self._policy(row))
        if verdict is Verdict.WAIT:
            tell(self._late(row.submission_id), context, self.notifiers)
        if verdict is not Verdict.RESUBMIT:
            return verdict is Verdict.OVER
        try:
            connections.submission(row.conn_id).submit(
                row.submission_id, enqueued_tokens=self.batch.get("enqueued_tokens")
            )
        except SubmitLaterError as later:
            if self.deferrable:
                come_back(self, later.retry_after or 0.0, deferrable=True)
        return False

    def _defer(self) -> NoReturn:
        from llm_batch.triggers import BatchTrigger

        row = self._row()
        policy = self._policy(row)
        deadline = policy.deadline(row)
        if datetime.now(UTC) >= deadline:
            deadline = policy.last_call(row)
        self.log.info(
            "%s, run %s: %s, %s done and %s failed of %s; deferred to the triggerer until %s.",
            row,
            row.run_id,
            row.api_status,
            row.done_requests,
            row.failed_requests,
            row.requests,
            deadline.isoformat(timespec="seconds"),
        )
        self.defer(
            trigger=BatchTrigger(
                conn_id=row.conn_id,
                batch_id=str(row.batch_id),
                deadline=deadline.isoformat(),
                late_at=self._late_at(row),
                submitted_at="" if row.submitted_at is None else row.submitted_at.isoformat(),
                poll_interval=self.poke_interval,
                first_poll=connections.seconds("first_poll", 10.0),
                requests=row.requests,
            ),
            method_name="execute_complete",
            timeout=max(deadline - datetime.now(UTC), timedelta(0)) + SAFETY,
        )
        raise AssertionError("defer() does not return")

    def _late(self, submission_id: str) -> Iterator[Alert]:
        from include import alerts

        ledger = connections.ledger()
        row = ledger.batch(submission_id)
        yield from alerts.of_waiting(row, ledger, self._policy(row).window)

    def _late_at(self, row: Batch) -> str:
        """Return when the trigger has to wake this task to tell that its batch is late, if ever."""
        from include import alerts
        from include.pipeline import pinned

        spec = pinned(connections.ledger().run(row.run_id))
        moment = alerts.late_at(row, spec, self._policy(row).window)
        return "" if moment is None or moment <= datetime.now(UTC) else moment.isoformat()

    def _policy(self, row: Batch) -> WaitPolicy:
        return connections.wait_policy(row.conn_id, self.deadline_hours)

    def _row(self) -> Batch:
        return connections.ledger().batch(self.batch["submission_id"])

    def _result(self) -> dict[str, Any]:
        row = self._row()
        page = connections.batch_page(row.conn_id, row.batch_id)
        return {**self.batch, "batch_id": row.batch_id, "status": row.api_status, "page": page}

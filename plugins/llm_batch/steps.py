"""What the steps of a run have in common: they tell people, go on with a run, and wait."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator

from llm_batch import connections
from llm_batch.notices import tell

if TYPE_CHECKING:
    from airflow.sdk import BaseNotifier, Context

    from include.ledger import Ledger
    from include.ledger_records import Batch, Partition

SHORTEST_DEFERRAL = 10.0  # seconds; see BatchTrigger.run


class BatchOperator(BaseOperator):
    """What the steps have in common: each tells how much memory it took, and people of alerts.

    `notifiers` are told besides those of `[llm_batch] notifiers`; see `llm_batch.notices`.
    """

    def __init__(self, *, notifiers: Sequence[BaseNotifier] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.notifiers = notifiers

    def post_execute(self, context: Context, result: Any = None) -> None:
        """Log the peak, so that a worker's size can be chosen from what runs really took."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
        megabytes = peak // (1 << 20 if sys.platform == "darwin" else 1 << 10)
        self.log.info("Peak memory of this task's process: %s MB.", megabytes)


class BegunOperator(BatchOperator):
    """A step of a run that has begun: the Airflow run goes on with it, also when it had ended."""

    def pre_execute(self, context: Context) -> None:
        """Go on with the run, when its Airflow run had ended and this task was cleared."""
        ledger = connections.ledger()
        run_id = self.works_on(ledger)
        if run_id is not None:
            go_on(ledger, run_id, context)

    def works_on(self, ledger: Ledger) -> str | None:
        """Return the id of the run that this is a step of; None when it is yet to be joined."""
        raise NotImplementedError


class RunOperator(BegunOperator):
    """A step of the run that `run` names: a dict with `run_id`, as `ExtractOperator` returns."""

    template_fields: Sequence[str] = ("run",)

    def __init__(self, *, run: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.run = run

    def works_on(self, ledger: Ledger) -> str:
        """Return the id of the run."""
        return str(self.run["run_id"])

    def tell_about(self, run_id: str, context: Context) -> None:
        """Tell people what there is to tell about the run now."""
        from include import alerts

        tell(alerts.of_run(run_id, connections.ledger()), context, self.notifiers)


class RoundOperator(RunOperator):
    """A step of one round of the run; rounds count from 1."""

    def __init__(self, *, round_number: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.round_number = round_number


def go_on(ledger: Ledger, run_id: str, context: Context) -> None:
    """Record that this Airflow run works on the run, so that others leave its rows to it."""
    from include import participants

    participants.go_on(ledger, run_id, context["dag_run"].dag_id, context["dag_run"].run_id)


def partition(job: str, context: Context) -> Partition:
    """Return the data interval of this Airflow run as a partition of `job`."""
    from include.ledger_records import Partition

    dag_run = context["dag_run"]
    start = context.get("data_interval_start") or dag_run.logical_date or dag_run.run_after
    end = context.get("data_interval_end") or start
    return Partition(job, _utc(start), _utc(end))


def shard(row: Batch, enqueued_tokens: int | None) -> dict[str, Any]:
    """Return what travels through XCom for one request file."""
    return {
        "submission_id": row.submission_id,
        "round": row.round,
        "shard": row.shard,
        "requests": row.requests,
        "enqueued_tokens": enqueued_tokens,
    }


def run_of(batch: dict[str, Any], ledger: Ledger) -> str:
    """Return the id of the run of a batch; `batch` is what `shard` returned."""
    return ledger.batch(batch["submission_id"]).run_id


def come_back(operator: BaseOperator, seconds: float, *, deferrable: bool) -> None:
    """Give the worker back for that time and call `execute_complete` then; else sleep here."""
    from airflow.providers.standard.triggers.temporal import TimeDeltaTrigger

    if deferrable:
        pause = timedelta(seconds=max(seconds, SHORTEST_DEFERRAL))
        operator.defer(trigger=TimeDeltaTrigger(pause), method_name="execute_complete")
    time.sleep(seconds or SHORTEST_DEFERRAL)


def _utc(moment: Any) -> datetime:
    """Return a plain aware datetime: Airflow hands out its own class."""
    return datetime.fromtimestamp(moment.timestamp(), UTC)

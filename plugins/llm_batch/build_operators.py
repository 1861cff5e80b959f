"""The steps that decide what a round sends: its request files, and the canary before the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow.sdk import conf
from airflow.sdk.exceptions import AirflowSkipException

from llm_batch import connections
from llm_batch.steps import RoundOperator, RunOperator, come_back, shard

if TYPE_CHECKING:
    from airflow.sdk import Context

    from include.job_spec import JobSpec
    from include.ledger_records import Batch


class BuildRequestsOperator(RoundOperator):
    """Writes the request files of one round; skips itself, and the round, when nothing is open.

    Returns one dict per shard: `submission_id`, `round`, `shard`, `requests`, `enqueued_tokens`.
    While another run of the partition asks the same it defers itself (`deferrable=False`: sleeps).
    """

    ui_color = "#f1f3f4"
    nothing = "No row is open in this round."

    def __init__(
        self,
        *,
        deferrable: bool = conf.getboolean("llm_batch", "deferrable", fallback=True),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.deferrable = deferrable

    def execute(self, context: Context) -> list[dict[str, Any]]:
        """Build, or skip."""
        from include import pipeline

        batches = self.built(context)
        spec = pipeline.pinned(connections.ledger().run(self.run["run_id"]))
        if self.round_number == 1:
            batches = self.first_round(batches, spec)
        if not batches:
            raise AirflowSkipException(self.nothing)
        return [shard(one, spec.limits.enqueued_tokens) for one in batches]

    def execute_complete(self, context: Context, event: Any = None) -> Any:
        """The other run has ended, perhaps."""
        return self.execute(context)

    def built(self, context: Context) -> list[Batch]:
        """Return the batches of the round, none when no row is open."""
        from include.errors import PartitionBusyError

        while True:
            try:
                return self._built(context)
            except PartitionBusyError as busy:
                self.log.info("%s", busy)
                pause = connections.submission_policy().busy_pause
                come_back(self, pause, deferrable=self.deferrable)

    def _built(self, context: Context) -> list[Batch]:
        from include import pipeline

        ledger = connections.ledger()
        run = ledger.run(self.run["run_id"])
        spec = pipeline.pinned(run)
        try:
            return pipeline.build(
                run,
                self.round_number,
                ledger,
                connections.artifacts(),
                lambda: connections.target(spec),
                most_shards=conf.getint("core", "max_map_length", fallback=1024),
                jobs_root=connections.jobs_root(),
                profile=connections.provider(spec.request.conn_id),
            )
        finally:  # a run that is over its budget does not begin: that is when somebody must know
            self.tell_about(run.run_id, context)

    def first_round(self, batches: list[Batch], spec: JobSpec) -> list[Batch]:
        """Return what is submitted together: the canary has gone before."""
        from include.canary import after_canary

        return after_canary(batches, spec.canary)


class BuildCanaryOperator(BuildRequestsOperator):
    """Writes the request files of round 1; skips itself when it is too small for a canary.

    Returns a list of one dict, that of the canary.
    """

    nothing = "The run is too small for a canary: all of it goes at once."

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(round_number=1, **kwargs)

    def first_round(self, batches: list[Batch], spec: JobSpec) -> list[Batch]:
        """Return the canary alone."""
        from include.canary import canary_of

        first = canary_of(batches, spec.canary)
        return [] if first is None else [first]


class JudgeCanaryOperator(RunOperator):
    """Fails the run, before the rest is sent, when the canary came out badly. Returns figures."""

    ui_color = "#fef7e0"

    def execute(self, context: Context) -> dict[str, Any]:
        """Judge."""
        from include.canary import judge

        ledger = connections.ledger()
        figures = judge(ledger.run(self.run["run_id"]), ledger)
        return {
            "requests": figures.requests,
            "judged": figures.judged,
            "failed": figures.failed,
            "cost_usd": None if figures.cost_usd is None else str(figures.cost_usd),
        }

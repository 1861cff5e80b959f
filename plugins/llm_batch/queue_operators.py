"""The two steps that only a queue has: take what waits, and extract what a run has taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowSkipException, DagRunTriggerException

from include.errors import ConfigurationError
from include.queue_spec import load_queue
from llm_batch import connections
from llm_batch.steps import BatchOperator

if TYPE_CHECKING:
    from airflow.sdk import Context


class DrainQueueOperator(BatchOperator):
    """Takes what waits in the queue when it is time; skips itself, and what follows, otherwise.

    Returns one dict per run to start: `dag_run_id` and `run_id`. The param `everything` takes what
    waits at once.
    """

    ui_color = "#f1f3f4"

    def __init__(self, *, queue: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.queue_name = queue

    def execute(self, context: Context) -> list[dict[str, str]]:
        """Drain, or skip."""
        from include.queue_drain import drain

        root = connections.jobs_root()
        runs = drain(
            connections.ledger(),
            load_queue(self.queue_name, root),
            dag_id=self.queue_name,
            everything=bool(context["params"].get("everything")),
            jobs_root=root,
            provider=connections.provider,
        )
        if not runs:
            raise AirflowSkipException(f"Queue {self.queue_name}: it is not time, or none waits.")
        return [{"dag_run_id": one.dag_run_id, "run_id": one.run_id} for one in runs]


class StartRunOperator(BaseOperator):
    """Starts the Airflow run over claimed requests; skips itself when it has been started before.

    `run` is one of the dicts of `DrainQueueOperator`.
    """

    template_fields: Sequence[str] = ("run",)
    ui_color = "#ffefeb"

    def __init__(self, *, run: dict[str, str], dag_id_to_start: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.run = run
        self.dag_id_to_start = dag_id_to_start

    def execute(self, context: Context) -> NoReturn:
        """Start; what is raised is Airflow's own way of doing that.

        Airflow's operator for it imports half of Airflow into every parse of the DAG file.
        """
        raise DagRunTriggerException(
            trigger_dag_id=self.dag_id_to_start,
            dag_run_id=self.run["dag_run_id"],
            conf={"run_id": self.run["run_id"]},
            logical_date=None,  # runs of one moment would be refused as the same
            reset_dag_run=False,
            skip_when_already_exists=True,
            wait_for_completion=False,
            allowed_states=[],
            failed_states=[],
            poke_interval=60,
            deferrable=False,
        )


class ExtractRequestsOperator(BatchOperator):
    """Writes the snapshot of the requests that the run has claimed. Returns `run_id` and `rows`.

    Limits and budget are those of job.yaml now, so a run that its budget has refused goes on when
    more is allowed and this task is cleared.
    """

    ui_color = "#f1f3f4"

    def __init__(self, *, queue: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.queue_name = queue

    def execute(self, context: Context) -> dict[str, Any]:
        """Extract."""
        from include import pipeline
        from include.queue_drain import join

        run_id = (context["dag_run"].conf or {}).get("run_id")
        if not run_id:
            raise ConfigurationError(
                f"DAG {self.dag_id} works on requests that {self.dag_id}_drain has taken, and "
                f"this run has none. Trigger {self.dag_id}_drain with everything=true instead."
            )
        ledger = connections.ledger()
        run = join(
            ledger,
            load_queue(self.queue_name, connections.jobs_root()),
            run_id,
            dag_id=self.dag_id,
            dag_run_id=context["run_id"],
        )
        run = pipeline.extract(run, ledger, connections.artifacts(), lambda: ledger.engine)
        return {"run_id": run.run_id, "rows": run.rows}

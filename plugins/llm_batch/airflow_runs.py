"""Airflow runs as somebody on call changes them, from a machine that reaches Airflow's database.

The command line has no login, so this does what `airflow dags trigger` does, not what the REST API
does: whoever may open the database may do it. Who it was is in `llm_batch_action`.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from include.actions import redrive_params
from include.errors import ConfigurationError

if TYPE_CHECKING:
    from include.actions import Redrive


def fail_run(dag_id: str, run_id: str) -> None:
    """End an Airflow run as failed, with its tasks; one that is over or gone is left as it is."""
    from airflow.api.common.mark_tasks import set_dag_run_state_to_failed
    from airflow.models.dagrun import DagRun
    from airflow.utils.session import create_session
    from airflow.utils.state import State
    from sqlalchemy import select

    with create_session() as session:
        query = select(DagRun).where(DagRun.dag_id == dag_id, DagRun.run_id == run_id)
        found = session.scalar(query)
        if found is None or found.state in State.finished_dr_states:
            return
        set_dag_run_state_to_failed(
            dag=_dag(dag_id, session), run_id=run_id, commit=True, session=session
        )


def is_alive(dag_id: str, run_id: str) -> bool:
    """Tell whether an Airflow run is queued or running; one that is gone is not."""
    from airflow.models.dagrun import DagRun
    from airflow.utils.session import create_session
    from airflow.utils.state import State
    from sqlalchemy import select

    with create_session() as session:
        query = select(DagRun.state).where(DagRun.dag_id == dag_id, DagRun.run_id == run_id)
        return session.scalar(query) in State.unfinished_dr_states


def trigger_redrive(plan: Redrive, *, who: str) -> str:
    """Start an Airflow run over the partition with the param `redrive`; return its run id."""
    from airflow.utils.session import create_session
    from airflow.utils.state import DagRunState
    from airflow.utils.types import DagRunTriggeredByType, DagRunType

    run, moment = plan.run, _free_moment(plan)
    with create_session() as session:
        created = _dag(run.dag_id, session).create_dagrun(
            run_id=f"manual__{moment.isoformat()}",
            logical_date=moment,
            data_interval=(run.interval_start, run.interval_end),
            run_after=datetime.now(UTC),
            conf=redrive_params(run),
            run_type=DagRunType.MANUAL,
            triggered_by=DagRunTriggeredByType.CLI,
            triggering_user_name=who,
            note=plan.note,
            state=DagRunState.QUEUED,
            session=session,
        )
        return str(created.run_id)


def is_paused(dag_id: str) -> bool:
    """Tell whether the DAG is paused: its runs wait."""
    from airflow.models.dag import DagModel
    from airflow.utils.session import create_session
    from sqlalchemy import select

    with create_session() as session:
        return bool(session.scalar(select(DagModel.is_paused).where(DagModel.dag_id == dag_id)))


def _free_moment(plan: Redrive) -> datetime:
    """Return a logical date that no scheduled run has: the partition's own is taken."""
    moment = datetime.now(UTC)
    if plan.run.interval_end <= moment:
        return moment
    return plan.run.interval_end + timedelta(microseconds=moment.microsecond + 1)


def _dag(dag_id: str, session: Any) -> Any:
    from airflow.models.dagbag import DBDagBag

    dag = DBDagBag().get_latest_version_of_dag(dag_id, session=session)
    if dag is None:
        raise ConfigurationError(
            f"Airflow knows no DAG {dag_id!r}. Is this the machine, and the environment, of the "
            "scheduler?"
        )
    return dag

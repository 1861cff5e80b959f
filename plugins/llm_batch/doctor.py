"""`python -m llm_batch doctor`: everything that a run needs, looked at before a run needs it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from airflow.sdk import conf

from include import health
from include.budgets import check_priced
from include.errors import ConfigurationError, LLMBatchError
from include.health import Check, Level
from include.job_spec import JobSpec, load_job, with_provider
from include.queue_spec import is_queue, load_queue
from llm_batch import connections

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

# What this release was tested with, as far as the number matters.
TESTED = {
    "apache-airflow": "3.3.",
    "apache-airflow-providers-openai": "2.",
    "openai": "3.",
    "sqlalchemy": "2.",
    "pyarrow": "",
}
COMPONENTS = {"SchedulerJob": "scheduler", "DagProcessorJob": "dag-processor"}
SHORT_HEARTBEAT = 1  # seconds
OWN_POOL = "llm_batch"


def examine() -> list[Check]:
    """Return every check, in the order in which a new installation is mended."""
    specs, broken = _jobs()
    return [
        *_versions(),
        *_airflow(),
        *broken,
        *health.ledger_checks(connections.ledger_engine()),
        *_guarded("artifacts", lambda: health.artifacts_checks(connections.artifacts())),
        *_apis(sorted({one.request.conn_id for one in specs} or {"openai_default"})),
        *_databases(specs),
        *_guarded("prices", lambda: _prices(specs)),
    ]


def _versions() -> Iterator[Check]:
    wrong = []
    for package, tested in TESTED.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "not installed"
        if not found.startswith(tested):
            wrong.append(f"{package} {found} (tested with {tested}x)")
    if wrong:
        yield Check(
            "versions", Level.WARNING, ", ".join(wrong), "Install what requirements.txt locks."
        )
    else:
        yield Check("versions", Level.OK, f"Airflow {version('apache-airflow')}")


def _jobs() -> tuple[list[JobSpec], list[Check]]:
    root = connections.jobs_root()
    specs, broken = [], []
    for folder in sorted(root.glob("*/job.yaml")):
        name = folder.parent.name
        try:
            if is_queue(folder.parent):
                load_queue(name, root)
            else:
                specs.append(load_job(name, root))
        except LLMBatchError as error:
            found = " ".join(str(error).split())  # one line for each problem
            broken.append(Check(f"job {name}", Level.BAD, found, "Correct the file it names."))
    if not specs and not broken:
        broken.append(
            Check("jobs", Level.WARNING, f"no job folder in {root}", "See [llm_batch] jobs.")
        )
    return specs, broken


def _airflow() -> list[Check]:
    """Look at settings, pool and components, through Airflow's own database."""
    from airflow.utils.session import create_session
    from sqlalchemy.exc import SQLAlchemyError

    checks = [*_heartbeat()]
    try:
        with create_session() as session:
            checks += [*_pool(session), *_components(session)]
    except SQLAlchemyError as error:
        checks.append(
            Check(
                "Airflow's database",
                Level.BAD,
                str(getattr(error, "orig", error)).splitlines()[0],
                "Run this where the scheduler runs, with its environment; `airflow db check` "
                "tells more.",
            )
        )
    return checks


def _heartbeat() -> Iterator[Check]:
    seconds = conf.getint("workers", "min_heartbeat_interval", fallback=5)
    if seconds > SHORT_HEARTBEAT:
        yield Check(
            "heartbeat",
            Level.WARNING,
            f"[workers] min_heartbeat_interval is {seconds}",
            "Set it to 1: above, the scheduler can fail a task whose trigger fires soon.",
        )


def _pool(session: Session) -> Iterator[Check]:
    from airflow.models.pool import Pool
    from sqlalchemy import select

    name = conf.get("llm_batch", "pool", fallback=None)
    if not name:
        yield Check(
            "pool",
            Level.WARNING,
            "[llm_batch] pool is not set: nothing caps what is in flight over all jobs",
            f"{_make_pool(OWN_POOL)}, then set [llm_batch] pool = {OWN_POOL}.",
        )
        return
    pool = session.scalar(select(Pool).where(Pool.pool == name))
    if pool is None:
        yield Check(
            "pool",
            Level.BAD,
            f"there is no pool {name!r}: submit and wait are never scheduled",
            f"{_make_pool(name)}.",
        )
    elif not pool.include_deferred:
        yield Check(
            "pool",
            Level.BAD,
            f"pool {name!r} does not count deferred tasks: a waiting batch takes no slot",
            f"{_make_pool(name, pool.slots)}.",
        )
    elif pool.slots == 0:
        yield Check("pool", Level.BAD, f"pool {name!r} has no slot", f"{_make_pool(name)}.")
    else:
        used = pool.occupied_slots(session=session)
        yield Check("pool", Level.OK, f"pool {name!r}: {used} of {pool.slots} slots in use")


def _make_pool(name: str, slots: int = 16) -> str:
    return f'Say `airflow pools set {name} {slots} "batches in flight" --include-deferred`'


def _components(session: Session) -> Iterator[Check]:
    for job_type, name in COMPONENTS.items():
        yield _component(
            session,
            job_type,
            name,
            f"Start it: `airflow {name}`. Nothing is scheduled without it; what is at the API "
            "goes on.",
        )
    if conf.getboolean("llm_batch", "deferrable", fallback=True):
        yield _component(
            session,
            "TriggererJob",
            "triggerer",
            "Start it: `airflow triggerer`. Deferred tasks go on from the database, no batch is "
            "lost or made twice. Without any triggerer set [llm_batch] deferrable = False.",
        )


def _component(session: Session, job_type: str, name: str, mend: str) -> Check:
    from airflow.jobs.job import most_recent_job

    job: Any = most_recent_job(job_type, session=session)
    if job is None:
        return Check(name, Level.BAD, f"no {name} has ever run", mend)
    if not job.is_alive():
        return Check(name, Level.BAD, f"down: last heard of at {job.latest_heartbeat:%F %T}", mend)
    return Check(name, Level.OK, f"alive on {job.hostname}")


def _apis(conn_ids: list[str]) -> Iterator[Check]:
    for conn_id in conn_ids:
        name = f"API of {conn_id}"
        yield from _guarded(name, lambda conn_id=conn_id: _api(conn_id))  # type: ignore[misc]


def _api(conn_id: str) -> list[Check]:
    if not connections.has_key(conn_id):
        return [
            Check(
                f"API of {conn_id}",
                Level.BAD,
                "the connection has no key",
                f"Put the API key into the password of connection {conn_id}.",
            )
        ]
    return health.api_checks(connections.openai_client(conn_id), conn_id)


def _databases(specs: list[JobSpec]) -> Iterator[Check]:
    targets = {one.target.conn_id for one in specs if one.target.conn_id}
    sources = {one.source.conn_id for one in specs if one.source.sql}
    for conn_id in sorted(sources | targets):
        yield from _guarded(
            f"database {conn_id}",
            lambda conn_id=conn_id: health.database_checks(  # type: ignore[misc]
                connections.engine(conn_id), conn_id, is_target=conn_id in targets
            ),
        )


def _prices(specs: list[JobSpec]) -> list[Check]:
    known = [_of_provider(one) for one in specs]
    models = [one.request.priced_model for one in known]
    if not models:
        return []
    checks = health.price_checks(models, datetime.now(UTC).date())
    return [*checks, *itertools.chain.from_iterable(map(_bounded, known))]


def _bounded(spec: JobSpec) -> Iterator[Check]:
    try:
        check_priced(spec)
    except ConfigurationError as error:
        mend = "Until then it does not start. Without the bound it does, at an unknown cost."
        yield Check(f"job {spec.name}", Level.BAD, str(error), mend)


def _of_provider(spec: JobSpec) -> JobSpec:
    try:
        return with_provider(spec, connections.provider(spec.request.conn_id))
    except ConfigurationError:  # another check tells about the connection
        return spec


def _guarded(name: str, look: Callable[[], list[Check]]) -> list[Check]:
    """Return what `look` finds; a connection that cannot even be made is a finding as well."""
    try:
        return look()
    except LLMBatchError as error:
        return [Check(name, Level.BAD, str(error), "Correct the connection that it names.")]

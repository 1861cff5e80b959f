"""The job folder of a queue: when it is drained, and the job that each group of requests makes.

`job.yaml` has `source: {queue: …}` instead of a table; model, endpoint and prompt come with each
request. DAG files import this module: it needs pydantic, yaml and the standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, time, timedelta
from pathlib import Path
from typing import Annotated, Any, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, BeforeValidator, ValidationError, model_validator

from include.endpoints import endpoint_of
from include.errors import JobSpecError
from include.job_spec import (
    JOB_NAME,
    JOBS_ROOT,
    RAW,
    JobSpec,
    QueueGroup,
    Request,
    Source,
    Target,
    load_job,
)
from include.job_yaml import Problems, describe, parse_document
from include.output_columns import AnswerShape
from include.run_policy import Alert, Budget, Canary, Limits, Retry
from include.spec_values import ConnectionId, SpecModel, WholeNumber

JOB_FILE = "job.yaml"
KEY = "request_id"
TABLE = "llm_batch_queue"
OPENAI_CONNECTION = "openai_default"
LEDGER = "llm_batch_db"  # the connection of the ledger, which holds the queue
RUN_ID = "{run_id}"  # stands in the pinned SQL for the run that has claimed the requests
_SQL = (
    "SELECT request_id, {column} FROM llm_batch_queue WHERE run_id = '{{run_id}}' "
    "ORDER BY priority DESC, queued_at, request_id"
)


def _clock_time(value: Any) -> Any:
    """Take "02:00"; YAML itself makes a number of 12:30 without quotes."""
    try:
        return time.fromisoformat(value)
    except (TypeError, ValueError):
        raise ValueError('must be a time of the day in quotes, such as "02:00"') from None


def _known_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError):
        raise ValueError("must be a time zone such as UTC or Europe/Berlin") from None
    return name


class Drain(SpecModel):
    """When the waiting requests are taken: as soon as one of these holds."""

    min_requests: WholeNumber | None = None
    max_age_minutes: WholeNumber | None = None
    daily_at: Annotated[time, BeforeValidator(_clock_time)] | None = None
    timezone: Annotated[str, AfterValidator(_known_zone)] = "UTC"

    @model_validator(mode="after")
    def _has_an_occasion(self) -> Self:
        if self.min_requests is None and self.max_age_minutes is None and self.daily_at is None:
            raise ValueError("needs one of min_requests, max_age_minutes and daily_at, or more")
        return self

    def is_due(self, waiting: int, oldest: datetime | None, moment: datetime) -> bool:
        """Tell whether `waiting` requests, the oldest of them since `oldest`, are to be taken."""
        if not waiting or oldest is None:
            return False
        taken_before = []
        if self.max_age_minutes is not None:
            taken_before.append(moment - timedelta(minutes=self.max_age_minutes))
        if self.daily_at is not None:
            taken_before.append(self._last_daily(moment, self.daily_at))
        is_many = self.min_requests is not None and waiting >= self.min_requests
        return is_many or any(oldest <= bound for bound in taken_before)

    def _last_daily(self, moment: datetime, at: time) -> datetime:
        """Return the newest daily moment that has passed, so that a missed one is made good."""
        zone = ZoneInfo(self.timezone)
        today = datetime.combine(moment.astimezone(zone).date(), at, zone)
        return today if today <= moment else today - timedelta(days=1)


class QueueSource(SpecModel):
    """The queue as a source."""

    queue: Drain


class QueueRequests(SpecModel):
    """What requests with a body of their own need besides it."""

    conn_id: ConnectionId = OPENAI_CONNECTION


class QueueSpec(SpecModel):
    """One queue, whole."""

    name: str
    description: str = ""
    source: QueueSource
    request: QueueRequests = QueueRequests()
    limits: Limits = Limits()
    retry: Retry = Retry()
    budget: Budget = Budget()
    canary: Canary = Canary()
    alert: Alert = Alert()


@dataclass(frozen=True, order=True)
class Group:
    """Requests that may be in one batch: of one job, or of one endpoint and one model."""

    job: str  # "" for requests with a body of their own
    endpoint: str
    model: str

    def __str__(self) -> str:
        return f"job {self.job}" if self.job else f"{self.endpoint} with {self.model}"


def is_queue(folder: Path) -> bool:
    """Tell whether a job folder is that of a queue; False when its file cannot be read."""
    try:
        document = parse_document((folder / JOB_FILE).read_text("utf-8-sig"), JOB_FILE, Problems())
    except (OSError, UnicodeDecodeError):
        return False
    source = document.data.get("source") if document else None
    return isinstance(source, dict) and "queue" in source


def load_queue(name: str, root: Path = JOBS_ROOT) -> QueueSpec:
    """Read and check the `job.yaml` of a queue; raises `JobSpecError` with every problem."""
    path = root / name / JOB_FILE
    if not JOB_NAME.fullmatch(name) or not path.is_file():
        raise JobSpecError(f"Queue {name[:70]!r}: there is no file {path}.")
    problems = Problems()
    document = parse_document(path.read_text("utf-8-sig"), JOB_FILE, problems)
    if document is not None:
        try:
            return QueueSpec.model_validate({**document.data, "name": name})
        except ValidationError as error:
            for location, message in describe(error, QueueSpec, frozenset({"name"})):
                problems.add(JOB_FILE, document.line(location), message)
    found = "\n  ".join(problems.found)
    raise JobSpecError(f"Queue {name}: problems in {path.parent}:\n  {found}")


def group_spec(queue: QueueSpec, group: Group, root: Path = JOBS_ROOT) -> JobSpec:
    """Return the job that a run over the requests of `group` is pinned to.

    The prompt, schema and model of a job are those of its folder now. Raises `JobSpecError` when
    that folder cannot be used.
    """
    parts: dict[str, Any] = {
        "name": queue.name,
        "description": queue.description,
        "source": Source(
            conn_id=LEDGER,
            sql=_SQL.format(column="job_row" if group.job else "body"),
            sql_file=TABLE,
            key=(KEY,),
        ),
        "target": Target(conn_id=LEDGER, table=TABLE),
        "limits": queue.limits,
        "retry": queue.retry,
        "budget": queue.budget,
        "canary": queue.canary,
        "alert": queue.alert,
        "queue": QueueGroup(job=group.job),
    }
    if group.job:
        parts["request"] = load_job(group.job, root).request
    else:
        parts["request"] = body_request(group.endpoint, group.model, queue.request.conn_id)
    try:
        return JobSpec.model_validate(parts)
    except ValidationError as error:
        ((_, message), *_) = describe(error, JobSpec, frozenset())
        raise JobSpecError(f"{group} cannot be asked through a queue: {message}.") from None


def body_request(endpoint: str, model: str, conn_id: str = OPENAI_CONNECTION) -> Request:
    """Return what is asked by bodies of one endpoint and model.

    The answer is a text, or what the API sends for any other endpoint, whole: how many vectors
    or results a body asks for is its own affair. Raises pydantic's `ValidationError` when model and
    endpoint do not fit.
    """
    output = None if endpoint_of(endpoint).answer is AnswerShape.TEXT else RAW
    return Request(conn_id=conn_id, endpoint=endpoint, model=model, output=output)

"""Whether what the product stands on is there: ledger, artifacts, API, databases.

A check changes nothing that lasts. It never raises for what it looks at: what is wrong becomes a
`Check` that says how to mend it. No check quotes a key or a row.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from include import cost, ledger_database
from include import ledger_tables as tables
from include.artifacts import Artifacts
from include.errors import ConfigurationError, LLMBatchError
from include.figures import counted
from include.ledger_records import now
from include.price_doubts import price_doubts

if TYPE_CHECKING:
    import openai

TIMEOUT = 20.0  # seconds that one call of the API may take
SKEW_WARNING = timedelta(minutes=1)
SKEW_LIMIT = timedelta(minutes=10)  # SubmissionPolicy.skew: how far back a lost batch is looked for
LITTLE_SPACE = 5 << 30  # bytes free on the disk of local artifacts


class Level(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"  #: works, but will hurt one day
    BAD = "BAD"  #: runs will fail


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what was found, and how to mend it."""

    name: str
    level: Level
    found: str
    mend: str = ""


def ledger_checks(engine: Engine) -> list[Check]:
    """Look whether the ledger answers, has this release's tables, and can be written."""
    where = engine.url.render_as_string(hide_password=True)
    try:
        with ledger_database.reading(ledger_database.prepare(engine)) as connection:
            version = ledger_database.version(connection)
        if version != ledger_database.HEAD:
            return [_of_version(where, version)]
        _write_and_undo(engine)
    except (LLMBatchError, sa.exc.SQLAlchemyError) as error:
        return [
            Check(
                "ledger",
                Level.BAD,
                f"{where}: {_first_line(error).removesuffix(ledger_database.RIGHTS).strip()}",
                ledger_database.RIGHTS
                if isinstance(error, ConfigurationError)
                else "Start the database, or correct connection llm_batch_db.",
            )
        ]
    return [Check("ledger", Level.OK, f"{where}, migration {version}")]


def _of_version(where: str, version: str | None) -> Check:
    head = ledger_database.HEAD
    if version is not None and version > head:
        return Check(
            "ledger",
            Level.BAD,
            f"{where} is at migration {version}, this release knows {head}",
            "A newer release has migrated it: deploy that release here too, or restore the backup "
            "from before the upgrade.",
        )
    return Check(
        "ledger",
        Level.BAD,
        f"{where} is not migrated: it is at {version or 'none'}, this release needs {head}",
        "Say `python -m llm_batch migrate`. (The first task of this release does it as well.)",
    )


def _write_and_undo(engine: Engine) -> None:
    with (
        ledger_database.translated(),
        engine.connect().execution_options(ledger_writes=True) as connection,
        connection.begin() as transaction,
    ):
        connection.execute(
            sa.insert(tables.event).values(run_id="doctor", at=now(), became="probe")
        )
        transaction.rollback()


def artifacts_checks(artifacts: Artifacts) -> list[Check]:
    """Write a small file, read it, delete it; look at the free space of a local disk."""
    where, probe = artifacts.uri(""), f"doctor-{uuid4().hex}.probe"
    try:
        with artifacts.create(probe) as stream:
            stream.write(b"probe")
        with artifacts.open(probe) as stream:
            stream.read()
    except Exception as error:  # noqa: BLE001  # every kind of storage has errors of its own
        return [
            Check(
                "artifacts",
                Level.BAD,
                f"{where} is not writable: {_first_line(error)}",
                "Correct [llm_batch] artifacts, or give the user that Airflow runs as the right "
                "to read, write and delete there (for s3:// and gs:// also check credentials).",
            )
        ]
    finally:
        with suppress(Exception):
            artifacts.delete(probe)
    return [_of_space(where, artifacts)]


def _of_space(where: str, artifacts: Artifacts) -> Check:
    free = _free_bytes(artifacts)
    if free is None:
        return Check("artifacts", Level.OK, f"{where} can be written")
    found = f"{where} can be written, {free / (1 << 30):.1f} GiB free"
    if free >= LITTLE_SPACE:
        return Check("artifacts", Level.OK, found)
    return Check(
        "artifacts",
        Level.WARNING,
        found,
        "A full disk stops every run: free some space, or let the DAG batch_housekeeping delete "
        "old artifacts.",
    )


def _free_bytes(artifacts: Artifacts) -> int | None:
    try:
        return shutil.disk_usage(artifacts.uri("")).free
    except OSError:
        return None  # not a local disk


def api_checks(
    client: openai.OpenAI, conn_id: str, *, clock: Callable[[], datetime] = now
) -> list[Check]:
    """Ask the API for its newest batch and file: does it answer, take the key, tell our time.

    Costs nothing. Whether the key may also create batches is not asked: that would create one.
    """
    import openai as sdk

    name, host = f"API of {conn_id}", str(client.base_url)
    quick = client.with_options(max_retries=0, timeout=TIMEOUT)
    try:
        answer = quick.batches.with_raw_response.list(limit=1)
        quick.files.list(limit=1)
    except sdk.APIStatusError as error:
        return [_refused(name, host, error)]
    except sdk.OpenAIError as error:
        cause = type(error.__cause__ or error).__name__
        return [
            Check(
                name,
                Level.BAD,
                f"{host} cannot be reached ({cause})",
                "Check the host of the connection, DNS, firewall and proxy from this machine; "
                "submitted batches go on meanwhile.",
            )
        ]
    return [
        Check(name, Level.OK, f"{host} answers and takes the key"),
        _of_clock(conn_id, answer.headers.get("date"), clock()),
    ]


def _refused(name: str, host: str, error: openai.APIStatusError) -> Check:
    status, code = error.status_code, error.code or error.type or "no code"
    found = f"{host}: HTTP {status}, {code}"
    if status == 401:
        return Check(
            name,
            Level.BAD,
            f"{found}: the key is wrong",
            "Put a valid key into the password of the connection; waiting tasks take it at their "
            "next poll.",
        )
    if status == 403:
        return Check(
            name,
            Level.BAD,
            f"{found}: the key may not do this",
            "Give the key the rights to read and write files and batches in its project.",
        )
    if status == 404:
        return Check(
            name,
            Level.BAD,
            f"{found}: there is no Files and Batches API",
            "The host of the connection ends in /v1 (or is empty, for OpenAI itself).",
        )
    level = Level.WARNING if status == 429 or status >= 500 else Level.BAD
    return Check(name, level, found, "Try again in a minute; see the provider's status page.")


def _of_clock(conn_id: str, date: str | None, here: datetime) -> Check:
    name = "clock"
    if date is None:
        return Check(name, Level.OK, f"{conn_id} does not say what time it is")
    skew = abs(here - parsedate_to_datetime(date).astimezone(UTC))
    found = f"differs by {skew.total_seconds():.0f} s from that of {conn_id}"
    if skew <= SKEW_WARNING:
        return Check(name, Level.OK, found)
    return Check(
        name,
        Level.BAD if skew >= SKEW_LIMIT else Level.WARNING,
        found,
        "Set this machine's clock (NTP). A batch whose answer was lost is looked for only back to "
        f"{SKEW_LIMIT.total_seconds() / 60:.0f} minutes before it was asked for.",
    )


def price_checks(models: Iterable[str], today: date) -> list[Check]:
    """Look whether each model has a price that somebody has compared not too long ago."""
    wanted = sorted(set(models))
    unknown = [f"{model} has no price: its costs are unknown." for model in wanted
               if cost.price(model) is None]  # fmt: skip
    doubts = [*unknown, *price_doubts(wanted, today)]
    if not doubts:
        return [Check("prices", Level.OK, f"{counted(len(wanted), 'model')}, compared lately")]
    mend = "Put what you find, with `as_of`, into a file that AIRFLOW__LLM_BATCH__PRICES names."
    return [Check("prices", Level.WARNING, " ".join(doubts), mend)]


def database_checks(engine: Engine, conn_id: str, *, is_target: bool) -> list[Check]:
    """Connect; for a target also look whether tables may be created (PostgreSQL)."""
    name, where = f"database {conn_id}", engine.url.render_as_string(hide_password=True)
    try:
        with engine.connect() as connection:
            may_create = _may_create(connection) if is_target else True
    except sa.exc.SQLAlchemyError as error:
        return [
            Check(
                name,
                Level.BAD,
                f"{where}: {_first_line(error)}",
                f"Start the database, or correct connection {conn_id}.",
            )
        ]
    if may_create:
        return [Check(name, Level.OK, f"{where} answers")]
    return [
        Check(
            name,
            Level.WARNING,
            f"{where}: this user may not create tables in its schema",
            "GRANT CREATE ON SCHEMA, or create both tables of the job yourself.",
        )
    ]


def _may_create(connection: sa.Connection) -> bool:
    if connection.dialect.name != "postgresql":
        return True
    query = "SELECT has_schema_privilege(current_schema(), 'CREATE')"
    return bool(connection.scalar(sa.text(query)))


def _first_line(error: Any) -> str:
    original = getattr(error, "orig", None) or error
    return next(iter(str(original).splitlines()), type(original).__name__)

"""A job: what is asked of which rows, and where the answers go.

A job is a folder with `job.yaml`, `rows.sql`, `prompt.md` (or `request.py`) and, for typed output,
`output.schema.json`. `load_job` reads the folder once and returns a frozen `JobSpec` that holds the
texts of these files, so a run that pinned it does not notice a later edit.

DAG files import this module: it needs pydantic, yaml and the standard library only.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from include.dataset_path import PARTITION_COLUMN, checked_path
from include.endpoints import ENDPOINTS, MAX_BYTES, MAX_REQUESTS, Endpoint, owned_params
from include.errors import ConfigurationError
from include.output_schema import output_columns
from include.prompt import Prompt, compile_prompt

JOBS_ROOT = Path(__file__).parent / "jobs"
JOB_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
FAILURES_SUFFIX = "_failures"
MAX_ROUNDS = 10
# A schema-qualified table is refused: set search_path on the connection instead.
_TABLE = re.compile(rf"[A-Za-z][A-Za-z0-9_]{{0,{62 - len(FAILURES_SUFFIX)}}}")
_CONNECTION = re.compile(r"[\w.\-]{1,200}", re.ASCII)
_TARGET_FORMS = ((True, True, False), (False, False, True))  # of conn_id, table, path


def _column_name(name: str) -> str:
    if name.startswith("_"):
        raise ValueError("columns that begin with _ are the product's own; rename it in the SQL")
    if not name or len(name) > 63:  # PostgreSQL cuts longer names silently
        raise ValueError("must have 1 to 63 characters")
    return name


def _table_name(name: str) -> str:
    if not _TABLE.fullmatch(name):
        raise ValueError(f"must match {_TABLE.pattern} (no schema prefix, no quotes)")
    return name


def _connection_id(name: str) -> str:
    if not _CONNECTION.fullmatch(name):
        raise ValueError("must be the id of an Airflow connection, such as results_db")
    return name


def _unless_empty(check: Callable[[str], str]) -> Callable[[str], str]:
    """Let the empty default through, which a pinned spec holds for the form that it has not."""
    return lambda text: check(text) if text else text


def _endpoint_url(url: str) -> str:
    if url not in ENDPOINTS:
        raise ValueError(f"unknown endpoint; allowed: {', '.join(ENDPOINTS)}")
    return url


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return text


def _as_tuple(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _as_decimal(value: Any) -> Any:
    """Take 0.1 as it is written, not as the nearest binary fraction."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        raise ValueError("must be a number")  # noqa: TRY004 (pydantic wants ValueError)
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        raise ValueError("must be a number") from None
    if not number.is_finite():
        raise ValueError("must be a finite number")
    return number


def _json_mapping(params: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(params, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError("must hold only what JSON can say (quote dates)") from None
    return params


ColumnName = Annotated[str, AfterValidator(_column_name)]
ConnectionId = Annotated[str, AfterValidator(_connection_id)]
NotBlank = Annotated[str, AfterValidator(_not_blank)]
Number = Annotated[Decimal, BeforeValidator(_as_decimal)]
Sample = Annotated[Number, Field(gt=0, le=1)]
WholeNumber = Annotated[int, Field(strict=True, ge=1)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(_Model):
    """Where rows come from; `sql` is the text of the file `sql_file`."""

    conn_id: ConnectionId
    sql: NotBlank
    sql_file: str = "rows.sql"
    key: Annotated[tuple[ColumnName, ...], BeforeValidator(_as_tuple), Field(min_length=1)]

    @model_validator(mode="after")
    def _key_columns_differ(self) -> Self:
        if len({name.lower() for name in self.key}) < len(self.key):
            raise ValueError("key names a column twice")
        return self


class Builder(_Model):
    """The job's `request.py`, pinned by the sha256 of its source."""

    file: str
    digest: str


class Request(_Model):
    """What is asked; `prompt` is the text of `prompt_file`, or None when `builder` is set."""

    conn_id: ConnectionId = "openai_default"
    endpoint: Annotated[str, AfterValidator(_endpoint_url)]
    model: NotBlank
    prompt: NotBlank | None = None
    prompt_file: str = "prompt.md"
    builder: Builder | None = None
    output_schema: dict[str, Any] | None = None
    params: Annotated[dict[str, Any], AfterValidator(_json_mapping)] = Field(default_factory=dict)

    @property
    def api(self) -> Endpoint:
        """Return the facts about the endpoint."""
        return ENDPOINTS[self.endpoint]

    @model_validator(mode="after")
    def _suits_endpoint(self) -> Self:
        owned = owned_params(self.api, self.params)
        if owned:
            raise ValueError(f"params must not set {', '.join(owned)}: the product sets it")
        if self.output_schema is not None and self.api.schema_field is None:
            raise ValueError(f"{self.endpoint} takes no output_schema; remove the key")
        return self


class Target(_Model):
    """Where results go: a table on a connection, or a Parquet dataset at `path`.

    Failed rows go to `failures_table` beside the table, or into the dataset's folder `failures`.
    """

    conn_id: Annotated[str, AfterValidator(_unless_empty(_connection_id))] = ""
    table: Annotated[str, AfterValidator(_unless_empty(_table_name))] = ""
    path: Annotated[str, AfterValidator(_unless_empty(checked_path))] = ""

    @model_validator(mode="after")
    def _has_one_form(self) -> Self:
        if (bool(self.conn_id), bool(self.table), bool(self.path)) not in _TARGET_FORMS:
            raise ValueError(
                "expected conn_id and table (a database), or path alone (a Parquet dataset)"
            )
        return self

    @property
    def failures_table(self) -> str:
        """Return the name of the table of rows that failed for good."""
        return self.table + FAILURES_SUFFIX

    @property
    def results_place(self) -> str:
        """Return where results are, for people: a table or a folder."""
        return f"{self.path}/results" if self.path else self.table

    @property
    def failures_place(self) -> str:
        """Return where failed rows are, for people: a table or a folder."""
        return f"{self.path}/failures" if self.path else self.failures_table


class Limits(_Model):
    """The size of one batch. The upper bounds are the API's own (API reference, Create batch)."""

    requests_per_batch: Annotated[WholeNumber, Field(le=MAX_REQUESTS)] = MAX_REQUESTS
    bytes_per_batch: Annotated[WholeNumber, Field(le=MAX_BYTES)] = MAX_BYTES
    enqueued_tokens: WholeNumber | None = None


class Retry(_Model):
    """How many passes the rows that may be tried again get, the first one included."""

    rounds: Annotated[WholeNumber, Field(le=MAX_ROUNDS)] = 3


class Budget(_Model):
    """The most that one run may be estimated to cost, in US dollars; None is no bound."""

    max_usd: Annotated[Number, Field(ge=0)] | None = None


class Alert(_Model):
    """The share of failed rows (0 to 1) above which a run fails after it has loaded the rest.

    On small days one row is a large share: fewer than `min_failed` rows never fail the run.
    """

    failure_rate: Annotated[Number, Field(ge=0, le=1)] | None = None
    min_failed: WholeNumber = 1


class JobSpec(_Model):
    """One job, whole: safe to pin as JSON and to read back in a later release."""

    name: str
    description: str = ""
    source: Source
    request: Request
    target: Target
    limits: Limits = Limits()
    retry: Retry = Retry()
    budget: Budget = Budget()
    alert: Alert = Alert()
    sample: Sample = Decimal(1)

    @model_validator(mode="after")
    def _columns_do_not_collide(self) -> Self:
        output = {name.lower() for name in output_columns(self.request.output_schema)}
        both = [name for name in self.source.key if name.lower() in output]
        if both:
            raise ValueError(
                f"{', '.join(both)} would be a key column and an output column of "
                f"{self.target.results_place}; rename one of them in the SQL or in the output "
                "schema"
            )
        if self.target.path and PARTITION_COLUMN in output.union(map(str.lower, self.source.key)):
            raise ValueError(
                f"a column named {PARTITION_COLUMN} would hide the folders of {self.target.path}; "
                "rename it in the SQL or in the output schema"
            )
        return self

    @property
    def digest(self) -> str:
        """Return the sha256 (64 hex) of everything that shapes requests or results.

        Limits, rounds, budget, alert and description are left out: to change them must not make
        an open run send its rows once more.
        """
        shape = {
            "source": self.source.model_dump(include={"conn_id", "sql", "key"}),
            "request": self.request.model_dump(exclude={"prompt_file"}),
            "target": self.target.model_dump(exclude_defaults=True),
            "sample": f"{self.sample.normalize():f}",
        }
        canonical = json.dumps(shape, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def compiled_prompt(self) -> Prompt:
        """Return the compiled prompt of a job that has one (no `request.py`)."""
        if self.request.prompt is None:
            raise ValueError(f"job {self.name} builds its requests by {self.request.builder}")
        return compile_prompt(self.request.prompt)

    def to_json(self) -> str:
        """Return the spec as JSON text; `from_json` gives an equal spec."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        return cls.model_validate_json(text)


def load_job(name: str, root: Path = JOBS_ROOT) -> JobSpec:
    """Read and check the job folder `root/name`.

    Raises `JobSpecError` that lists every problem with file, line and key.
    """
    from include.job_folder import read_job  # it needs the models above

    return read_job(name, root)


def with_overrides(
    spec: JobSpec, *, model: str | None = None, sample: Decimal | float | str | None = None
) -> JobSpec:
    """Return `spec` with the model or the sample (a fraction of the rows) of one run.

    None and empty text leave the job's own value. Raises `ConfigurationError` for a sample that
    is not above 0 and at most 1.
    """
    if model is not None and model.strip():
        spec = spec.model_copy(
            update={"request": spec.request.model_copy(update={"model": model.strip()})}
        )
    if sample is None or sample == "":
        return spec
    return spec.model_copy(update={"sample": _checked_sample(spec.name, sample)})


def _checked_sample(job: str, sample: Decimal | float | str) -> Decimal:
    try:
        fraction: Decimal = _as_decimal(sample)
    except ValueError:
        fraction = Decimal(0)
    if not 0 < fraction <= 1:
        raise ConfigurationError(
            f"{job}: param sample must be above 0 and at most 1, such as 0.05; "
            f"found {str(sample)[:40]!r}"
        )
    return fraction


def check_columns(spec: JobSpec, columns: Iterable[str]) -> None:
    """Check the columns that rows.sql really returns against key and placeholders.

    Raises `ConfigurationError` that lists everything missing, repeated or not allowed, with the
    available columns.
    """
    available = list(columns)
    problems = [*_column_problems(spec, available), *_placeholder_problems(spec, available)]
    if problems:
        raise ConfigurationError(
            f"{spec.name}: {'; '.join(problems)}. Columns of {spec.source.sql_file}: "
            f"{', '.join(available) or 'none'}."
        )


def _column_problems(spec: JobSpec, available: list[str]) -> list[str]:
    file = spec.source.sql_file
    problems = [
        f"job.yaml: source.key names `{name}`, which {file} does not return"
        for name in spec.source.key
        if name not in available
    ]
    for name in sorted(set(available)):
        if available.count(name) > 1:
            problems.append(f"{file} returns the column `{name}` twice; give one another name")
        if name.startswith("_"):
            problems.append(f"{file} returns `{name}`; names that begin with _ are the product's")
    return problems


def _placeholder_problems(spec: JobSpec, available: list[str]) -> list[str]:
    if spec.request.prompt is None:
        return []
    return [
        f"{spec.request.prompt_file}:{hole.line}: {{{{ {hole.column} }}}} is no column of "
        f"{spec.source.sql_file}"
        for hole in spec.compiled_prompt.placeholders
        if hole.column not in available
    ]

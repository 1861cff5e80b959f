"""A job: what is asked of which rows, and where the answers go.

A job is a folder with `job.yaml`, `rows.sql` (or `rows.py`, or a path to files), `prompt.md` (or
`request.py`) and, for typed output, `output.schema.json`. `load_job` reads the folder once and
returns a frozen `JobSpec` that holds the texts of these files, so a run that pinned it does not
notice a later edit.

DAG files import this module: it needs pydantic, yaml and the standard library only.
"""

from __future__ import annotations

import hashlib
import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from include.dataset_path import PARTITION_COLUMN, checked_path
from include.endpoints import ENDPOINTS, Endpoint, endpoint_of, owned_params
from include.errors import ConfigurationError
from include.output_columns import AnswerShape, request_columns
from include.prompt import Prompt, compile_prompt
from include.provider import ProviderProfile
from include.request_fit import misfits, vector_length
from include.run_policy import Alert, Budget, Canary, Limits, Retry, Reuse
from include.source_path import FORMATS, checked_source_path, format_of
from include.spec_values import (
    ColumnNames,
    ConnectionId,
    NotBlank,
    Sample,
    SpecModel,
    WholeNumber,
    as_decimal,
    connection_id,
    json_mapping,
    not_blank,
    unless_empty,
)

JOBS_ROOT = Path(__file__).parent / "jobs"
JOB_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
FAILURES_SUFFIX = "_failures"
RAW = AnswerShape.RAW.value  # as request.output
# A schema-qualified table is refused: set search_path on the connection instead.
_TABLE = re.compile(rf"[A-Za-z][A-Za-z0-9_]{{0,{62 - len(FAILURES_SUFFIX)}}}")
_ENDPOINT = re.compile(r"/v1/[a-z][a-z0-9/_\-]{0,100}")
_TARGET_FORMS = ((True, True, False), (False, False, True))  # of conn_id, table, path


def _table_name(name: str) -> str:
    if not _TABLE.fullmatch(name):
        raise ValueError(f"must match {_TABLE.pattern} (no schema prefix, no quotes)")
    return name


def _endpoint_url(url: str, info: ValidationInfo) -> str:
    """Let another endpoint through for raw bodies; `output` stands before it in the model."""
    if url in ENDPOINTS or (info.data.get("output") == RAW and _ENDPOINT.fullmatch(url)):
        return url
    raise ValueError(
        f"unknown endpoint; allowed: {', '.join(ENDPOINTS)} (and others with `output: raw`)"
    )


class Builder(SpecModel):
    """A Python file of the job, `request.py` or `rows.py`, pinned by the sha256 of its source."""

    file: str
    digest: str


class Source(SpecModel):
    """Where rows come from: SQL on a connection, files at `path`, or the Python file `rows`.

    `sql` is the text of the file `sql_file`. With `path`, `conn_id` gives the credentials.
    """

    conn_id: Annotated[str, AfterValidator(unless_empty(connection_id))] = ""
    sql: Annotated[str, AfterValidator(unless_empty(not_blank))] = ""
    sql_file: str = "rows.sql"
    path: Annotated[str, AfterValidator(unless_empty(checked_source_path))] = ""
    format: Literal["", "parquet", "csv", "jsonl"] = ""
    missing: Literal["error", "empty"] = "error"
    rows: Builder | None = None
    key: Annotated[ColumnNames, Field(min_length=1)]

    @model_validator(mode="after")
    def _key_columns_differ(self) -> Self:
        if len({name.lower() for name in self.key}) < len(self.key):
            raise ValueError("key names a column twice")
        return self

    @model_validator(mode="after")
    def _has_one_form(self) -> Self:
        if [bool(self.sql), bool(self.path), self.rows is not None].count(True) != 1:
            raise ValueError("expected one of sql (with conn_id), path and rows")
        if self.sql and not self.conn_id:
            raise ValueError("conn_id is missing: the connection on which sql runs")
        if self.rows is not None and self.conn_id:
            raise ValueError("rows takes no conn_id: the Python file opens what it reads")
        if not self.path and (self.format or self.missing != "error"):
            raise ValueError("format and missing are for a path only")
        if self.path and not (self.format or format_of(self.path)):
            raise ValueError(
                f"format is missing: the name of the files tells none of {', '.join(FORMATS)}"
            )
        return self

    @property
    def origin(self) -> str:
        """Return where rows come from, for people: a file of the job, or a path."""
        if self.rows is not None:
            return self.rows.file
        return self.path or self.sql_file

    @property
    def file_format(self) -> str:
        """Return the format of the files at `path`."""
        return self.format or format_of(self.path) or ""

    @property
    def uri(self) -> str:
        """Return `path` with the connection that its credentials come from."""
        scheme, found, place = self.path.partition("://")
        is_named = not (self.conn_id and found) or "@" in place.partition("/")[0]
        return self.path if is_named else f"{scheme}://{self.conn_id}@{place}"

    @property
    def shape(self) -> dict[str, Any]:
        """Return what shapes requests: a new form of source must not change an old one's digest."""
        if self.sql:
            return self.model_dump(include={"conn_id", "sql", "key"})
        return self.model_dump(exclude={"sql_file", "missing"}, exclude_defaults=True)


class Request(SpecModel):
    """What is asked; `prompt` is the text of `prompt_file`, or None when `builder` is set.

    `output` is what job.yaml says: `raw`, or the class whose schema `output_schema` holds.
    """

    conn_id: ConnectionId = "openai_default"
    output: NotBlank | None = None
    endpoint: Annotated[str, AfterValidator(_endpoint_url)]
    model: NotBlank
    prompt: NotBlank | None = None
    prompt_file: str = "prompt.md"
    builder: Builder | None = None
    images: ColumnNames = ()
    output_schema: dict[str, Any] | None = None
    strict: Annotated[bool, Field(strict=True)] = True
    vector_size: WholeNumber | None = None
    params: Annotated[dict[str, Any], AfterValidator(json_mapping)] = Field(default_factory=dict)
    priced_as: NotBlank | None = None

    @property
    def priced_model(self) -> str:
        """Return the model whose price counts: a deployment's name has none."""
        return self.priced_as or self.model

    @property
    def api(self) -> Endpoint:
        """Return the facts about the endpoint."""
        return endpoint_of(self.endpoint)

    @property
    def shape(self) -> AnswerShape:
        """Return what the answers are made of."""
        return AnswerShape.RAW if self.output == RAW else self.api.answer

    @property
    def answer_endpoint(self) -> str:
        """Return the endpoint whose answers are read; none of them for raw bodies."""
        return RAW if self.shape is AnswerShape.RAW else self.endpoint

    @property
    def vector_length(self) -> int | None:
        """Return how many numbers a vector has; None when nothing says so."""
        return self.vector_size or vector_length(self.priced_model, self.params)

    @property
    def sent_params(self) -> dict[str, Any]:
        """Return the params with those that the product adds unless the job sets them.

        A vector in base64 has a quarter of the bytes, and needs no parsing of numbers.
        """
        if self.shape is not AnswerShape.VECTOR:
            return self.params
        return {"encoding_format": "base64", **self.params}

    @model_validator(mode="after")
    def _suits_endpoint(self) -> Self:
        owned = owned_params(self.api, self.params)
        if owned:
            raise ValueError(f"params must not set {', '.join(owned)}: the product sets it")
        if self.output_schema is not None and self.api.schema_field is None:
            raise ValueError(f"{self.endpoint} takes no output_schema; remove the key")
        if self.endpoint not in ENDPOINTS and self.prompt is not None:
            raise ValueError(f"{self.endpoint} needs a request.py: which field takes the prompt?")
        problems = misfits(self)
        if problems:
            raise ValueError("; ".join(problems))
        return self


class Target(SpecModel):
    """Where results go: a table on a connection, or a Parquet dataset at `path`.

    Failed rows go to `failures_table` beside the table, or into the dataset's folder `failures`.
    """

    conn_id: Annotated[str, AfterValidator(unless_empty(connection_id))] = ""
    table: Annotated[str, AfterValidator(unless_empty(_table_name))] = ""
    path: Annotated[str, AfterValidator(unless_empty(checked_path))] = ""

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


class QueueGroup(SpecModel):
    """What makes a run one over requests of the queue: their job, "" for ready bodies."""

    job: str = ""


class JobSpec(SpecModel):
    """One job, whole: safe to pin as JSON and to read back in a later release."""

    name: str
    description: str = ""
    source: Source
    request: Request
    target: Target
    limits: Limits = Limits()
    retry: Retry = Retry()
    reuse: Reuse = Reuse()
    canary: Canary = Canary()
    budget: Budget = Budget()
    alert: Alert = Alert()
    sample: Sample = Decimal(1)
    queue: QueueGroup | None = None

    @model_validator(mode="after")
    def _columns_do_not_collide(self) -> Self:
        output = {column.name.lower() for column in request_columns(self.request)}
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

        Limits, rounds, reuse, canary, budget, alert, price and description are left out: to
        change them must not make an open run send its rows once more.
        """
        shape = {
            "source": self.source.shape,
            "request": self._request_shape(),
            "target": self.target.model_dump(exclude_defaults=True),
            "sample": f"{self.sample.normalize():f}",
        }
        if self.queue is not None:
            shape["queue"] = self.queue.model_dump()
        canonical = json.dumps(shape, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def _request_shape(self) -> dict[str, Any]:
        """Return what shapes requests; keys of later releases only where a job sets them."""
        later = {"images", "output", "strict", "vector_size"}
        shape = self.request.model_dump(exclude={"prompt_file", "priced_as", *later})
        added = self.request.model_dump(include=later, exclude_defaults=True)
        if self.request.output != RAW:
            added.pop("output", None)  # the schema says it
        return shape | added

    @property
    def question(self) -> dict[str, Any]:
        """Return what makes the `custom_id` of a row: two specs that agree in it ask the same."""
        shape = self._request_shape()
        shape.pop("conn_id")
        return {"request": shape, "key": self.source.key}

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
    is not above 0 and at most 1, and for a model that does not fit the job's endpoint or vectors.
    """
    if model is not None and model.strip() not in {"", spec.request.model}:
        spec = spec.model_copy(update={"request": _with_model(spec, model.strip())})
    if sample is None or sample == "":
        return spec
    return spec.model_copy(update={"sample": _checked_sample(spec.name, sample)})


def with_provider(spec: JobSpec, profile: ProviderProfile) -> JobSpec:
    """Return `spec` with the model that its provider's connection names for the price."""
    priced = spec.request.priced_as or profile.priced_model(spec.request.model)
    if priced == spec.request.priced_model:
        return spec
    request = spec.request.model_copy(update={"priced_as": priced})
    return spec.model_copy(update={"request": request})


def _with_model(spec: JobSpec, model: str) -> Request:
    # The job's own price is that of the job's own model.
    request = spec.request.model_copy(update={"model": model, "priced_as": None})
    problems = misfits(request)
    if request.vector_length != spec.request.vector_length:
        problems.append(
            f"its vectors have {request.vector_length} numbers, those of the job "
            f"{spec.request.vector_length}"
        )
    if problems:
        raise ConfigurationError(f"{spec.name}: param model: {model}: {'; '.join(problems)}")
    return request


def _checked_sample(job: str, sample: Decimal | float | str) -> Decimal:
    try:
        fraction: Decimal = as_decimal(sample)
    except ValueError:
        fraction = Decimal(0)
    if not 0 < fraction <= 1:
        raise ConfigurationError(
            f"{job}: param sample must be above 0 and at most 1, such as 0.05; "
            f"found {str(sample)[:40]!r}"
        )
    return fraction

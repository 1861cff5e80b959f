"""A job folder is read once, checked whole, and pinned."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest

from include.errors import ConfigurationError, JobSpecError
from include.job_spec import JOBS_ROOT, JobSpec, load_job, with_overrides
from include.queue_spec import is_queue
from include.source_columns import check_columns

JOB_YAML = """\
source: {conn_id: source_db, sql: rows.sql, key: [id]}
request:
  endpoint: /v1/responses
  model: gpt-5-mini
  prompt: prompt.md
  output_schema: output.schema.json
target: {conn_id: results_db, table: labels}
"""
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"type": "string"}},
    "required": ["kind"],
    "additionalProperties": False,
}
FILES = {
    "job.yaml": JOB_YAML,
    "rows.sql": "SELECT id, body FROM t WHERE at >= :interval_start AND at < :interval_end",
    "prompt.md": "Say what this is.\n---\n{{ body }}\n",
    "output.schema.json": json.dumps(SCHEMA),
}
MakeJob = Callable[..., Path]


@pytest.fixture
def make_job(tmp_path: Path) -> MakeJob:
    """Write the job `sample` with some files replaced, or left out when None; return the root."""

    def make(**changed: str | None) -> Path:
        folder = tmp_path / "sample"
        folder.mkdir(exist_ok=True)
        names = {name.replace(".", "_"): name for name in (*FILES, "request.py")}
        texts = {**FILES, **{names[key]: text for key, text in changed.items()}}
        for name, text in texts.items():
            if text is not None:
                (folder / name).write_text(text, encoding="utf-8")
        return tmp_path

    return make


def message_of(root: Path) -> str:
    """Return what `load_job` says of the job `sample`."""
    with pytest.raises(JobSpecError) as caught:
        load_job("sample", root)
    return str(caught.value)


@pytest.mark.parametrize(
    "name", sorted(path.name for path in JOBS_ROOT.iterdir() if not is_queue(path))
)
def test_jobs_of_the_project_load(name: str) -> None:
    """The jobs that come with the project are valid."""
    spec = load_job(name)

    assert spec.name == name
    assert spec.target.failures_table == f"{spec.target.table}_failures"


def test_defaults(make_job: MakeJob) -> None:
    """What a short job.yaml leaves out has the documented default."""
    spec = load_job("sample", make_job())

    assert spec.limits.requests_per_batch == 50_000
    assert spec.limits.bytes_per_batch == 200_000_000
    assert spec.retry.rounds == 3
    assert spec.request.conn_id == "openai_default"
    assert spec.sample == 1


def test_json_round_trip(make_job: MakeJob) -> None:
    """The ledger pins the spec as JSON and reads back an equal one."""
    spec = with_overrides(load_job("sample", make_job()), sample="0.1")

    again = JobSpec.from_json(spec.to_json())

    assert again == spec
    assert again.digest == spec.digest


def replaced(old: str, new: str) -> dict[str, str]:
    """Return the usual job.yaml with one change."""
    assert old in JOB_YAML
    return {"job_yaml": JOB_YAML.replace(old, new)}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (replaced("output_s", "outptu_s"), ["job.yaml:6:", "request.outptu_schema", "`output_s"]),
        (replaced("  model: gpt-5-mini\n", ""), ["job.yaml:2:", "request.model: is missing"]),
        (replaced("model: gpt-5-mini", "model: 5"), ["job.yaml:4:", "must be text; found 5"]),
        (replaced("/v1/responses", "/v1/respond"), ["job.yaml:3:", "/v1/chat/completions"]),
        (replaced("table: labels", 'table: "a b"'), ["job.yaml:7:", "target.table", "'a b'"]),
        (replaced("key: [id]", "key: [_id]"), ["job.yaml:1:", "begin with _"]),
        (replaced("key: [id]", "key: []"), ["job.yaml:1:", "source.key"]),
        (replaced("key: [id]", "key: [id, ID]"), ["job.yaml:1:", "twice"]),
        (replaced("key: [id]", "key: [Kind]"), ["Kind", "key column and an output column"]),
        (replaced("rows.sql", "other.sql"), ["job.yaml:1:", "no file other.sql"]),
        (replaced("rows.sql", "../rows.sql"), ["job.yaml:1:", "must be the name of a file"]),
        ({"job_yaml": JOB_YAML + "retry: {rounds: 11}\n"}, ["job.yaml:8:", "found 11"]),
        ({"job_yaml": JOB_YAML + "retry: {rounds: 0}\n"}, ["job.yaml:8:", "found 0"]),
        ({"job_yaml": JOB_YAML + "retry: {rounds: true}\n"}, ["job.yaml:8:", "whole number"]),
        ({"job_yaml": JOB_YAML + "limits: {requests_per_batch: 50001}\n"}, ["50000"]),
        ({"job_yaml": JOB_YAML + "limits: {bytes_per_batch: 200000001}\n"}, ["200000000"]),
        ({"job_yaml": JOB_YAML + "budget: {max_usd: lots}\n"}, ["job.yaml:8:", "a number"]),
        ({"job_yaml": JOB_YAML + "alert: {failure_rate: 2}\n"}, ["job.yaml:8:", "found 2"]),
        ({"job_yaml": JOB_YAML + "sample: 0\n"}, ["job.yaml:8:", "greater than 0"]),
        ({"job_yaml": JOB_YAML + "sample: 1\nsample: 1\n"}, ["job.yaml:9:", "first in line 8"]),
        ({"job_yaml": JOB_YAML + "name: x\n"}, ["job.yaml:8:", "unknown key"]),
        ({"job_yaml": "source: [\n"}, ["job.yaml:2:", "not valid YAML"]),
        ({"job_yaml": "- a\n"}, ["job.yaml:1:", "must be a mapping"]),
        ({"job_yaml": " \n"}, ["job.yaml: is empty"]),
        ({"job_yaml": None}, ["no file job.yaml"]),
        ({"rows_sql": "\n"}, ["rows.sql: is empty"]),
        ({"rows_sql": "SELECT id\nFROM t\nWHERE at > :start"}, ["rows.sql:3:", ":start"]),
        ({"prompt_md": "Hello"}, ["prompt.md:1:", "no placeholder"]),
        ({"prompt_md": "a\n{{ body | upper }}"}, ["prompt.md:2:", "without filters"]),
        ({"prompt_md": None}, ["job.yaml:5:", "no file prompt.md"]),
        ({"output_schema_json": "{"}, ["output.schema.json:1:", "not valid JSON"]),
        ({"output_schema_json": '{"type": "array"}'}, ["output.schema.json", "an object"]),
        ({"request_py": "def build(row): return {}"}, ["job.yaml:5:", "keep one"]),
    ],
)
def test_mistakes_are_named(
    make_job: MakeJob, changed: dict[str, str | None], expected: list[str]
) -> None:
    """Every mistake names file, line and key, and what is allowed."""
    message = message_of(make_job(**changed))

    assert message.startswith("Job sample: a problem in ")
    for part in expected:
        assert part in message


def test_several_problems_come_together(make_job: MakeJob) -> None:
    """All problems of a folder are in one error."""
    changed = replaced("model: gpt-5-mini", "model: ''")

    message = message_of(make_job(**changed, rows_sql="", prompt_md="Hello"))

    assert "3 problems" in message


@pytest.mark.parametrize(
    ("endpoint", "params", "named"),
    [
        ("/v1/responses", "{model: x}", "model"),
        ("/v1/responses", "{input: x}", "input"),
        ("/v1/responses", "{text: {format: {type: text}}}", "text.format"),
        ("/v1/chat/completions", "{messages: []}", "messages"),
        ("/v1/chat/completions", "{response_format: {}}", "response_format"),
        ("/v1/chat/completions", "{stream: true}", "stream"),
    ],
)
def test_params_of_the_product(make_job: MakeJob, endpoint: str, params: str, named: str) -> None:
    """A job cannot set what the product sets itself."""
    changed = replaced("/v1/responses", f"{endpoint}\n  params: {params}")

    assert f"must not set {named}" in message_of(make_job(**changed))


def test_embeddings_take_neither_schema_nor_system_part(make_job: MakeJob) -> None:
    """What an endpoint cannot do is an error of the job, not of each request."""
    message = message_of(make_job(**replaced("/v1/responses", "/v1/embeddings")))

    assert "takes no output_schema" in message
    assert "prompt.md: has a system part" in message


def test_long_values_are_not_repeated(make_job: MakeJob) -> None:
    """A message never carries a long text."""
    secret = "canary " * 20
    message = message_of(make_job(**replaced("table: labels", f"table: {secret}")))

    assert "canary" not in message
    assert "found a str" in message


def test_builder_instead_of_prompt(make_job: MakeJob) -> None:
    """`request.py` is pinned by its source and not run when the job is loaded."""
    changed = replaced("  prompt: prompt.md\n", "")
    root = make_job(**changed, request_py="def build(row):\n    return {}\n1 / 0\n")

    spec = load_job("sample", root)
    (root / "sample" / "request.py").write_text("def build(row):\n    return {'a': 1}\n")

    assert spec.request.builder is not None
    assert load_job("sample", root).digest != spec.digest


@pytest.mark.parametrize(
    ("source", "expected"),
    [("def build(row:\n", "request.py:1: is not valid Python"), ("x = 1\n", "must define")],
)
def test_unusable_builder(make_job: MakeJob, source: str, expected: str) -> None:
    """A `request.py` that cannot work is refused when the job is loaded."""
    changed = replaced("  prompt: prompt.md\n", "")

    assert expected in message_of(make_job(**changed, request_py=source))


def test_unknown_job_names_the_nearest(make_job: MakeJob) -> None:
    """A job that is not there is answered with those that are."""
    with pytest.raises(JobSpecError, match="Did you mean 'sample'"):
        load_job("sampel", make_job())
    with pytest.raises(JobSpecError, match="must match"):
        load_job("../sample", make_job())


def test_digest_holds_what_shapes_results(make_job: MakeJob) -> None:
    """Model, prompt and sample change the digest; limits, budget and comments do not."""
    spec = load_job("sample", make_job())
    more = "limits: {requests_per_batch: 7}\nbudget: {max_usd: 1}\ndescription: x\n# comment\n"

    assert load_job("sample", make_job(job_yaml=JOB_YAML + more)).digest == spec.digest
    assert with_overrides(spec, model="other").digest != spec.digest
    assert with_overrides(spec, sample="0.5").digest != spec.digest
    assert load_job("sample", make_job(prompt_md="{{ body }}")).digest != spec.digest


def test_overrides(make_job: MakeJob) -> None:
    """A run may have its own model and sample; empty means the job's own."""
    spec = load_job("sample", make_job())

    changed = with_overrides(spec, model="gpt-5.2", sample=0.1)

    assert (changed.request.model, changed.sample) == ("gpt-5.2", Decimal("0.1"))
    assert with_overrides(spec, model="", sample=None) == spec


@pytest.mark.parametrize("sample", [0, -1, 1.1, "all", "nan", True])
def test_wrong_sample(make_job: MakeJob, sample: float | str) -> None:
    """A sample is a fraction of the rows."""
    with pytest.raises(ConfigurationError, match="above 0 and at most 1"):
        with_overrides(load_job("sample", make_job()), sample=sample)


def test_columns_are_checked_against_key_and_placeholders(make_job: MakeJob) -> None:
    """The first thing that knows the columns names every placeholder and key that is none."""
    spec = load_job("sample", make_job())

    check_columns(spec, ["id", "body", "more"])
    with pytest.raises(ConfigurationError) as caught:
        check_columns(spec, ["text", "text", "_row"])

    for part in ("source.key names `id`", "prompt.md:3: {{ body }}", "`text` twice", "`_row`"):
        assert part in str(caught.value)


def test_import_is_light() -> None:
    """A DAG file that loads a job pulls in nothing heavy."""
    code = (
        "import sys; from include.job_spec import load_job; load_job('ticket_triage');"
        "heavy = {'pandas', 'pyarrow', 'numpy', 'openai', 'sqlalchemy', 'airflow', 'jsonschema'};"
        "sys.exit(','.join(heavy & set(sys.modules)) or 0)"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=JOBS_ROOT.parents[1], capture_output=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, b"")

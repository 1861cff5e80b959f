"""Structured output: a schema file or a Pydantic model, strict unless the job says otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from include.errors import JobSpecError
from include.job_spec import JobSpec, load_job
from include.output_columns import Kind, OutputColumn, request_columns
from include.request_body import PromptBodies
from include.strict_schema import strict_problems

JOB_YAML = """\
source: {conn_id: source_db, sql: rows.sql, key: [id]}
request:
  endpoint: /v1/responses
  model: gpt-5-mini
  prompt: prompt.md
  output_schema: output.schema.json
target: {conn_id: results_db, table: labels}
"""
CLASS_YAML = JOB_YAML.replace("output_schema: output.schema.json", "output: output.py:Triage")
LOOSE = {
    "type": "object",
    "properties": {"kind": {"type": "string"}, "note": {"type": "string", "default": ""}},
    "required": ["kind"],
}
OUTPUT = '''\
"""What is asked of a ticket."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, Field


class Category(StrEnum):
    bug = "bug"
    other = "other"


class Part(BaseModel):
    name: str
    default: int = 3


class Triage(BaseModel):
    category: Category = Field(description="The best one.")
    urgency: Literal["low", "high"]
    score: float = Field(ge=-1, le=1)
    needs_human: bool = False
    summary: str | None = None
    parts: list[Part] = []
'''


def write(root: Path, **files: str) -> Path:
    """Write the job `sample`; return the root."""
    folder = root / "sample"
    folder.mkdir(exist_ok=True)
    texts = {
        "job.yaml": JOB_YAML,
        "rows.sql": "SELECT id, body FROM t",
        "prompt.md": "{{ body }}",
        **files,
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    return root


def problem(root: Path) -> str:
    """Return what `load_job` says of the job."""
    with pytest.raises(JobSpecError) as caught:
        load_job("sample", root)
    return str(caught.value)


def sent_format(spec: JobSpec) -> dict[str, Any]:
    """Return the schema format in the request bodies of a job."""
    bodies = PromptBodies(spec)
    found: dict[str, Any] = json.loads(bodies.prefix + b"x" + bodies.suffix)["text"]["format"]
    return found


def test_a_class_is_pinned_as_its_schema(tmp_path: Path) -> None:
    """The model becomes typed columns and a strict schema; nobody needs the class again."""
    spec = load_job("sample", write(tmp_path, **{"job.yaml": CLASS_YAML, "output.py": OUTPUT}))
    (tmp_path / "sample" / "output.py").unlink()

    pinned = JobSpec.from_json(spec.to_json())

    assert request_columns(pinned.request) == (
        OutputColumn("category", Kind.TEXT),
        OutputColumn("urgency", Kind.TEXT),
        OutputColumn("score", Kind.REAL),
        OutputColumn("needs_human", Kind.BOOLEAN),
        OutputColumn("summary", Kind.TEXT),
        OutputColumn("parts", Kind.JSON),
    )
    found = sent_format(pinned)
    assert found["strict"] is True
    assert found["schema"]["required"] == list(found["schema"]["properties"])
    assert set(found["schema"]["$defs"]["Part"]["properties"]) == {"name", "default"}


def test_the_name_of_the_class_changes_nothing(tmp_path: Path) -> None:
    """What counts is the schema: a job that renames its class joins the run that is open."""
    first = load_job("sample", write(tmp_path, **{"job.yaml": CLASS_YAML, "output.py": OUTPUT}))
    moved = {"job.yaml": CLASS_YAML.replace("output.py", "answer.py"), "answer.py": OUTPUT}

    assert load_job("sample", write(tmp_path, **moved)).digest == first.digest


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"output.py": "class Triage: pass\n"}, "output.py: has no Pydantic model Triage"),
        ({"output.py": "x = 1\nclass\n"}, "output.py:2: is not valid Python"),
        ({"output.py": "import no_such_module\n"}, "output.py: cannot be imported: ModuleNotFound"),
        ({}, "job.yaml:6: there is no file output.py"),
        (
            {"job.yaml": CLASS_YAML.replace("output.py:Triage", "Triage")},
            "job.yaml:6: request.output: must be `raw`, or file and class",
        ),
        (
            {
                "job.yaml": CLASS_YAML.replace(
                    "target:", "  output_schema: output.schema.json\ntarget:"
                ),
                "output.schema.json": json.dumps(LOOSE),
            },
            "request.output: output_schema is there as well",
        ),
        (
            {
                "output.py": "from pydantic import BaseModel\n"
                "class Triage(BaseModel):\n    names: dict[str, int]\n"
            },
            "at #/properties/names: an object must have additionalProperties: false (strict mode)",
        ),
    ],
)
def test_mistakes_with_a_class_are_named(
    tmp_path: Path, files: dict[str, str], expected: str
) -> None:
    """Whatever is wrong, the message has file and rule."""
    assert expected in problem(write(tmp_path, **{"job.yaml": CLASS_YAML, **files}))


def test_a_schema_that_strict_mode_refuses_is_an_error(tmp_path: Path) -> None:
    """Line of the key, path inside the schema, the rule, and the way out."""
    message = problem(write(tmp_path, **{"output.schema.json": json.dumps(LOOSE)}))

    assert "job.yaml:6: request.output_schema: output.schema.json, at #: an object must" in message
    assert "required must list every property; note is missing" in message
    assert "at #/properties/note: default is not supported" in message
    assert "set `strict: false`" in message


def test_strict_false_is_the_choice_of_the_job(tmp_path: Path) -> None:
    """Then the schema is sent without `strict`, and answers are checked here alone."""
    yaml = JOB_YAML.replace("target:", "  strict: false\ntarget:")

    spec = load_job(
        "sample", write(tmp_path, **{"job.yaml": yaml, "output.schema.json": json.dumps(LOOSE)})
    )

    assert sent_format(spec)["strict"] is False


def closed(**properties: Any) -> dict[str, Any]:
    """Return a closed object."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (closed(a={"oneOf": [{"type": "null"}]}), "at #/properties/a: oneOf is not supported"),
        (closed(a={}), "at #/properties/a: a schema must say its type"),
        (closed(a={"type": "array"}), "at #/properties/a: an array must have items"),
        (
            closed(a={"type": "array", "items": {"type": "object"}}),
            "at #/properties/a/items: an object must have additionalProperties: false",
        ),
        (
            closed(a={"type": "string", "format": "uri"}),
            "at #/properties/a: format 'uri' is not supported",
        ),
        (
            closed(a={"$ref": "#/$defs/x", "description": "?"}) | {"$defs": {"x": closed()}},
            "at #/properties/a: $ref must stand alone",
        ),
        (
            closed(a={"enum": [str(n) for n in range(1_001)]}),
            "at #: 1,001 enum values; at most 1,000",
        ),
        (closed() | {"anyOf": [closed()]}, "at #: the root must be an object, and no anyOf"),
    ],
)
def test_rules_of_strict_mode(schema: dict[str, Any], expected: str) -> None:
    """Each rule names the path where it is broken."""
    assert expected in "; ".join(strict_problems(schema))


def test_values_may_be_ten_deep() -> None:
    """The eleventh level is refused."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(10):
        schema = closed(a=schema)

    assert strict_problems(schema) == []
    assert "at most 10 deep" in "; ".join(strict_problems(closed(a=schema)))

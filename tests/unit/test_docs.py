"""The pages of `docs/` say what the code does: their examples run, their tables are complete."""

from __future__ import annotations

import ast
import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from include.batch_api import CREATE_TIMEOUT
from include.budgets import OVER_BUDGET
from include.classification import Reason
from include.job_folder import _OWN_KEYS
from include.job_spec import JOBS_ROOT, JobSpec, load_job
from include.ledger import Ledger
from include.rejected_rows import MESSAGES
from include.request_body import BAD_REQUEST, load_builder
from include.source_tables import load_sample_reviews
from include.submission import SubmissionPolicy
from include.target_table import FAILURE_COLUMNS, RESULT_COLUMNS
from include.waiting import WaitPolicy

ROOT = Path(__file__).resolve().parents[2]
WRITING = (ROOT / "docs" / "writing-jobs.md").read_text(encoding="utf-8")
OPERATING = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
FILE = re.compile(r"^`([\w./]+)`\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
JOB = "review_topics"


def table(page: str, header: str) -> dict[str, list[str]]:
    """The rows of the first table whose header begins with `header`, by their first cell."""
    lines = page[page.index(f"\n| {header} |") :].strip().split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]
    return {row[0].strip("|` "): row[1:] for row in rows}


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    """The job folder of the page, as somebody would copy it; `request.py` is left out."""
    for name, text in FILE.findall(WRITING):
        if not name.endswith(".py") or "/dags/" in f"/{name}":
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
    return tmp_path / "include" / "jobs"


def test_the_example_is_a_job(jobs: Path) -> None:
    """The files of "A job in five minutes" load, all of them are used; the DAG names the job."""
    spec = load_job(JOB, jobs)

    assert spec.source.key == ("review_id",)
    assert [hole.column for hole in spec.compiled_prompt.placeholders] == ["title", "body"]
    assert spec.request.output_schema is not None
    dag = ast.parse((jobs.parents[1] / "dags" / f"{JOB}.py").read_text())
    assert f"batch_dag('{JOB}'" in ast.unparse(dag)


def test_the_example_reads_the_sample_reviews(jobs: Path, tmp_path: Path) -> None:
    """Its SQL finds rows in the table that the demo brings, on each of the days that it names."""
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'source.db'}")
    load_sample_reviews(engine)
    query = sa.text((jobs / JOB / "rows.sql").read_text())

    for day in (1, 2, 3):
        bounds = {
            "interval_start": f"2026-11-{day:02}T00:00:00Z",
            "interval_end": f"2026-11-{day + 1:02}T00:00:00Z",
        }
        with engine.connect() as connection:
            assert connection.execute(query, bounds).mappings().first()


def test_the_request_py_of_the_example_builds(jobs: Path) -> None:
    """In place of prompt.md, the page's `request.py` loads and builds a body."""
    (text,) = [text for name, text in FILE.findall(WRITING) if name.endswith("request.py")]
    folder = jobs / JOB
    (folder / "request.py").write_text(text)
    (folder / "prompt.md").unlink()
    yaml = folder / "job.yaml"
    yaml.write_text(yaml.read_text().replace("  prompt: prompt.md\n", ""))

    body = load_builder(load_job(JOB, jobs), jobs)({"title": "Fine", "body": "x" * 9_000})

    assert len(body["input"]) == len("Fine\n\n") + 4_000


def test_the_import_error_of_the_page_is_the_real_one(jobs: Path) -> None:
    """The mistake that the page shows gives the message that the page shows."""
    yaml = jobs / JOB / "job.yaml"
    yaml.write_text(yaml.read_text().replace("  model:", "  modle:"))
    with pytest.raises(Exception, match="unknown key") as caught:
        load_job(JOB, jobs)

    for line in str(caught.value).splitlines()[1:]:
        assert line in WRITING


def keys_of(model: type[BaseModel], before: str = "") -> dict[str, Any]:
    """Every key that job.yaml may have, with its default."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if name in _OWN_KEYS:
            continue
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= keys_of(field.annotation, f"{name}.")
        else:
            found[before + name] = field.get_default(call_default_factory=True)
    return found


def shown(default: Any) -> str:
    """A default as the table has it."""
    words = {None: "none", PydanticUndefined: "required", "": "empty"}
    if isinstance(default, dict):
        return f"`{default}`"
    return words.get(default, f"`{default}`")


def test_every_key_of_a_job_is_documented() -> None:
    """The table of job.yaml has every key of the models, no other, and the real defaults."""
    documented = table(WRITING, "key")

    # The text of rows.sql and of the prompt are fields of the model, and file names in job.yaml.
    assert {key: row[0] for key, row in documented.items()} == {
        key: shown(default) for key, default in keys_of(JobSpec).items()
    }


def test_what_keeps_a_request_the_same_is_documented() -> None:
    """The column "same request" is what the digest of the spec leaves out."""
    same = {key for key, row in table(WRITING, "key").items() if row[-1] == "yes"}

    groups = ("limits.", "retry.", "reuse.", "canary.", "budget.", "alert.")
    assert same == {"description", "request.priced_as", "source.missing"} | {
        key for key in keys_of(JobSpec) if key.startswith(groups)
    }
    changed = {"limits": {"requests_per_batch": 7}, "retry": {"rounds": 9}, "description": "x"}
    changed |= {"budget": {"max_usd": 1}, "alert": {"min_failed": 9}, "canary": {"requests": 9}}
    spec = load_job("ticket_triage", JOBS_ROOT)
    changed["request"] = {**spec.request.model_dump(), "priced_as": "gpt-5.2"}
    other = JobSpec.model_validate({**spec.model_dump(), **changed})
    assert other.digest == spec.digest
    assert other != spec


def test_every_reason_is_documented() -> None:
    """Whatever the failures table can say, the page explains, and says whether it goes again."""
    sent = WRITING[WRITING.index("| reason | what became of") - 1 :]
    documented = table(sent, "reason")

    assert {name: row[1] == "yes" for name, row in documented.items()} == {
        reason.value: reason.state == "retry" for reason in Reason
    }
    assert [row[0] for row in documented.values()] == [reason.sentence for reason in Reason]
    assert set(table(WRITING, "reason")) == {*MESSAGES, "null_column", "too_large", BAD_REQUEST}
    assert f"`{OVER_BUDGET}`" in WRITING


def test_every_column_of_ours_is_documented() -> None:
    """The columns that begin with `_` are on the page."""
    for column in {*RESULT_COLUMNS, *FAILURE_COLUMNS, "_key"}:
        assert f"`{column}`" in WRITING or f"  {column}" in WRITING


def settings_in_code() -> set[str]:
    """Every setting of `[llm_batch]` that something reads."""
    read = re.compile(r'(?:seconds\(|conf\.get\w*\(\s*(?:"llm_batch"|SECTION),)\s*"(\w+)"')
    found = {
        name
        for path in (ROOT / "plugins").rglob("*.py")
        for name in read.findall(path.read_text(encoding="utf-8"))
    }
    variable = re.compile(r"\bAIRFLOW__LLM_BATCH__([A-Z_]+)\b")
    for path in [*(ROOT / "include").rglob("*.py"), ROOT / "docker-compose.yaml"]:
        found |= {name.lower() for name in variable.findall(path.read_text(encoding="utf-8"))}
    return found


def test_every_setting_is_documented() -> None:
    """The table of settings has every setting of the code, and no other."""
    assert len(settings_in_code()) > 10
    assert set(table(OPERATING, "setting")) == settings_in_code()


def test_the_defaults_of_settings_are_the_real_ones() -> None:
    """Where the code holds a default as a value, the table has the same."""
    submit, wait = SubmissionPolicy(), WaitPolicy()
    documented = {name: row[0] for name, row in table(OPERATING, "setting").items()}

    for name, default in {
        "submit_grace": submit.grace,
        "submit_lease": submit.lease,
        "busy_pause": submit.busy_pause,
        "deadline_hours": wait.deadline_hours,
        "cancel_hours": wait.cancel_hours,
        "create_timeout": CREATE_TIMEOUT,
    }.items():
        assert documented[name] == f"{default:g}"


def test_the_queries_run_on_a_ledger(tmp_path: Path) -> None:
    """Each query for the ledger names tables and columns that exist."""
    Ledger(sa.create_engine(f"sqlite:///{tmp_path}/ledger.db"))
    queries = re.findall(r"^```sql\n(.*?)^```$", OPERATING, re.MULTILINE | re.DOTALL)
    ours = [query for query in queries if "llm_batch_" in query]
    connection = sqlite3.connect(tmp_path / "ledger.db")

    assert len(ours) == len(queries) - 1 >= 5  # one is for the target
    for query in ours:
        assert connection.execute(query).fetchall() == []
    connection.close()


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link of the page has its file, and every anchor its heading."""
    text = page.read_text(encoding="utf-8")
    for file, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), file
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, anchor


@pytest.mark.parametrize("folder", ["include", "plugins"])
def test_modules_and_functions_stay_short(folder: str) -> None:
    """CONTRIBUTING.md: a module under 400 lines, a function up to 60; migrations are frozen."""
    texts = {
        path.relative_to(ROOT): path.read_text(encoding="utf-8")
        for path in (ROOT / folder).rglob("*.py")
        if "migrations" not in path.parts
    }
    functions = [
        (path, node.name, (node.end_lineno or 0) - node.lineno + 1)
        for path, text in texts.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]

    assert [path for path, text in texts.items() if len(text.splitlines()) >= 400] == []
    assert [one for one in functions if one[2] > 60] == []


def slug(heading: str) -> str:
    """The anchor that Markdown viewers make of a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.lower())
    return kept.replace(" ", "-")

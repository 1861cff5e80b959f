"""Reading a job folder: every problem of it in one `JobSpecError`."""

from __future__ import annotations

import ast
import difflib
import json
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from include.endpoints import ENDPOINTS
from include.errors import JobSpecError
from include.job_code import source_digest
from include.job_spec import JOB_NAME, RAW, Builder, JobSpec
from include.job_yaml import (
    Document,
    Location,
    Problems,
    allowed_keys,
    describe,
    parse_document,
    unknown_key,
)
from include.output_class import ClassError, class_schema
from include.output_schema import schema_problems
from include.prompt import PromptError, compile_prompt
from include.strict_schema import strict_problems

JOB_FILE = "job.yaml"
BUILDER_FILE = "request.py"
ROWS_FUNCTION = "rows(interval_start, interval_end) -> Iterator[dict]"
SQL_PARAMETERS = ("interval_start", "interval_end")
# What load_job fills in by itself; unknown keys when they stand in job.yaml.
_OWN_KEYS = frozenset({"name", "sql_file", "prompt_file", "builder", "queue"})
# The form in which SQLAlchemy's text() sees a parameter; `::` is a cast, `\:` a plain colon.
_SQL_PARAMETER = re.compile(r"(?<![:\w\\]):(\w+)(?!:)")


def read_job(name: str, root: Path) -> JobSpec:
    """Read and check the job folder `root/name`; raises `JobSpecError` with all problems."""
    folder = _folder(name, root)
    problems = Problems()
    spec = None
    text = _text(folder, JOB_FILE, None, problems)
    document = None if text is None else parse_document(text, JOB_FILE, problems)
    if document is not None:
        spec = _checked(name, folder, document, problems)
    if problems.found or spec is None:
        count = len(problems.found)
        many = f"{count} problems" if count > 1 else "a problem"
        raise JobSpecError(f"Job {name}: {many} in {folder}:\n  " + "\n  ".join(problems.found))
    return spec


def _folder(name: str, root: Path) -> Path:
    if not JOB_NAME.fullmatch(name):
        raise JobSpecError(f"Job name {name[:70]!r} must match {JOB_NAME.pattern}.")
    folder = root / name
    if folder.is_dir():
        return folder
    jobs = sorted(path.parent.name for path in root.glob(f"*/{JOB_FILE}"))
    near = difflib.get_close_matches(name, jobs, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise JobSpecError(
        f"Job {name}: there is no folder {folder}.{hint} Jobs there: {', '.join(jobs) or 'none'}."
    )


def _checked(name: str, folder: Path, document: Document, problems: Problems) -> JobSpec | None:
    """Put the texts of the files into the document and validate it."""
    data = {key: dict(part) if isinstance(part, dict) else part
            for key, part in document.data.items()}  # fmt: skip
    _refuse_own_keys(data, document, problems)
    _inline_sql(data.get("source"), folder, document, problems)
    _inline_rows(data.get("source"), folder, document, problems)
    _inline_prompt(data.get("request"), folder, document, problems)
    _inline_schema(data.get("request"), folder, document, problems)
    _inline_output(data.get("request"), folder, document, problems)
    _check_strict(data.get("request"), document, problems)
    try:
        return JobSpec.model_validate({**data, "name": name})
    except ValidationError as error:
        for location, message in describe(error, JobSpec, _OWN_KEYS):
            problems.add(JOB_FILE, document.line(location), message.removeprefix(": "))
        return None


def _refuse_own_keys(data: dict[str, Any], document: Document, problems: Problems) -> None:
    for location in list(document.lines):
        if len(location) > 2 or location[-1] not in _OWN_KEYS:
            continue
        part = data if len(location) == 1 else data.get(str(location[0]))
        if isinstance(part, dict) and location[0] in {*_OWN_KEYS, "source", "request"}:
            part.pop(location[-1])
            allowed = allowed_keys(JobSpec, location[:-1], _OWN_KEYS)
            problems.add(JOB_FILE, document.line(location), unknown_key(location, allowed))


def _text(folder: Path, file: str, line: int | None, problems: Problems) -> str | None:
    """Return the text of a file of the folder; None, and a problem, when there is none."""
    where = JOB_FILE if line else file
    if Path(file).name != file:
        problems.add(where, line, f"{file[:60]!r} must be the name of a file in the job's folder")
        return None
    try:
        text = (folder / file).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        problems.add(where, line, f"there is no file {file} in the job's folder")
    except (OSError, UnicodeDecodeError) as error:
        problems.add(where, line, f"{file} cannot be read as UTF-8 text: {type(error).__name__}")
    else:
        if text.strip():
            return text
        problems.add(file, None, "is empty")
    return None


def _named_file(
    part: Any, at: Location, folder: Path, document: Document, problems: Problems
) -> tuple[str, str] | None:
    """Return (file, text) for the file that a key names; None when the key names none.

    The key is left out of the data when its file is unusable, so that it is reported once.
    """
    key = str(at[-1])
    if not isinstance(part, dict) or not isinstance(part.get(key), str):
        return None
    file: str = part[key]
    text = _text(folder, file, document.line(at), problems)
    if text is None:
        part[key] = "-"  # stands in for the file, so that validation goes on
        return None
    return file, text


def _inline_sql(source: Any, folder: Path, document: Document, problems: Problems) -> None:
    found = _named_file(source, ("source", "sql"), folder, document, problems)
    if found is None:
        return
    file, text = found
    source.update(sql=text, sql_file=file)
    for match in _SQL_PARAMETER.finditer(text):
        if match[1] not in SQL_PARAMETERS:
            allowed = " and ".join(f":{name}" for name in SQL_PARAMETERS)
            problems.add(
                file,
                1 + text.count("\n", 0, match.start()),
                f"unknown parameter :{match[1]}; allowed: {allowed}. "
                r"A plain colon before a word is written `\:`",
            )


def _inline_rows(source: Any, folder: Path, document: Document, problems: Problems) -> None:
    """Pin the Python file that `source.rows` names."""
    if not isinstance(source, dict) or not isinstance(source.get("rows"), str):
        return
    file, line = source["rows"], document.line(("source", "rows"))
    unusable = {"file": file, "digest": "-"}  # reported once: validation goes on
    source["rows"] = _python_file(folder, file, ROWS_FUNCTION, line, problems) or unusable


def _inline_prompt(request: Any, folder: Path, document: Document, problems: Problems) -> None:
    if not isinstance(request, dict):
        return
    has_builder = (folder / BUILDER_FILE).is_file()
    line = document.line(("request", "prompt"))
    if has_builder and "prompt" in request:
        problems.add(JOB_FILE, line, f"request.prompt: {BUILDER_FILE} is there as well; keep one")
    elif has_builder:
        builder = _python_file(folder, BUILDER_FILE, "build(row: dict) -> dict", None, problems)
        request["builder"] = builder
    elif "prompt" not in request:
        problems.add(
            JOB_FILE, line, f"request.prompt: is missing (a prompt file, or {BUILDER_FILE})"
        )
    found = _named_file(request, ("request", "prompt"), folder, document, problems)
    if found is not None:
        request.update(prompt=found[1], prompt_file=found[0])
        _check_prompt(request, problems)


def _check_prompt(request: dict[str, Any], problems: Problems) -> None:
    file = request["prompt_file"]
    try:
        prompt = compile_prompt(request["prompt"])
    except PromptError as error:
        problems.add(file, error.line, str(error))
        return
    if prompt.system is not None and not _takes_system(request):
        problems.add(
            file, None, f"has a system part (a line ---), but {request['endpoint']} takes none"
        )


def _takes_system(request: dict[str, Any]) -> bool:
    endpoint = ENDPOINTS.get(str(request.get("endpoint")))
    return endpoint is None or endpoint.system is not None


def _python_file(
    folder: Path, file: str, signature: str, line: int | None, problems: Problems
) -> dict[str, str] | None:
    """Pin a Python file with a function; it is parsed here, and run only when it is needed."""
    text = _text(folder, file, line, problems)
    if text is None:
        return None
    try:
        module = ast.parse(text)
    except SyntaxError as error:
        problems.add(file, error.lineno, f"is not valid Python: {error.msg}")
        return None
    name = signature.partition("(")[0]
    if not any(isinstance(node, ast.FunctionDef) and node.name == name for node in module.body):
        problems.add(file, None, f"must define `def {signature}`")
    return Builder(file=file, digest=source_digest(text)).model_dump()


def _inline_schema(request: Any, folder: Path, document: Document, problems: Problems) -> None:
    at = ("request", "output_schema")
    found = _named_file(request, at, folder, document, problems)
    if found is None:
        if isinstance(request, dict) and request.get("output_schema") == "-":
            del request["output_schema"]
        return
    file, text = found
    try:
        schema = json.loads(text)
    except json.JSONDecodeError as error:
        problems.add(file, error.lineno, f"is not valid JSON: {error.msg}")
        del request["output_schema"]
        return
    wrong = schema_problems(schema)
    for problem in wrong:
        problems.add(file, None, problem)
    if wrong:
        del request["output_schema"]
    else:
        request["output_schema"] = schema


def _inline_output(request: Any, folder: Path, document: Document, problems: Problems) -> None:
    """Pin the schema of the class that `output` names; `raw` stays as it is."""
    if not isinstance(request, dict) or not isinstance(request.get("output"), str):
        return
    at, name = ("request", "output"), request["output"]
    if "output_schema" in request:
        problems.add(JOB_FILE, document.line(at), "request.output: output_schema is there as well")
        return
    if name == RAW:
        return
    file, _, class_name = name.partition(":")
    if not class_name:
        message = f"request.output: must be `{RAW}`, or file and class such as output.py:Triage"
        problems.add(JOB_FILE, document.line(at), message)
        return
    text = _text(folder, file, document.line(at), problems)
    if text is None:
        return
    try:
        schema = class_schema(text, folder / file, class_name)
    except ClassError as error:
        problems.add(file, error.line, str(error))
        return
    wrong = schema_problems(schema)
    for problem in wrong:
        problems.add(file, None, f"{class_name}: {problem}")
    if not wrong:
        request["output_schema"] = schema


def _check_strict(request: Any, document: Document, problems: Problems) -> None:
    """Refuse a schema that the API could not enforce, unless the job says that it need not."""
    schema = request.get("output_schema") if isinstance(request, dict) else None
    if not isinstance(schema, dict) or request.get("strict", True) is not True:
        return
    key = "output" if "output" in request else "output_schema"
    file = document.data["request"].get(key)
    for problem in strict_problems(schema, str(request.get("model", ""))):
        problems.add(
            JOB_FILE,
            document.line(("request", key)),
            f"request.{key}: {file}, {problem} (strict mode). Change it, or set `strict: false`: "
            "then answers are checked here alone",
        )

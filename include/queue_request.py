"""One request of the queue: an endpoint with a body, or a job with a row; and what makes it valid.

The same check serves an application that puts a request and the drain that finds one which plain
SQL has inserted. Messages name keys and columns, never a value of the body or the row.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from include.endpoints import ENDPOINTS
from include.errors import RequestRefusedError

if TYPE_CHECKING:
    from include.job_spec import JobSpec

KEY = "request_id"
MAX_ID = 200  # characters
MAX_MODEL = 250  # characters
MAX_PRIORITY = 2**31 - 1
_SHOWN = 60  # characters of a name in a message


@dataclass(frozen=True)
class QueueRequest:
    """What an application asks: `endpoint` and `body`, or `job` and `row`.

    `request_id` is the application's own name for it, 1 to 200 characters. Higher `priority`
    goes first.
    """

    request_id: str
    endpoint: str | None = None
    body: Mapping[str, Any] | None = None
    job: str | None = None
    row: Mapping[str, Any] | None = None
    priority: int = 0


@dataclass(frozen=True)
class StoredRequest:
    """A request as the table holds it: body and row are JSON texts."""

    request_id: str
    endpoint: str | None
    body: str | None
    job: str | None
    job_row: str | None
    priority: int = 0

    def parsed(self) -> QueueRequest:
        """Return the request; raises `RequestRefusedError` for a text that is no JSON."""
        return QueueRequest(
            self.request_id,
            self.endpoint,
            _loaded(self.body, "body"),
            self.job,
            _loaded(self.job_row, "job_row"),
            self.priority,
        )


def stored(request: QueueRequest) -> StoredRequest:
    """Return what the table holds of a request.

    Raises `RequestRefusedError` for a body or row that JSON cannot say.
    """
    return StoredRequest(
        request.request_id,
        request.endpoint,
        _dumped(request.body, "body"),
        request.job,
        _dumped(request.row, "row"),
        request.priority,
    )


def is_same(one: StoredRequest, other: StoredRequest) -> bool:
    """Tell whether two requests ask the same; spaces, the order of keys and priority aside."""
    return _meaning(one) == _meaning(other)


def _meaning(request: StoredRequest) -> tuple[Any, ...]:
    # Sorted text, not dicts: 1, 1.0 and true are equal in Python.
    texts = (_canonical(text) for text in (request.body, request.job_row))
    return (request.endpoint, request.job, *texts)


def _canonical(text: str | None) -> str | None:
    if text is None:
        return None
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except (ValueError, RecursionError):
        return text


class RequestCheck:
    """Checks requests against endpoints and against the jobs below `jobs_root`.

    With `jobs_root=None` a job's row is only checked to be an object: the drain checks the rest.
    """

    def __init__(self, jobs_root: Path | None) -> None:
        self._root = jobs_root
        self._jobs: dict[str, JobSpec] = {}

    def model(self, request: QueueRequest) -> str:
        """Return the model that will be asked, "" when only the drain can tell.

        Raises `RequestRefusedError` that says what is wrong and what was expected, and
        `JobSpecError` when the job's folder is there but is broken.
        """
        _check_id(request.request_id)
        _check_priority(request.priority)
        _check_form(request)
        if request.job is not None:
            return self._of_job(request.job, request.row)
        return model_of_body(str(request.endpoint), request.body)

    def _of_job(self, name: str, row: Any) -> str:
        if not isinstance(row, Mapping):
            raise _refused(f"row is {_kind(row)}; expected an object with the job's columns")
        if self._root is None:
            return ""
        spec = self._job(name, self._root)
        check_row(spec, row)
        return spec.request.model

    def _job(self, name: str, root: Path) -> JobSpec:
        from include.job_spec import load_job

        if name not in self._jobs:
            known = sorted(path.parent.name for path in root.glob("*/job.yaml") if _is_job(path))
            if name not in known:
                raise _refused(f"there is no job {_named(name)}{_nearest(name, known)}")
            self._jobs[name] = load_job(name, root)
        return self._jobs[name]


def _is_job(path: Path) -> bool:
    from include.queue_spec import is_queue

    return not is_queue(path.parent)


def check_row(spec: JobSpec, row: Any) -> None:
    """Raise `RequestRefusedError` when the row is none or lacks what its job's prompt needs."""
    if not isinstance(row, Mapping):
        raise _refused(f"row is {_kind(row)}; expected an object with the job's columns")
    if spec.request.prompt is None:
        return  # request.py decides for itself
    columns = dict.fromkeys((*spec.compiled_prompt.columns, *spec.request.images))
    lacking = [name for name in columns if row.get(name) is None]
    if lacking:
        raise _refused(
            f"row lacks {', '.join(lacking)}, or it is null; {spec.request.prompt_file} of job "
            f"{spec.name} needs {', '.join(columns)}"
        )


def model_of_body(endpoint: str, body: Any) -> str:
    """Return the model that a body names; raises `RequestRefusedError` when it cannot be sent."""
    if endpoint not in ENDPOINTS:
        raise _refused(f"unknown endpoint {_named(endpoint)}{_nearest(endpoint, list(ENDPOINTS))}")
    if not isinstance(body, Mapping):
        raise _refused(f"body is {_kind(body)}; expected an object, as the API reference has it")
    if body.get("stream"):
        raise _refused("body sets stream, which a batch cannot do; remove it")
    model = body.get("model")
    if not isinstance(model, str) or not model.strip() or len(model) > MAX_MODEL:
        raise _refused(
            f"body.model is {_kind(model)}; expected the name of a model, such as gpt-5-mini"
        )
    misfit = _misfit(endpoint, model)
    if misfit:
        raise _refused(misfit)
    return model


@lru_cache(maxsize=1_024)
def _misfit(endpoint: str, model: str) -> str:
    """Say why a model cannot be asked at an endpoint; empty when nothing speaks against it."""
    from pydantic import ValidationError

    from include.queue_spec import body_request

    try:
        body_request(endpoint, model)
    except ValidationError as error:
        return error.errors()[0]["msg"].removeprefix("Value error, ")
    return ""


def _check_id(request_id: Any) -> None:
    if not isinstance(request_id, str) or not 1 <= len(request_id) <= MAX_ID:
        raise _refused(f"request_id must be a text of 1 to {MAX_ID} characters")
    if not request_id.isprintable():
        raise _refused("request_id holds characters that cannot be printed")


def _check_priority(priority: Any) -> None:
    is_whole = isinstance(priority, int) and not isinstance(priority, bool)
    if not is_whole or abs(priority) > MAX_PRIORITY:
        raise _refused("priority must be a whole number of at most 31 bits, such as 0 or 10")


def _check_form(request: QueueRequest) -> None:
    given = {
        name for name in ("endpoint", "body", "job", "row") if getattr(request, name) is not None
    }
    if given not in ({"endpoint", "body"}, {"job", "row"}):
        raise _refused(
            f"{' and '.join(sorted(given)) or 'nothing'} given; expected either endpoint and body, "
            "or job and row"
        )


def _loaded(text: str | None, column: str) -> Any:
    if text is None:
        return None
    try:
        found = orjson.loads(text)
    except ValueError:
        raise _refused(f"{column} is not valid JSON; expected a JSON object") from None
    if found is None:
        raise _refused(f"{column} is null; expected a JSON object")
    return found


def _dumped(value: Mapping[str, Any] | None, name: str) -> str | None:
    if value is None:
        return None
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        text.encode()
    except UnicodeEncodeError:
        raise _refused(f"{name} holds a lone surrogate, which is no text") from None
    except (TypeError, ValueError, RecursionError):
        raise _refused(
            f"{name} holds something that JSON cannot say (dates as text, no NaN)"
        ) from None
    return text


def _refused(message: str) -> RequestRefusedError:
    return RequestRefusedError(message)


def _kind(value: Any) -> str:
    names: dict[type, str] = {type(None): "missing", str: "a text", list: "a list", bool: "a bool"}
    return names.get(type(value), f"of type {type(value).__name__}")


def _named(name: str) -> str:
    return repr(name[:_SHOWN])


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else f" (known: {', '.join(known) or 'none'})"

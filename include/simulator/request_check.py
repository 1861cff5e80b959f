"""What the API checks before a batch starts: every line of its input file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from include.simulator.prompts import input_texts, read_prompt
from include.simulator.settings import Limits, Settings

ENDPOINTS = frozenset(
    {
        "/v1/responses",
        "/v1/chat/completions",
        "/v1/embeddings",
        "/v1/completions",
        "/v1/moderations",
        "/v1/images/generations",
        "/v1/images/edits",
        "/v1/videos",
    }
)
MOST_ERRORS = 100
UNKNOWN_MODEL = "no-such"


@dataclass
class Check:
    """What one pass over an input file found."""

    endpoint: str
    urls: tuple[str, ...]
    deployments: Mapping[str, str] = field(default_factory=dict)
    requests: int = 0
    embedding_inputs: int = 0
    input_tokens: int = 0
    model: str | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)

    def error(self, code: str, message: str, line: int | None = None, param: str = "") -> None:
        """Note one error, as `errors.data` of the schema `Batch` has it."""
        if len(self.errors) < MOST_ERRORS:
            wrong = {"code": code, "line": line, "message": message, "param": param or None}
            self.errors.append(wrong)


def check_requests(path: Path, endpoint: str, settings: Settings) -> Check:
    """Read the input file once, line by line; nothing but the ids is kept in memory."""
    check = Check(endpoint, settings.dialect.urls(endpoint), settings.deployments)
    limits = settings.limits
    if path.stat().st_size > limits.bytes_per_batch:
        most = f"{limits.bytes_per_batch:,} bytes"
        check.error("file_too_large", f"The input file is larger than {most}.")
        return check
    seen: set[str] = set()
    with path.open("rb", buffering=1 << 20) as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                _check_line(check, raw, number, seen)
    _check_totals(check, limits)
    return check


def first_model(path: Path) -> str | None:
    """The model of the first line, None when that line has none."""
    with path.open("rb") as file:
        try:
            body = orjson.loads(file.readline())["body"]
            return str(body["model"])
        except (ValueError, KeyError, TypeError):
            return None


def _check_totals(check: Check, limits: Limits) -> None:
    if check.requests == 0 and not check.errors:
        check.error("empty_file", "The input file has no requests.")
    if check.requests > limits.requests_per_batch:
        most = f"{limits.requests_per_batch:,}"
        check.error("too_many_tasks", f"The input file has more than {most} requests.")
    if check.embedding_inputs > limits.embedding_inputs:
        most = f"{limits.embedding_inputs:,}"
        check.error("too_many_tasks", f"The input file has more than {most} embedding inputs.")


def _check_line(check: Check, raw: bytes, number: int, seen: set[str]) -> None:
    try:
        line = orjson.loads(raw)
    except ValueError:
        line = None
    if not isinstance(line, dict):
        check.error("invalid_json_line", "This line is not parseable as valid JSON.", number)
        return
    check.requests += 1
    custom_id, body = line.get("custom_id"), line.get("body")
    if not isinstance(custom_id, str):
        _missing(check, "custom_id", number)
    elif custom_id in seen:
        message = "The custom_id of this line was used before."
        check.error("duplicate_custom_id", message, number, "custom_id")
    else:
        seen.add(custom_id)
    if line.get("method") != "POST":
        check.error("invalid_method", "The method of a line has to be POST.", number, "method")
    if line.get("url") not in check.urls:
        message = "The url of this line is not the endpoint of the batch."
        check.error("mismatched_url", message, number, "url")
    if isinstance(body, dict):
        _check_body(check, body, number)
    else:
        _missing(check, "body", number)


def _missing(check: Check, name: str, number: int) -> None:
    message = f"Missing required parameter: '{name}'."
    check.error("missing_required_parameter", message, number, name)


def _check_body(check: Check, body: dict[str, Any], number: int) -> None:
    model = body.get("model")
    if not isinstance(model, str):
        _missing(check, "body.model", number)
        return
    if check.model is None:
        check.model = model
        is_missing = bool(check.deployments) and model not in check.deployments
        if is_missing or model.startswith(UNKNOWN_MODEL):
            message = "The provided model does not exist or is not supported by the Batch API."
            check.error("model_not_found", message, number, "body.model")
    elif model != check.model:
        message = "All requests of a batch have to use one model."
        check.error("mismatched_model", message, number, "body.model")
    if check.endpoint == "/v1/embeddings":
        check.embedding_inputs += len(input_texts(body.get("input")))
    check.input_tokens += read_prompt(check.endpoint, body).tokens

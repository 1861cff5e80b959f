"""How our pages are made: templates that escape whatever they are given, and addresses."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from include import airflow_address, figures, run_view
from llm_batch import ui_access
from llm_batch.views import PREFIX

HERE = Path(__file__).parent


@cache
def templates() -> Environment:
    """Return the templates; an unknown name in one of them is an error."""
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("dollars", "count", "counted", "noun", "span", "ago"):
        environment.filters[name] = getattr(figures, name)
    environment.globals |= {
        "asset": asset,
        "at": at,
        "airflow_at": airflow_at,
        "of_batch": run_view.of_batch,
        "status_of": run_view.status_of,
        "is_still": run_view.is_still,
        "Progress": run_view.Progress,
    }
    return environment


@cache
def asset(name: str) -> str:
    """Return the address of a static file, which changes with its content."""
    digest = hashlib.sha256((HERE / "static" / name).read_bytes()).hexdigest()[:12]
    return at(f"static/{name}", v=digest)


def at(path: str, **query: Any) -> str:
    """Return the address of one of our own pages."""
    given = {name: value for name, value in query.items() if value not in {None, ""}}
    return f"{ui_access.base_path()}{PREFIX}/{path}" + (f"?{urlencode(given)}" if given else "")


def airflow_at(*parts: str) -> str:
    """Return the address of one of Airflow's pages."""
    return "/".join([ui_access.base_path(), *map(airflow_address.part, parts)])


def page(name: str, status: int = 200, **values: Any) -> HTMLResponse:
    """Return a template filled in."""
    return HTMLResponse(templates().get_template(name).render(**values), status_code=status)


def error_page(status: int, message: str) -> HTMLResponse:
    """Return a page that says what is wrong and what to do."""
    return page("error.html", status, code=status, message=message, dag_id=None)

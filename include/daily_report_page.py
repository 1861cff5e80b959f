"""The daily report as one HTML file that needs nothing else, and as plain text.

Whatever the ledger holds from outside (batch ids, statuses, codes) is text in both: HTML is
escaped, and control characters are left out of the plain one.
"""

from __future__ import annotations

import unicodedata
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from include.airflow_address import run_page
from include.daily_report import DailyReport, Finding
from include.figures import counted, dollars, noun

TEMPLATES = Path(__file__).parent / "report_templates"
WIDTH = 640  # of a chart, in units of its view box
LABEL = 190  # of that, for the names at the left
VALUE = 110  # and for the figures at the right


def html(report: DailyReport, airflow_url: str) -> str:
    """Return the report as an HTML page; links go to the Airflow UI at `airflow_url`."""
    return _environment(is_html=True).get_template("daily_report.html").render(
        report=report, link=lambda one: link(one, airflow_url), width=WIDTH, label=LABEL,
        room=WIDTH - LABEL - VALUE,
    )  # fmt: skip


def text(report: DailyReport, airflow_url: str) -> str:
    """Return the report as plain text."""
    template = _environment(is_html=False).get_template("daily_report.txt")
    return template.render(
        report=report,
        link=lambda one: link(one, airflow_url),
        width=max((len(one.job) for one in report.jobs), default=0),
    )


def link(finding: Finding, airflow_url: str) -> str:
    """Return the page of the finding's run in Airflow."""
    return airflow_url.rstrip("/") + run_page(finding.dag_id, finding.dag_run_id)


def number(value: int) -> str:
    """Return a count with commas."""
    return f"{value:,}"


def moment(at: datetime) -> str:
    """Return a time for people."""
    return f"{at:%Y-%m-%d %H:%M} UTC"


def plain(value: object) -> str:
    """Return one line without control characters."""
    return "".join(one if unicodedata.category(one)[0] != "C" else " " for one in str(value))


@lru_cache(maxsize=2)
def _environment(*, is_html: bool) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=is_html,  # noqa: S701  # plain text has nothing to escape
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"counted": counted, "noun": noun}
    environment.filters |= {"money": dollars, "number": number, "moment": moment, "plain": plain}
    return environment

"""The DAG that writes a page about the day before; see `include.daily_report`."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from airflow.sdk import DAG, BaseOperator, CronDataIntervalTimetable, conf

from llm_batch import connections

if TYPE_CHECKING:
    from airflow.sdk import Context

DOCUMENTATION = """\
Writes a page about the day before, over all jobs: volumes, problems, money, the slowest batches, \
and what needs a person. The page and its plain-text twin are below `[llm_batch] reports`; the \
task's log has the text.
"""


class DailyReportOperator(BaseOperator):
    """Writes `<day>.html` and `<day>.txt` about the UTC day in which the data interval begins.

    Returns where they are: `{"html": uri, "text": uri}`.
    """

    ui_color = "#f1f3f4"

    def execute(self, context: Context) -> dict[str, str]:
        """Ask, render, write."""
        from include import daily_report_page as page
        from include.daily_report import daily_report

        start = context.get("data_interval_start") or context["dag_run"].run_after
        report = daily_report(connections.ledger().engine, start.date())
        url = conf.get("api", "base_url", fallback="http://localhost:8080")
        text = page.text(report, url)
        self.log.info("%s", text)
        place = connections.reports()
        written = {}
        for kind, content in (("html", page.html(report, url)), ("txt", text)):
            name = f"{report.day}.{kind}"
            with place.create(name) as stream:
                stream.write(content.encode())
            written["text" if kind == "txt" else kind] = place.uri(name)
        self.log.info("The page is %s.", written["html"])
        return written


def report_dag(
    dag_id: str,
    *,
    schedule: str,
    start_date: datetime,
    timezone: str = "UTC",
    **dag_arguments: Any,
) -> DAG:
    """Return a DAG that writes the report of each of its data intervals.

    `schedule` is a cron expression or preset, best once a day. More keyword arguments go to
    `airflow.sdk.DAG`.
    """
    settings: dict[str, Any] = {"catchup": False, "tags": ["llm_batch"]} | dag_arguments
    with DAG(
        dag_id=dag_id,
        schedule=CronDataIntervalTimetable(schedule, timezone=timezone),
        start_date=start_date,
        doc_md=DOCUMENTATION,
        default_args={"retries": 2},
        **settings,
    ) as dag:
        DailyReportOperator(task_id="report")
    return dag

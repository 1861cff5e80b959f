"""OpenLineage events of a run: which datasets it read and wrote, how many rows, what it cost.

Used only when `apache-airflow-providers-openlineage` is installed and a transport is set: its
listener calls `get_openlineage_facets_on_complete` of the operators that have one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from include import pipeline
from include.report import run_report
from llm_batch import connections

if TYPE_CHECKING:
    from airflow.providers.openlineage.extractors import OperatorLineage

    from include.job_spec import JobSpec
    from include.ledger_records import Run

PRODUCER = "https://airflow.apache.org/plugins/llm_batch"


def of_extract(run_id: str) -> OperatorLineage[Any, Any]:
    """Return the source's tables, as far as the SQL tells them, and the snapshot."""
    from airflow.providers.openlineage.extractors import OperatorLineage

    run = connections.ledger().run(run_id)
    return OperatorLineage(
        inputs=_sources(pipeline.pinned(run)), outputs=[_snapshot(run, output_rows=run.rows)]
    )


def of_load(run_id: str) -> OperatorLineage[Any, Any]:
    """Return the snapshot, and results and failures with the rows that went into each."""
    from airflow.providers.openlineage.extractors import OperatorLineage

    run = connections.ledger().run(run_id)
    target = pipeline.pinned(run).target
    namespace = _namespace(target.conn_id) if target.conn_id else "file"
    places = ((target.results_place, run.loaded), (target.failures_place, run.failed))
    return OperatorLineage(
        inputs=[_snapshot(run)],
        outputs=[_dataset(namespace, place, output_rows=rows) for place, rows in places],
        run_facets={"llmBatch": _facet(run)},
    )


def of_report(run_id: str) -> OperatorLineage[Any, Any]:
    """Return what the run came to: counts, tokens and money."""
    from airflow.providers.openlineage.extractors import OperatorLineage

    run = connections.ledger().run(run_id)
    return OperatorLineage(inputs=[_snapshot(run)], run_facets={"llmBatch": _facet(run)})


def _sources(spec: JobSpec) -> list[Any]:
    """Return the tables that the job's SQL names, or its files."""
    from airflow.providers.openlineage.sqlparser import SQLParser

    if not spec.source.sql:
        return [_dataset("file", spec.source.path)] if spec.source.path else []
    hook = connections.sql_hook(spec.source.conn_id)
    dialect = hook.get_openlineage_database_dialect(hook.get_connection(spec.source.conn_id))
    found = SQLParser(dialect=dialect).parse([spec.source.sql])
    namespace = _namespace(spec.source.conn_id)
    return [_dataset(namespace, one.qualified_name) for one in found.in_tables] if found else []


def _namespace(conn_id: str) -> str:
    """Return the namespace of a database as its own provider names it."""
    hook = connections.sql_hook(conn_id)
    info = hook.get_openlineage_database_info(hook.get_connection(conn_id))
    if info is None:
        return str(hook.conn_type)
    return f"{info.scheme}://{info.authority}" if info.authority else str(info.scheme)


def _snapshot(run: Run, *, output_rows: int | None = None) -> Any:
    path = pipeline.snapshot_of(run).path
    return _dataset("file", connections.artifacts().uri(path), output_rows=output_rows)


def _dataset(namespace: str, name: str, *, output_rows: int | None = None) -> Any:
    from openlineage.client.event_v2 import InputDataset, OutputDataset
    from openlineage.client.facet_v2 import output_statistics_output_dataset as statistics

    if output_rows is None:
        return InputDataset(namespace=namespace, name=name)
    facet = statistics.OutputStatisticsOutputDatasetFacet(rowCount=output_rows)
    return OutputDataset(namespace=namespace, name=name, outputFacets={"outputStatistics": facet})


def _facet(run: Run) -> Any:
    """Return the run's figures as a facet of our own: plain JSON, money as decimal text."""
    import attrs
    from openlineage.client.facet_v2 import RunFacet

    figures = run_report(run, connections.ledger()).as_dict()
    names = {name: attrs.field(default=None) for name in figures}
    facet = attrs.make_class("LLMBatchRunFacet", names, bases=(RunFacet,), kw_only=True)
    return facet(**figures, producer=PRODUCER)

"""Airflow DAG: every night, write a page about yesterday's batches."""

from datetime import UTC, datetime

from llm_batch.daily_report import report_dag

dag = report_dag("batch_report", schedule="@daily", start_date=datetime(2026, 11, 1, tzinfo=UTC))

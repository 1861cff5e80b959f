"""Airflow DAG: every night, sort yesterday's support tickets."""

from datetime import UTC, datetime

from llm_batch.dag import batch_dag

dag = batch_dag("ticket_triage", schedule="@daily", start_date=datetime(2026, 11, 1, tzinfo=UTC))

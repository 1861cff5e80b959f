"""Airflow DAG: every night, a vector for each of yesterday's support tickets."""

from datetime import UTC, datetime

from llm_batch.dag import batch_dag

dag = batch_dag(
    "ticket_embeddings", schedule="@daily", start_date=datetime(2026, 11, 1, tzinfo=UTC)
)

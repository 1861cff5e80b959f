"""Airflow DAG: every night, moderate yesterday's product reviews."""

from datetime import UTC, datetime

from llm_batch.dag import batch_dag

dag = batch_dag(
    "review_moderation", schedule="@daily", start_date=datetime(2026, 11, 1, tzinfo=UTC)
)

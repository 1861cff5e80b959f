"""Airflow DAG: every night, label yesterday's commits."""

from datetime import UTC, datetime

from llm_batch.dag import batch_dag

dag = batch_dag("commit_labels", schedule="@daily", start_date=datetime(2013, 8, 1, tzinfo=UTC))

"""Airflow DAG: what applications have put into the queue goes through the Batch API."""

from datetime import UTC, datetime

from llm_batch.queue_dag import queue_dag

dag = queue_dag("request_queue", start_date=datetime(2026, 11, 1, tzinfo=UTC))

"""Airflow DAG: every five minutes, look whether the queue is to be drained."""

from datetime import UTC, datetime

from llm_batch.queue_dag import drain_dag

dag = drain_dag("request_queue", every="*/5 * * * *", start_date=datetime(2026, 11, 1, tzinfo=UTC))

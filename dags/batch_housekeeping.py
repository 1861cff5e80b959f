"""Airflow DAG: every morning, clean up behind the batch jobs; a dry run unless told otherwise."""

from datetime import UTC, datetime

from llm_batch.housekeeping import housekeeping_dag

dag = housekeeping_dag(schedule="30 7 * * *", start_date=datetime(2026, 11, 1, tzinfo=UTC))

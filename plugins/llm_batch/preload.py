"""What tasks import, imported once by the process that they are forked from.

`openai` and `pyarrow` take longer to import than most steps of a small run take. Airflow forks
every task from a process that lives on: the scheduler (LocalExecutor), which imports this through
`llm_batch.listener`, or a Celery worker, which is told by `[celery] extra_celery_config`:
`{"imports": ["llm_batch.preload"]}`. Only packages are imported here, nothing of the project: a
deployed change must not wait for a restart.
"""

import alembic.script
import httpcore2
import jsonschema_rs
import openai.resources.batches
import openai.resources.files
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet
from airflow.providers.openai.hooks import openai as hook

__all__ = ["alembic", "hook", "httpcore2", "jsonschema_rs", "openai", "pyarrow"]

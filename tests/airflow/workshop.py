"""Jobs of a test's own: a folder, a DAG file and a table in the source, run by Airflow."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from include.local_stack.rest import wait_until

Rows = Sequence[tuple[str, str | None]]  # note_id and body
DAY = datetime(2026, 11, 3, tzinfo=UTC)
PATIENCE = 120.0  # seconds
FILES = {
    "job.yaml": """\
source:
  conn_id: source_db
  sql: rows.sql
  key: [note_id]
request:
  endpoint: /v1/responses
  model: gpt-5-mini
  prompt: prompt.md
target:
  conn_id: results_db
  table: {table}
retry: {rounds: 1}
""",
    "rows.sql": """\
SELECT note_id, body FROM {source}
WHERE written_at >= :interval_start AND written_at < :interval_end
ORDER BY note_id
""",
    "prompt.md": "Sum the note up.\n\n{{ body }}\n",
}
DAG = '''\
"""Airflow DAG of one test."""
from datetime import UTC, datetime
from llm_batch.dag import batch_dag
dag = batch_dag(
    "{name}",
    schedule="@daily",
    start_date=datetime(2026, 11, 1, tzinfo=UTC),
    default_args={{"retries": 0}},  # nobody waits a minute here
)
'''


@dataclass(frozen=True)
class Job:
    """One job: its folder below `jobs`, its DAG file in `dags`, its rows in `source`."""

    name: str
    jobs: Path
    dags: Path
    home: Path

    @property
    def folder(self) -> Path:
        """The job folder."""
        return self.jobs / self.name

    @property
    def dag_file(self) -> Path:
        """The DAG file."""
        return self.dags / f"{self.name}.py"

    def write(self, **changes: tuple[str, str]) -> None:
        """Write the whole folder and the DAG file; `job_yaml=(old, new)` changes one file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for file, text in FILES.items():
            filled = text.replace("{table}", f"{self.name}_labels")
            filled = filled.replace("{source}", f"{self.name}_notes")
            old, new = changes.pop(file.replace(".", "_"), ("", ""))
            assert old in filled
            (self.folder / file).write_text(filled.replace(old, new, 1))
        assert not changes
        self.dag_file.write_text(DAG.format(name=self.name))

    def fill(self, rows: Rows) -> None:
        """Make these the rows (note_id, body) of the day."""
        columns = (sa.Column(name, sa.Text) for name in ("note_id", "body", "written_at"))
        notes = sa.Table(f"{self.name}_notes", sa.MetaData(), *columns)
        with self._database("source_db").begin() as connection:
            notes.drop(connection, checkfirst=True)
            notes.create(connection)
            at = (DAY + timedelta(hours=12)).isoformat()
            values = [{"note_id": one, "body": body, "written_at": at} for one, body in rows]
            connection.execute(sa.insert(notes), values)

    def run(self, conf: dict[str, Any] | None = None) -> dict[str, str | None]:
        """Run the day once more through Airflow; the state of each task that came to run.

        Each is the same Airflow run to the ledger: the next may begin when this one has left.
        """
        from airflow.dag_processing.dagbag import DagBag

        bag = DagBag(str(self.dag_file))
        assert bag.import_errors == {}
        run = bag.dags[self.name].test(logical_date=DAY + timedelta(days=1), run_conf=conf)
        wait_for_listener()
        return {one.task_id: one.state for one in run.get_task_instances()}

    def loaded(self) -> set[str]:
        """The keys in the results table."""
        return {key for (key,) in self._rows("labels", "note_id")}

    def failures(self) -> dict[str, tuple[str, str]]:
        """Reason and message by key, of the failures table."""
        rows = self._rows("labels_failures", "note_id", "_reason", "_error_message")
        return {key: (reason, message) for key, reason, message in rows}

    def _rows(self, table: str, *columns: str) -> list[Any]:
        query = sa.select(*map(sa.column, columns)).select_from(sa.table(f"{self.name}_{table}"))
        with self._database("results_db").connect() as connection:
            return list(connection.execute(query))

    def _database(self, name: str) -> sa.Engine:
        return sa.create_engine(f"sqlite:///{self.home}/{name}.db")


MakeJob = Callable[..., Job]


def wait_for_listener() -> None:
    """Wait until the threads that the plugin begins when a run has ended are through with it.

    Later, they would work on the ledger, the connections and the Airflow run of another test.
    """
    from llm_batch import listener

    for thread in threading.enumerate():
        if listener.cancel_in_flight.__name__ in thread.name:
            thread.join(PATIENCE)
            assert not thread.is_alive(), thread
    notes = listener.notes._ended
    wait_until("all notes", PATIENCE, lambda: notes.unfinished_tasks == 0, interval=0.01)

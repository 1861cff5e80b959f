"""Jobs whose rows are files or Python, through Airflow; the store is S3 over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pandas as pd
import pytest
from llm_batch import connections

from include.object_storage import remote_path
from include.simulator.process import Simulator
from tests.airflow.workshop import DAY, Job

SOURCE = "source:\n  conn_id: source_db\n  sql: rows.sql\n  key: [note_id]\n"
TABLE = "  conn_id: results_db\n  table: "


@pytest.fixture
def job(airflow_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    monkeypatch.setenv("AIRFLOW__LLM_BATCH__JOBS", str(tmp_path / "jobs"))
    name = f"from_{tmp_path.name.strip('_0123456789')[:40]}"
    made = Job(name, tmp_path / "jobs", airflow_home / "dags", airflow_home)
    yield made
    made.dag_file.unlink(missing_ok=True)


def test_from_s3_to_s3(
    job: Job, s3_bucket: str, service: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Source, artifacts and target in one bucket; a broken line fails alone."""
    monkeypatch.setenv("AIRFLOW__LLM_BATCH__ARTIFACTS", f"{s3_bucket}/artifacts")
    source = f'source:\n  path: "{s3_bucket}/notes/{{{{ds}}}}/*.jsonl"\n  key: [note_id]\n'
    job.write(job_yaml=(SOURCE, source))
    yaml = job.folder / "job.yaml"
    yaml.write_text(
        yaml.read_text().replace(f"{TABLE}{job.name}_labels", f"  path: {s3_bucket}/labels")
    )
    day = remote_path(f"{s3_bucket}/notes/{DAY:%Y-%m-%d}")
    (day / "a.jsonl").write_bytes(b'{"note_id": 1, "body": "one"}\n{"note_id": 2, "bo')
    (day / "b.jsonl").write_bytes(b'{"note_id": 3, "body": "three"}\n')
    before = service.bill()

    states = job.run()
    paid = service.bill()
    again = job.run()

    remote_path(s3_bucket).fs.invalidate_cache()
    results = pd.read_parquet(f"{s3_bucket}/labels/results")
    failures = pd.read_parquet(f"{s3_bucket}/labels/failures")
    run = connections.ledger().runs(job.name)[-1]
    assert (states["report"], again["round_1.build"]) == ("success", "skipped")
    assert sorted(results["note_id"]) == [1, 3]
    assert failures["_reason"].tolist() == ["broken_row"]
    assert f"{s3_bucket}/notes/2026-11-03/a.jsonl, line 2: " in failures["_error_message"][0]
    assert paid["requests"] - before["requests"] == 2
    assert service.bill()["cost_usd"] == paid["cost_usd"]
    assert run.cost_usd == Decimal(paid["cost_usd"]) - Decimal(before["cost_usd"])


def test_from_python(job: Job, service: Simulator) -> None:
    """`rows.py` of the job folder, with the interval of the run."""
    job.write(job_yaml=(SOURCE, "source: {rows: rows.py, key: [note_id]}\n"))
    (job.folder / "rows.py").write_text(
        "def rows(interval_start, interval_end):\n"
        "    for number in range(3):\n"
        "        yield {'note_id': f'{interval_start:%d}-{number}', 'body': 'text'}\n"
    )

    states = job.run()

    assert states["report"] == "success"
    assert job.loaded() == {"03-0", "03-1", "03-2"}


def test_no_file_fails_the_run_before_it_costs(
    job: Job, tmp_path: Path, service: Simulator
) -> None:
    """A day whose files are late is not a day without rows."""
    source = f'source: {{path: "{tmp_path}/{{{{ds}}}}.csv", key: [note_id]}}\n'
    job.write(job_yaml=(SOURCE, source))
    before = service.batches()["uploads"]

    states = job.run()

    assert states["extract"] == "failed"
    assert service.batches()["uploads"] == before

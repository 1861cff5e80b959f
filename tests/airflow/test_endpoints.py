"""One run of every endpoint through Airflow: typed columns, and the cost that the API bills."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import sqlalchemy as sa

from include.errors import ConfigurationError
from include.job_spec import load_job
from include.loading import check_tables
from include.simulator.process import Simulator
from include.source_tables import load_sample_reviews, load_sample_tickets
from tests.airflow.workshop import DAY, Job

ROWS: list[tuple[str, str | None]] = [
    ("n1", "The kettle leaks."),
    ("n2", "You idiots, answer me."),
    ("n3", None),
]
REQUEST = "  endpoint: /v1/responses\n  model: gpt-5-mini\n  prompt: prompt.md\n"
MODELS = {
    "/v1/responses": "gpt-5-mini",
    "/v1/chat/completions": "gpt-4.1-mini",
    "/v1/completions": "gpt-3.5-turbo-instruct",
    "/v1/embeddings": "text-embedding-3-small",
    "/v1/moderations": "omni-moderation-latest",
    "/v1/images/generations": "gpt-image-1",
}
OUTPUT = """\
from typing import Literal

from pydantic import BaseModel


class Note(BaseModel):
    kind: Literal["bug", "other"]
    urgency: int
    score: float
    is_human: bool
    tags: list[str]
"""


def request(endpoint: str, more: str = "") -> tuple[str, str]:
    """Return the change of job.yaml that asks this endpoint."""
    fields = f"  endpoint: {endpoint}\n  model: {MODELS[endpoint]}\n  prompt: prompt.md\n"
    return REQUEST, fields + more


@pytest.fixture
def job(
    request: pytest.FixtureRequest,
    airflow_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Job]:
    """A job of this test, still to be written."""
    monkeypatch.setenv("AIRFLOW__LLM_BATCH__JOBS", str(tmp_path / "jobs"))
    name = "".join(one if one.isalnum() else "_" for one in request.node.name.lower())[:40]
    made = Job(f"of{name[4:]}", tmp_path / "jobs", airflow_home / "dags", airflow_home)
    made.fill(ROWS)
    yield made
    made.dag_file.unlink()


def results(job: Job, engine: sa.Engine | None = None) -> pd.DataFrame:
    """Return the results table, by key."""
    engine = engine or sa.create_engine(f"sqlite:///{job.home}/results_db.db")
    return pd.read_sql_table(f"{job.name}_labels", engine).set_index("note_id").sort_index()


def ledger_cost(home: Path, job: str) -> Decimal:
    """Return what the ledger says that the job's one run cost."""
    query = sa.text("SELECT cost_usd FROM llm_batch_run WHERE job = :job")
    with sa.create_engine(f"sqlite:///{home}/llm_batch_db.db").connect() as connection:
        (cost,) = connection.scalars(query, {"job": job})
    return Decimal(str(cost))


def ran(job: Job, service: Simulator) -> None:
    """Run the job; its two good rows are loaded, one has no text, and the cost is the bill."""
    batches = {one["batch_id"] for one in service.bill()["by_batch"]}

    states = job.run()

    new = [one for one in service.bill()["by_batch"] if one["batch_id"] not in batches]
    assert (states["load"], states["report"]) == ("success", "success")
    assert [one["requests"] for one in new] == [2]
    assert ledger_cost(job.home, job.name) == Decimal(new[0]["cost_usd"])
    assert {key: reason for key, (reason, _) in job.failures().items()} == {"n3": "null_column"}


@pytest.mark.parametrize("endpoint", ["/v1/responses", "/v1/chat/completions"])
def test_structured_text(job: Job, service: Simulator, endpoint: str) -> None:
    """A Pydantic model gives typed columns on both endpoints."""
    job.write(job_yaml=request(endpoint, "  output: output.py:Note\n"))
    (job.folder / "output.py").write_text(OUTPUT)

    ran(job, service)

    found = results(job)
    assert list(found.index) == ["n1", "n2"]
    assert found["urgency"].dtype == "int64"
    assert found["score"].dtype == "float64"
    assert found["is_human"].dtype == "bool"
    assert all(isinstance(json.loads(one), list) for one in found["tags"])


def test_plain_text(job: Job, service: Simulator) -> None:
    """Legacy completions have one column of text."""
    job.write(job_yaml=request("/v1/completions", "  params: {max_tokens: 50}\n"))

    ran(job, service)

    assert all(results(job)["content"])


@pytest.mark.parametrize("encoding", ["base64", "float"])
def test_vectors(job: Job, service: Simulator, encoding: str) -> None:
    """Both encodings give the same float32, in a BLOB of SQLite."""
    params = f"  params: {{dimensions: 8, encoding_format: {encoding}}}\n"
    job.write(job_yaml=request("/v1/embeddings", params))

    ran(job, service)

    first, second = (np.frombuffer(one, "<f4") for one in results(job)["embedding"])
    assert (first.shape, second.shape) == ((8,), (8,))
    assert np.isfinite(first).all()
    assert not np.array_equal(first, second)


def test_vectors_in_postgresql(
    job: Job, service: Simulator, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column of `real[]`."""
    url = sa.make_url(postgres_url).set(drivername="postgresql")
    monkeypatch.setenv("AIRFLOW_CONN_RESULTS_DB", url.render_as_string(hide_password=False))
    job.write(job_yaml=request("/v1/embeddings", "  params: {dimensions: 8}\n"))

    states = job.run()

    found = results(job, sa.create_engine(postgres_url))
    assert states["load"] == "success"
    assert [len(one) for one in found["embedding"]] == [8, 8]


def test_vectors_in_parquet(job: Job, service: Simulator, tmp_path: Path) -> None:
    """A column of `fixed_size_list<float32>`."""
    import pyarrow.dataset as ds

    folder = tmp_path / "vectors"
    fields = request("/v1/embeddings")[1]
    target = f"target:\n  conn_id: results_db\n  table: {job.name}_labels\n"
    job.write(job_yaml=(f"{REQUEST}{target}", f"{fields}target:\n  path: {folder.as_uri()}\n"))

    states = job.run()

    found = ds.dataset(folder / "results", partitioning="hive").to_table()
    assert states["load"] == "success"
    assert str(found.schema.field("embedding").type).startswith("fixed_size_list<element: float")
    assert found.column("embedding").type.list_size == 1_536
    assert sorted(found.column("note_id").to_pylist()) == ["n1", "n2"]


def test_moderation(job: Job, service: Simulator) -> None:
    """Flag, categories and scores are columns of their own."""
    job.write(job_yaml=request("/v1/moderations"), prompt_md=("Sum the note up.\n\n", ""))

    ran(job, service)

    found = results(job)
    assert [bool(one) for one in found["flagged"]] == [False, True]
    assert list(found["categories"]) == ["[]", '["harassment"]']
    assert found["harassment_score"]["n2"] > 0.5 > found["harassment_score"]["n1"]


def test_raw_bodies(job: Job, service: Simulator) -> None:
    """Pictures come as the body that the API sent."""
    job.write(job_yaml=request("/v1/images/generations", "  params: {quality: low}\n"))

    ran(job, service)

    bodies = [json.loads(one) for one in results(job)["content"]]
    assert all(body["data"][0]["b64_json"] for body in bodies)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("  output_schema: output.schema.json\n", "at #/properties/a: oneOf is not supported"),
        ("  params: {max_tokens: 9}\n", "max_tokens is for /v1/chat/completions and"),
    ],
)
def test_what_cannot_work_is_an_import_error(job: Job, change: str, expected: str) -> None:
    """Nothing runs, and the DAG's import error names what is wrong."""
    from airflow.dag_processing.dagbag import DagBag

    job.write(job_yaml=request("/v1/responses", change))
    schema: Any = {"type": "object", "properties": {"a": {"oneOf": [{"type": "null"}]}}}
    (job.folder / "output.schema.json").write_text(json.dumps(schema))

    (message,) = DagBag(str(job.dag_file)).import_errors.values()

    assert expected in message


def test_a_table_of_other_types_stops_the_run_before_it_pays(job: Job, service: Simulator) -> None:
    """The error names column, found and expected type; no request was sent."""
    job.write(job_yaml=request("/v1/embeddings"))
    with sa.create_engine(f"sqlite:///{job.home}/results_db.db").begin() as connection:
        columns = "note_id TEXT PRIMARY KEY, embedding TEXT"
        connection.execute(sa.text(f"CREATE TABLE {job.name}_labels ({columns})"))
    before = service.bill()["requests"]

    states = job.run()

    assert states["round_1.build"] == "failed"
    assert service.bill()["requests"] == before
    with pytest.raises(ConfigurationError, match="column embedding: found TEXT, expected BLOB"):
        check_tables(
            sa.create_engine(f"sqlite:///{job.home}/results_db.db"),
            load_job(job.name, job.jobs),
            pa.schema([("note_id", pa.string())]),
        )


@pytest.mark.parametrize(
    ("name", "load", "column"),
    [
        ("ticket_embeddings", load_sample_tickets, "embedding"),
        ("review_moderation", load_sample_reviews, "flagged"),
    ],
)
def test_the_sample_jobs_run(
    airflow_home: Path,
    service: Simulator,
    name: str,
    load: Callable[[sa.Engine], int],
    column: str,
) -> None:
    """A day of sample data ends whole in the target, at the price that the API bills."""
    from airflow.dag_processing.dagbag import DagBag

    load(sa.create_engine(f"sqlite:///{airflow_home}/source_db.db"))
    batches = {one["batch_id"] for one in service.bill()["by_batch"]}

    bag = DagBag(str(airflow_home / "dags" / f"{name}.py"))
    run = bag.dags[name].test(logical_date=DAY + timedelta(days=1))

    new = [one for one in service.bill()["by_batch"] if one["batch_id"] not in batches]
    found = pd.read_sql_table(name, sa.create_engine(f"sqlite:///{airflow_home}/results_db.db"))
    assert run.state == "success"
    assert len(found) == sum(one["requests"] for one in new) > 25
    assert found[column].notna().all()
    assert ledger_cost(airflow_home, name) == sum(Decimal(one["cost_usd"]) for one in new)

"""Vectors stay 32-bit floats from the API's answer to the target."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa

from include.arrow_columns import integer_array, text_array
from include.artifacts import Artifacts
from include.errors import ConfigurationError
from include.job_spec import JOBS_ROOT, JobSpec, load_job, with_overrides
from include.loading import LoadedRun, LoadReport, RoundFiles, RunFiles, load_run
from include.outcomes import CollectReport, collect_shard
from include.parquet_target import load_dataset
from include.vector_arrays import as_binary, as_texts, packed_array, packed_type, unpacked

SIZE = 3
VECTOR = np.array([0.1, -2.5e-8, 3.0], dtype="<f4")
BASE64 = b64encode(VECTOR.tobytes()).decode()
FLOATS = VECTOR.tolist()
IDS = [f"{number:032x}" for number in range(5)]
RUN = LoadedRun("r", datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 11, 2, tzinfo=UTC))


def job(**changed: Any) -> JobSpec:
    """Return an embeddings job of three numbers."""
    target = changed.pop("target", {"conn_id": "t", "table": "vectors"})
    request = {
        "endpoint": "/v1/embeddings",
        "model": "text-embedding-3-small",
        "prompt": "{{ text }}",
        "params": {"dimensions": SIZE},
        **changed,
    }
    source = {"conn_id": "s", "sql": "select 1", "key": ["id"]}
    return JobSpec.model_validate(
        {"name": "j", "source": source, "request": request, "target": target}
    )


def line(custom_id: str, *embeddings: Any) -> bytes:
    """Return a line with these vectors."""
    data = [{"index": at, "embedding": one} for at, one in enumerate(embeddings)]
    usage = {"prompt_tokens": 4, "total_tokens": 4}
    response = {"status_code": 200, "body": {"data": data, "usage": usage}}
    text = json.dumps({"custom_id": custom_id, "response": response, "error": None})
    return text.encode() + b"\n"


class Run:
    """A collected shard, which can be loaded."""

    def __init__(self, folder: Path, spec: JobSpec, *lines: bytes) -> None:
        self.spec, self.artifacts = spec, Artifacts(folder)
        rows = integer_array(np.arange(len(lines), dtype=np.int64))
        index = [rows, rows, text_array(IDS[: len(lines)])]
        with self.artifacts.create("index.parquet") as sink:
            pq.write_table(pa.Table.from_arrays(index, ["_row", "id", "_custom_id"]), sink)
        with self.artifacts.create("output.jsonl") as sink:
            sink.write(b"".join(lines))
        self.report: CollectReport = collect_shard(
            spec,
            index_file="index.parquet",
            output_file="output.jsonl",
            error_file=None,
            artifacts=self.artifacts,
            outcomes_file="outcomes.parquet",
            quarantine_file="quarantine.parquet",
        )

    def outcomes(self) -> pa.Table:
        """Return the outcomes file."""
        with self.artifacts.open("outcomes.parquet") as stream:
            return pq.read_table(stream)

    def load(self, place: Any) -> LoadReport:
        """Load it into a database or a dataset."""
        load = load_dataset if isinstance(place, Artifacts) else load_run
        round_ = RoundFiles(1, ("outcomes.parquet",), ("b",))
        files = RunFiles(self.spec, (round_,), None, self.artifacts)
        return load(place, RUN, files)


def test_a_raw_answer_is_asked_for_as_the_job_says() -> None:
    """Its requests are those of releases without vectors, so what they have loaded is reused."""
    request = load_job("ticket_embeddings", JOBS_ROOT).request

    assert request.sent_params == {"encoding_format": "base64", **request.params}
    assert request.model_copy(update={"output": "raw"}).sent_params == request.params


@pytest.mark.parametrize("sent", [BASE64, FLOATS], ids=["base64", "floats"])
def test_both_forms_give_the_same_floats(tmp_path: Path, sent: Any) -> None:
    """Base64 and a list of numbers become the same float32, bit for bit."""
    found = Run(tmp_path, job(), line(IDS[0], sent)).outcomes().column("embedding")

    assert found.type == packed_type(SIZE)
    assert found[0].as_py() == VECTOR.tobytes()


def test_slashes_may_be_escaped(tmp_path: Path) -> None:
    r"""Some servers write `\/` for the `/` of base64."""
    vector = np.frombuffer(b"\xff" * 8 + bytes(4), dtype="<f4")
    finite = np.frombuffer(b"\xff\xff\x7f\x3f" * 3, dtype="<f4")
    raw = line(IDS[0], b64encode(finite.tobytes()).decode()).replace(b"/", rb"\/")

    run = Run(tmp_path, job(), raw, line(IDS[1], b64encode(vector.tobytes()).decode()))

    assert rb"\/" in raw
    assert run.report.succeeded == 1
    assert run.outcomes().column("embedding")[0].as_py() == finite.tobytes()
    assert run.report.by_reason == {"invalid_answer": 1}  # NaN is no number of a vector


@pytest.mark.parametrize(
    ("sent", "reason", "message"),
    [
        (([0.5] * 2,), "wrong_dimensions", "The vector has 2 numbers, expected 3."),
        ((b64encode(bytes(16)).decode(),), "wrong_dimensions", "has 4 numbers, expected 3."),
        ((FLOATS, FLOATS), "invalid_answer", "The answer is not one vector of numbers."),
        (([0.5, None, 1],), "invalid_answer", "The answer is not one vector of numbers."),
        (("no base64!",), "invalid_answer", "The answer is not one vector of numbers."),
        (([0.5, 1e300, 1],), "invalid_answer", "The vector has a number that is no float32."),
        ((), "empty_answer", None),
    ],
)
def test_what_is_no_vector_is_named(
    tmp_path: Path, sent: tuple[Any, ...], reason: str, message: str | None
) -> None:
    """A wrong length fails for good and says both lengths; garbage is asked for again."""
    run = Run(tmp_path, job(), line(IDS[0], *sent), line(IDS[1], BASE64))

    first, second = run.outcomes().to_pylist()
    assert (first["_reason"], first["embedding"]) == (reason, None)
    assert message is None or message in first["_error_message"]
    assert second["_state"] == "succeeded"


def test_several_vectors_are_kept_raw(tmp_path: Path) -> None:
    """`output: raw` keeps the body as the API sent it, for requests of several texts."""
    run = Run(tmp_path, job(output="raw"), line(IDS[0], FLOATS, FLOATS))

    body = json.loads(run.outcomes().column("content")[0].as_py())
    assert [len(one["embedding"]) for one in body["data"]] == [SIZE, SIZE]
    assert run.report.usage.input == 4


def test_vectors_beyond_memory_keep_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not held is read again: each request keeps its own vector, in either form."""
    monkeypatch.setattr("include.held_answers.HELD_BYTES", 1)
    monkeypatch.setattr("include.held_answers.CHUNK_BYTES", 1)
    monkeypatch.setattr("include.result_lines.BLOCK_BYTES", 200)
    vectors = [np.full(SIZE, number, dtype="<f4") for number in range(5)]
    lines = [
        line(IDS[at], one.tolist() if at % 2 else b64encode(one.tobytes()).decode())
        for at, one in enumerate(vectors)
    ]

    run = Run(tmp_path, job(), *reversed(lines))

    assert run.outcomes().column("embedding").to_pylist() == [one.tobytes() for one in vectors]


def test_sqlite_has_blobs(tmp_path: Path) -> None:
    """A BLOB of little-endian float32; loading again changes nothing."""
    engine = sa.create_engine(f"sqlite:///{tmp_path}/t.db")
    run = Run(tmp_path, job(), line(IDS[0], BASE64), line(IDS[1], [1.0]))

    first, second = run.load(engine), run.load(engine)

    with engine.connect() as connection:
        (found,) = connection.execute(sa.text("SELECT typeof(embedding), embedding FROM vectors"))
    assert tuple(found) == ("blob", VECTOR.tobytes())
    assert (first.loaded, first.failed, second.changed_results) == (1, 1, 0)


def test_postgresql_has_real_arrays(tmp_path: Path, empty_postgres_url: str) -> None:
    """`real[]` where pgvector is not installed, the same floats bit for bit."""
    engine = sa.create_engine(empty_postgres_url)
    spec = job(target={"conn_id": "t", "table": "real_vectors"})
    run = Run(tmp_path, spec, line(IDS[0], BASE64), line(IDS[1], [1.0]))

    first, second = run.load(engine), run.load(engine)

    query = "SELECT pg_typeof(embedding)::text, embedding FROM real_vectors"
    with engine.connect() as connection:
        ((kind, found),) = connection.execute(sa.text(query))
    assert kind == "real[]"
    assert np.array(found, dtype="<f4").tobytes() == VECTOR.tobytes()
    assert (first.loaded, first.failed, second.changed_results) == (1, 1, 0)


def test_parquet_has_fixed_size_lists(tmp_path: Path) -> None:
    """`fixed_size_list<float32>`; a second run of the interval is merged without a change."""
    dataset = Artifacts(tmp_path / "dataset")
    run = Run(tmp_path, job(target={"path": str(tmp_path)}), line(IDS[0], BASE64))

    first, second = run.load(dataset), run.load(dataset)

    (file,) = (tmp_path / "dataset" / "results").rglob("*.parquet")
    found = pq.read_table(file, partitioning=None).column("embedding")
    assert pa.types.is_fixed_size_list(found.type)
    assert (found.type.value_type, found.type.list_size) == (pa.float32(), SIZE)
    assert found[0].as_py() == FLOATS
    assert (first.changed_results, second.changed_results) == (1, 0)


def test_a_dataset_of_another_length_is_an_error(tmp_path: Path) -> None:
    """The error names column, found and expected type; the files stay as they are."""
    dataset = Artifacts(tmp_path / "dataset")
    target = {"path": str(tmp_path)}
    Run(tmp_path / "a", job(target=target), line(IDS[0], BASE64)).load(dataset)
    longer = job(target=target, params={"dimensions": 4})

    with pytest.raises(ConfigurationError, match=r"embedding: found .*\[3\], expected .*\[4\]"):
        Run(tmp_path / "b", longer, line(IDS[0], [0.5] * 4)).load(dataset)


def test_a_table_of_another_type_is_an_error(tmp_path: Path, empty_postgres_url: str) -> None:
    """The error names column, found and expected type; nothing is altered."""
    sqlite = sa.create_engine(f"sqlite:///{tmp_path}/t.db")
    postgres = sa.create_engine(empty_postgres_url)
    spec = job(target={"conn_id": "t", "table": "old_vectors"})
    run = Run(tmp_path, spec, line(IDS[0], BASE64))
    for engine in (sqlite, postgres):
        with engine.begin() as connection:
            columns = "id bigint primary key, embedding text"
            connection.execute(sa.text(f"CREATE TABLE old_vectors ({columns})"))

    for engine, found, expected in ((sqlite, "TEXT", "BLOB"), (postgres, "text", "real[]")):
        with pytest.raises(ConfigurationError) as caught:
            run.load(engine)
        assert f"column embedding: found {found}, expected {expected}" in str(caught.value)


def test_texts_are_the_shortest_that_give_the_same_float() -> None:
    """Slices and nulls too; PostgreSQL reads these texts."""
    values = [None, VECTOR.tobytes(), np.array([1, 2, 3], dtype="<f4").tobytes(), None]
    column = unpacked(packed_array(values, packed_type(SIZE))[1:])

    found = as_texts(column, "{", "}").to_pylist()

    assert found == ["{0.1,-2.5e-8,3}", "{1,2,3}", None]
    assert as_binary(column[1:]).to_pylist() == values[2:]


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"model": "bge-m3", "params": {}}, "vector_size is missing"),
        ({"params": {"dimensions": 2_000}}, "at most 1,536 for text-embedding-3-small"),
        ({"params": {"dimensions": "8"}}, "dimensions must be a whole number"),
        ({"params": {"dimensions": 8}, "vector_size": 9}, "vector_size 9, but the vectors have 8"),
        ({"params": {"encoding_format": "hex"}}, "encoding_format must be base64 or float"),
        ({"model": "text-embedding-ada-002"}, "text-embedding-ada-002 takes no dimensions"),
        ({"model": "gpt-5-mini"}, "model gpt-5-mini is for /v1/responses and"),
        ({"params": {"max_tokens": 9}}, "max_tokens is for /v1/chat/completions and"),
    ],
)
def test_what_does_not_fit_is_an_error_of_the_job(changed: dict[str, Any], problem: str) -> None:
    """Nothing that the API would refuse for every row is sent."""
    with pytest.raises(ValueError, match=problem):
        job(**changed)


def test_a_run_cannot_take_a_model_with_other_vectors() -> None:
    """The param `model` is refused before anything is paid: the target could not hold them."""
    spec = job(params={})

    assert with_overrides(spec, model="text-embedding-ada-002").request.vector_length == 1_536
    for model, problem in (
        ("text-embedding-3-large", "its vectors have 3072 numbers, those of the job 1536"),
        ("gpt-5-mini", "model gpt-5-mini is for /v1/responses"),
    ):
        with pytest.raises(ConfigurationError, match=problem):
            with_overrides(spec, model=model)


@pytest.mark.parametrize(
    ("changed", "length"),
    [
        ({"params": {}}, 1_536),
        ({"params": {}, "model": "text-embedding-3-large"}, 3_072),
        ({"params": {}, "model": "my-deployment", "vector_size": 768}, 768),
        ({"params": {"dimensions": 256}}, 256),
    ],
)
def test_the_length_of_a_vector_is_known(changed: dict[str, Any], length: int) -> None:
    """From the params, the job, or the model."""
    assert job(**changed).request.vector_length == length


# What pgvector's type looks like from outside, for a server without the extension: its name, its
# length in brackets, its text, its equality.
STAND_IN = """
CREATE TYPE vector;
CREATE FUNCTION vector_in(cstring) RETURNS vector AS 'textin' LANGUAGE internal IMMUTABLE STRICT;
CREATE FUNCTION vector_out(vector) RETURNS cstring AS 'textout' LANGUAGE internal IMMUTABLE STRICT;
CREATE TYPE vector (
    INPUT = vector_in, OUTPUT = vector_out, LIKE = text,
    TYPMOD_IN = varchartypmodin, TYPMOD_OUT = varchartypmodout
);
CREATE FUNCTION vector_eq(vector, vector) RETURNS boolean AS 'byteaeq' LANGUAGE internal IMMUTABLE;
CREATE OPERATOR = (LEFTARG = vector, RIGHTARG = vector, FUNCTION = vector_eq);
"""


@pytest.fixture
def with_pgvector(empty_postgres_url: str) -> Iterator[sa.Engine]:
    """A database that has the type `vector`, of the extension where the server has it."""
    engine = sa.create_engine(empty_postgres_url)
    available = "SELECT count(*) FROM pg_available_extensions WHERE name = 'vector'"
    with engine.begin() as connection:
        has_it = bool(connection.scalar(sa.text(available)))
        made = "CREATE EXTENSION vector" if has_it else STAND_IN
        connection.exec_driver_sql(made)
    yield engine
    with engine.begin() as connection:
        what = "EXTENSION" if has_it else "TYPE"
        connection.exec_driver_sql(f"DROP {what} vector CASCADE")


def test_pgvector_is_used_where_it_is(tmp_path: Path, with_pgvector: sa.Engine) -> None:
    """`vector(n)`, in the text that it reads; loading again changes nothing."""
    spec = job(target={"conn_id": "t", "table": "pg_vectors"})
    run = Run(tmp_path, spec, line(IDS[0], BASE64))

    first, second = run.load(with_pgvector), run.load(with_pgvector)

    query = "SELECT format_type(atttypid, atttypmod), embedding::text FROM pg_vectors, pg_attribute"
    where = "WHERE attrelid = 'pg_vectors'::regclass AND attname = 'embedding'"
    with with_pgvector.connect() as connection:
        ((kind, text),) = connection.execute(sa.text(f"{query} {where}"))
    assert kind == f"vector({SIZE})"
    assert np.array(json.loads(text), dtype="<f4").tobytes() == VECTOR.tobytes()
    assert (first.changed_results, second.changed_results) == (1, 0)


def test_a_pgvector_column_of_another_length_is_an_error(
    tmp_path: Path, with_pgvector: sa.Engine
) -> None:
    """Both lengths are named, and nothing is altered."""
    with with_pgvector.begin() as connection:
        columns = "id bigint primary key, embedding vector(512)"
        connection.execute(sa.text(f"CREATE TABLE short_vectors ({columns})"))
    run = Run(
        tmp_path,
        job(target={"conn_id": "t", "table": "short_vectors"}),
        line(IDS[0], BASE64),
    )

    with pytest.raises(ConfigurationError, match=r"found vector\(512\), expected real\[\] or"):
        run.load(with_pgvector)

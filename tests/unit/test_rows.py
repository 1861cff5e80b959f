"""Extract copies a partition's rows into an immutable snapshot, whatever the source holds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from include.artifacts import Artifacts
from include.column_types import column_texts
from include.errors import ConfigurationError, TransientError
from include.extraction import in_sample
from include.interval import interval_text
from include.job_spec import JobSpec
from include.row_identity import as_text, key_digest
from include.rows import extract_sql
from include.snapshot import Snapshot, SnapshotWriter

START, END = datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 11, 2, tzinfo=UTC)
ROOT = Path(__file__).parents[2]


def job(sql: str, *key: str, prompt: str | None = None, **more: Any) -> JobSpec:
    """Return a job that reads rows by `sql`."""
    return JobSpec.model_validate(
        {
            "name": "sample",
            "source": {"conn_id": "source_db", "sql": sql, "key": key or ("id",)},
            "request": {
                "endpoint": "/v1/responses",
                "model": "m",
                "prompt": prompt or "{{ id }}",
            },
            "target": {"conn_id": "results_db", "table": "labels"},
            **more,
        }
    )


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    """Artifacts below a folder of this test."""
    return Artifacts(tmp_path / "artifacts")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    """An empty SQLite database."""
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'source.db'}")
    yield engine
    engine.dispose()


def extract(engine: sa.Engine, spec: JobSpec, artifacts: Artifacts) -> Snapshot:
    """Extract the one day that the tests use."""
    return extract_sql(engine, spec, START, END, artifacts=artifacts, directory="sample/run")


def read(artifacts: Artifacts, path: str | None) -> pa.Table:
    """Return a Parquet artifact as a table."""
    assert path is not None
    with artifacts.open(path) as stream:
        return pq.read_table(stream)


def fill(engine: sa.Engine, rows: list[tuple[Any, ...]], columns: str = "id, body") -> None:
    """Make the table `t` without column types, with these rows."""
    marks = ", ".join("?" for _ in columns.split(","))
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE TABLE t ({columns})")
        if rows:
            connection.exec_driver_sql(f"INSERT INTO t VALUES ({marks})", rows)  # noqa: S608


def test_rows_of_the_interval_in_order(engine: sa.Engine, artifacts: Artifacts) -> None:
    """The interval is half open, and the snapshot keeps the order of the SQL."""
    moments = ["2026-10-31T23:59:59Z", "2026-11-01T00:00:00Z", "2026-11-01T23:59:59Z"]
    fill(engine, [(n, at) for n, at in enumerate([*moments, "2026-11-02T00:00:00Z"])], "id, at")
    sql = "SELECT id FROM t WHERE at >= :interval_start AND at < :interval_end ORDER BY id DESC;"

    snapshot = extract(engine, job(sql), artifacts)

    assert read(artifacts, snapshot.path).column("id").to_pylist() == [2, 1]
    assert (snapshot.rows, snapshot.rejections_file) == (2, None)
    assert Snapshot.from_json(snapshot.to_json()) == snapshot


def test_untyped_columns_become_text(engine: sa.Engine, artifacts: Artifacts) -> None:
    """A column of several kinds is text, also when the kinds meet thousands of rows apart."""
    values: list[Any] = [5] * 2_500 + [None, 2.5, "x", b"caf\xc3\xa9", b"\xff", 2**63 - 1]
    fill(engine, list(enumerate(values)))

    table = read(artifacts, extract(engine, job("SELECT * FROM t"), artifacts).path)

    assert table.schema.types == [pa.int64(), pa.string()]
    assert table.column("body").to_pylist()[:2_501] == ["5"] * 2_500 + [None]
    assert table.column("body").to_pylist()[2_501:] == [
        "2.5", "x", "café", "\\xff", "9223372036854775807"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, None], pa.int64()),
        ([1.5, None], pa.float64()),
        (["a"], pa.string()),
        ([None], pa.string()),
        ([1, 1.5], pa.string()),
    ],
)
def test_columns_of_one_kind_keep_it(
    engine: sa.Engine, artifacts: Artifacts, values: list[Any], kind: pa.DataType
) -> None:
    """Whole numbers, numbers and texts keep their type and values."""
    fill(engine, list(enumerate(values)))

    column = read(artifacts, extract(engine, job("SELECT * FROM t"), artifacts).path).column("body")

    assert column.type == kind
    expected = values if kind != pa.string() else [v if v is None else str(v) for v in values]
    assert column.to_pylist() == expected


SCALARS = st.one_of(
    st.none(), st.text(), st.integers(), st.booleans(), st.floats(allow_nan=False),
    st.binary(), st.dates(), st.decimals(allow_nan=False, allow_infinity=False, places=2),
    st.datetimes(), st.datetimes(timezones=st.just(UTC)), st.lists(st.integers()),
)  # fmt: skip


@given(st.lists(st.lists(SCALARS, min_size=1, max_size=4), min_size=1, max_size=5))
def test_text_of_a_value_does_not_depend_on_its_column(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[Any]]
) -> None:
    """However the column's type widens, a value reads back as the same text."""
    writer = SnapshotWriter(tmp_path_factory.mktemp("snapshot"), ["x"], [pa.null()])
    for batch in batches:
        writer.write([batch])
    writer.close()

    column = pq.read_table(writer.path).column("x").combine_chunks()

    values = [value for batch in batches for value in batch]
    expected = [None if v is None else as_text(v) for v in values]
    safe = [t if t is None else t.encode("utf-8", "backslashreplace").decode() for t in expected]
    assert column_texts(column) == safe


def test_texts_of_values() -> None:
    """Booleans, times and JSON have one form, without Python's spelling."""
    values = [True, date(2026, 1, 2), START, START.replace(tzinfo=None), {"a": [1, "é"]}]

    assert [as_text(value) for value in values] == [
        "true", "2026-01-02", "2026-11-01T00:00:00Z", "2026-11-01T00:00:00", '{"a":[1,"é"]}'
    ]  # fmt: skip
    assert as_text(Decimal("1E+3")) == "1000"


def test_rejections(engine: sa.Engine, artifacts: Artifacts) -> None:
    """Null keys, repeated keys and broken text are listed once for all rows of a key."""
    broken = b"bad \xff text"
    rows = [(1, "a"), (2, "b"), (None, "c"), (2, "d"), (3, broken), (2, "e"), (None, "f"), (4, "g")]
    fill(engine, rows)

    sql = "SELECT id, CAST(body AS TEXT) AS body FROM t ORDER BY rowid"
    snapshot = extract(engine, job(sql), artifacts)

    found = read(artifacts, snapshot.rejections_file).drop_columns("_message").to_pylist()
    assert [tuple(row.values()) for row in found] == [
        (1, "duplicate_key", 3), (2, "null_key", 2), (3, "duplicate_key", 0),
        (4, "bad_text", 1), (5, "duplicate_key", 0), (6, "null_key", 0),
    ]  # fmt: skip
    assert (snapshot.rows, snapshot.duplicate_keys) == (8, 1)


def test_rejections_far_apart(engine: sa.Engine, artifacts: Artifacts) -> None:
    """Rows of one key are found however many rows lie between them."""
    rows = [(number, "x") for number in range(2_500)]
    fill(engine, [*rows, (0, "y"), (None, "z"), (2_499, "y")])

    snapshot = extract(engine, job("SELECT * FROM t ORDER BY rowid"), artifacts)

    found = read(artifacts, snapshot.rejections_file).drop_columns("_message").to_pylist()
    assert [tuple(row.values()) for row in found] == [
        (0, "duplicate_key", 2), (2_499, "duplicate_key", 2), (2_500, "duplicate_key", 0),
        (2_501, "null_key", 1), (2_502, "duplicate_key", 0),
    ]  # fmt: skip


def test_a_refused_source_is_not_left_locked(
    engine: sa.Engine, artifacts: Artifacts, tmp_path: Path
) -> None:
    """After an error in the middle of the rows, others can write into the source at once."""
    fill(engine, [(n, "x") for n in range(3_000)])

    with pytest.raises(ConfigurationError) as caught:
        extract(engine, job("SELECT body FROM t"), artifacts)

    assert caught.tb is not None  # it keeps the cursor alive, as a task that logs its error does
    url = f"sqlite:///{tmp_path / 'source.db'}"
    other = sa.create_engine(url, connect_args={"timeout": 0})
    with other.begin() as connection:
        connection.exec_driver_sql("DELETE FROM t")
    other.dispose()


def test_keys_of_several_columns(engine: sa.Engine, artifacts: Artifacts) -> None:
    """A key is all of its columns; values that join to the same text stay apart."""
    fill(engine, [("a", "b,c"), ("a,b", "c"), ("a", None), ("a", "b,c")])

    snapshot = extract(engine, job("SELECT * FROM t", "id", "body"), artifacts)

    found = read(artifacts, snapshot.rejections_file).drop_columns("_message").to_pylist()
    assert [(row["_row"], row["_reason"]) for row in found] == [
        (0, "duplicate_key"), (2, "null_key"), (3, "duplicate_key")
    ]  # fmt: skip


def test_sample_grows(engine: sa.Engine, artifacts: Artifacts) -> None:
    """A sample has about its share of the rows, and a larger one contains the smaller."""
    fill(engine, [(number, "x") for number in range(3_000)])

    taken = {}
    for share in ("0.1", "0.5", "1"):
        snapshot = extract(engine, job("SELECT * FROM t", sample=share), artifacts)
        taken[share] = set(read(artifacts, snapshot.path).column("id").to_pylist())
        assert snapshot.rows + snapshot.unsampled == 3_000

    assert taken["0.1"] < taken["0.5"] < taken["1"]
    assert 220 < len(taken["0.1"]) < 380
    assert all(in_sample(key_digest(bytes([n])), Decimal(1)) for n in range(256))


def test_extracting_again_gives_the_same_file(engine: sa.Engine, artifacts: Artifacts) -> None:
    """The same rows give the same name; other rows leave the first file as it was."""
    fill(engine, [(1, "a")])
    first = extract(engine, job("SELECT * FROM t"), artifacts)
    again = extract(engine, job("SELECT * FROM t"), artifacts)
    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO t VALUES (2, 'b')")

    second = extract(engine, job("SELECT * FROM t"), artifacts)

    assert first == again
    assert second.path != first.path
    assert read(artifacts, first.path).num_rows == 1


def test_no_rows(engine: sa.Engine, artifacts: Artifacts) -> None:
    """An interval without rows is a snapshot without rows."""
    fill(engine, [])

    snapshot = extract(engine, job("SELECT * FROM t"), artifacts)

    assert read(artifacts, snapshot.path).num_rows == 0
    assert snapshot.columns == ("id", "body")


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("SELECT * FROM missing", "no such table: missing"),
        ("SELEC 1", "syntax error"),
        ("SELECT body AS key FROM t", "source.key names `id`"),
        ("SELECT id, id FROM t", "`id` twice"),
        ("SELECT id, body AS _body FROM t", "`_body`"),
        ("DELETE FROM t", "readonly"),
    ],
)
def test_unusable_sql(engine: sa.Engine, artifacts: Artifacts, sql: str, expected: str) -> None:
    """SQL that cannot serve the job is a configuration error with job and file, and no row text."""
    fill(engine, [(1, "canary")])

    with pytest.raises(ConfigurationError) as caught:
        extract(engine, job(sql), artifacts)

    assert str(caught.value).startswith("sample: ")
    assert "rows.sql" in str(caught.value)
    assert expected in str(caught.value)
    assert "canary" not in str(caught.value)


def test_sqlite_stays_writable_afterwards(engine: sa.Engine, artifacts: Artifacts) -> None:
    """Reading only is for the extract; the pooled connection is given back as it was."""
    fill(engine, [(1, "a")])
    extract(engine, job("SELECT * FROM t"), artifacts)

    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO t VALUES (2, 'b')")
        assert connection.exec_driver_sql("SELECT count(*) FROM t").scalar() == 2


def test_interval_text_needs_a_zone() -> None:
    """A naive time has no place on the time line."""
    assert interval_text(START) == "2026-11-01T00:00:00Z"
    with pytest.raises(ValueError, match="aware"):
        interval_text(START.replace(tzinfo=None))


def test_extract_and_build_do_not_import_pandas(tmp_path: Path) -> None:
    """Importing pandas would cost more than the work of a small task."""
    code = """
import sqlite3, sys
from datetime import UTC, datetime
from pathlib import Path
from sqlalchemy import create_engine
from include.artifacts import Artifacts
from include.job_spec import load_job
from include.request_file import build_requests
from include.rows import extract_sql
folder = Path(sys.argv[1])
db = sqlite3.connect(folder / "s.db")
db.execute("CREATE TABLE tickets (ticket_id, created_at, channel, customer_tier, subject, body)")
moment = "2026-11-01T00:00:00Z"
db.execute("INSERT INTO tickets VALUES (1, ?, 'a', 'b', 'c', 'd')", (moment,))
db.execute("INSERT INTO tickets VALUES (2, ?, 'a', 'b', 'c', NULL)", (moment,))
db.execute("INSERT INTO tickets VALUES (NULL, ?, 'a', 'b', 2.5, 'd')", (moment,))
db.commit()
spec, artifacts = load_job("ticket_triage"), Artifacts(folder)
snapshot = extract_sql(create_engine(f"sqlite:///{folder / 's.db'}"), spec,
    datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 11, 2, tzinfo=UTC),
    artifacts=artifacts, directory="run")
result = build_requests(spec, snapshot=snapshot, artifacts=artifacts, directory="run/round-1",
    known=lambda ids: set())
assert (result.shards[0].requests, result.rejected) == (1, 2), result
sys.exit("pandas was imported" if "pandas" in sys.modules else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, check=False
    )

    assert (done.returncode, done.stderr.decode()) == (0, "")


@pytest.fixture
def postgres(empty_postgres_url: str) -> Iterator[sa.Engine]:
    """A PostgreSQL database with an empty table `t` of many types."""
    engine = sa.create_engine(empty_postgres_url)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE t (id bigint, at timestamptz, at_text text, day date, amount numeric, "
            "data jsonb, ok boolean, body text, nothing integer, local timestamp, raw bytea)"
        )
    yield engine
    engine.dispose()


PG_INSERT = (
    "INSERT INTO t SELECT n, '2026-11-01T00:00:00Z'::timestamptz + n * interval '6 hours', "
    "to_char(timestamp '2026-11-01' + n * interval '6 hours', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'), "
    "'2026-11-01', 1.50, '{\"a\": [1]}', true, 'text', null, '2026-11-01', 'abc' "
    "FROM generate_series(0, 4) n"
)


@pytest.mark.postgres
@pytest.mark.parametrize("driver", ["postgresql+psycopg2", "postgresql+psycopg"])
@pytest.mark.parametrize("column", ["at", "at_text", "local"])
def test_postgresql(postgres: sa.Engine, artifacts: Artifacts, driver: str, column: str) -> None:
    """One SQL text serves timestamptz, timestamp and text columns; types are those of Arrow."""
    with postgres.begin() as connection:
        connection.exec_driver_sql(PG_INSERT)
        connection.exec_driver_sql("UPDATE t SET local = at AT TIME ZONE 'UTC'")
    engine = sa.create_engine(postgres.url.set(drivername=driver))
    between = f"{column} >= :interval_start AND {column} < :interval_end"
    sql = "SELECT * FROM t WHERE " + between + " AND body LIKE '%' ORDER BY id"  # noqa: S608

    with engine.connect() as connection:  # a session whose zone is not UTC
        connection.exec_driver_sql("SET TIME ZONE 'Asia/Tokyo'")
        connection.commit()
    table = read(artifacts, extract(engine, job(sql), artifacts).path)
    engine.dispose()

    assert table.column("id").to_pylist() == [0, 1, 2, 3]
    assert {field.name: str(field.type) for field in table.schema} == {
        "id": "int64", "at": "timestamp[us, tz=UTC]", "at_text": "string", "day": "date32[day]",
        "amount": "string", "data": "string", "ok": "bool", "body": "string", "nothing": "int64",
        "local": "timestamp[us]", "raw": "string",
    }  # fmt: skip
    first = table.slice(0, 1).to_pylist()[0]
    assert first["at"] == START
    assert (first["amount"], json.loads(first["data"])) == ("1.50", {"a": [1]})
    assert (first["day"], first["nothing"], first["raw"]) == (date(2026, 11, 1), None, "abc")


@pytest.mark.postgres
@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("SELECT * FROM missing", 'relation "missing" does not exist'),
        ("SELECT id, CAST(body AS integer) AS n FROM t", "message withheld"),
        ("DELETE FROM t RETURNING id", "rows.sql"),
    ],
)
def test_postgresql_errors_hold_no_row_text(
    postgres: sa.Engine, artifacts: Artifacts, sql: str, expected: str
) -> None:
    """PostgreSQL quotes values in some messages; those are withheld."""
    with postgres.begin() as connection:
        connection.exec_driver_sql("INSERT INTO t (id, body) VALUES (1, 'canary')")

    with pytest.raises(ConfigurationError) as caught:
        extract(postgres, job(sql), artifacts)

    assert expected in str(caught.value)
    assert "canary" not in str(caught.value)


def test_unreachable_database(artifacts: Artifacts) -> None:
    """A database that is not there may be there later."""
    engine = sa.create_engine("postgresql+psycopg2://nobody@127.0.0.1:1/none")

    with pytest.raises(TransientError, match="cannot be reached"):
        extract(engine, job("SELECT 1 AS id"), artifacts)

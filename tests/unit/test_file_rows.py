"""Extract from files, on this machine and on a server that speaks S3 over HTTP."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from include.artifacts import Artifacts
from include.errors import ConfigurationError, JobSpecError, TransientError
from include.extraction import Extraction
from include.file_rows import extract_files
from include.generated_rows import extract_generated
from include.job_spec import JobSpec, Source, load_job
from include.object_storage import remote_path
from include.rejected_rows import rejections_by_row
from include.snapshot import Snapshot

START = datetime(2026, 11, 3, tzinfo=UTC)
END = START + timedelta(days=1)


def job(path: str, key: Any = "id", prompt: str | None = "{{ body }}", **source: Any) -> JobSpec:
    request = {"endpoint": "/v1/responses", "model": "gpt-5-nano", "prompt": prompt}
    return JobSpec.model_validate(
        {
            "name": "notes",
            "source": {"path": path, "key": key, **source},
            "request": request,
            "target": {"conn_id": "db", "table": "labels"},
        }
    )


class Folder:
    """A place for source files, and what becomes of them."""

    def __init__(self, uri: str, scratch: Path) -> None:
        self.uri = uri
        self.artifacts = Artifacts(scratch)

    def write(self, name: str, data: bytes | str) -> None:
        path = remote_path(self.uri) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())

    def write_table(self, name: str, table: pa.Table, **options: Any) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, **options)
        self.write(name, sink.getvalue().to_pybytes())

    def extract(self, pattern: str, **changes: Any) -> Snapshot:
        spec = job(f"{self.uri}/{pattern}", **changes)
        return self.run(spec)

    def run(self, spec: JobSpec) -> Snapshot:
        return extract_files(
            remote_path, spec, START, END, artifacts=self.artifacts, directory="notes"
        )

    def rows(self, snapshot: Snapshot) -> list[dict[str, Any]]:
        with self.artifacts.open(snapshot.path) as stream:
            found: list[dict[str, Any]] = pq.read_table(stream).to_pylist()
        return found

    def refused(self, snapshot: Snapshot) -> dict[int, tuple[str, str, int]]:
        if snapshot.rejections_file is None:
            return {}
        with self.artifacts.open(snapshot.rejections_file) as stream:
            found = rejections_by_row(pq.read_table(stream).to_batches())
        return {row: (why.reason, why.message, why.source_rows) for row, why in found.items()}


@pytest.fixture
def local(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "source"), tmp_path / "artifacts")


@pytest.fixture(params=["local", "file", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    uris = {"local": str(tmp_path / "source"), "file": (tmp_path / "source").as_uri()}
    uri = uris.get(request.param) or f"{request.getfixturevalue('s3_bucket')}/source"
    return Folder(uri, tmp_path / "artifacts")


def test_the_files_of_an_interval_in_the_order_of_their_names(folder: Folder) -> None:
    """Only those of the day, sorted, plain or compressed; marks such as _SUCCESS are no rows."""
    folder.write("2026-11-02/a.jsonl", '{"id": 1, "body": "other day"}\n')
    folder.write("2026-11-03/b.jsonl", '{"id": 3, "body": "three"}\n{"id": 4, "body": "four"}')
    folder.write("2026-11-03/a.jsonl.gz", gzip.compress(b'{"id": 2, "body": "two"}\n'))
    folder.write("2026-11-03/_marks.jsonl", "x")
    folder.write("2026-11-03/readme.txt", "x")

    snapshot = folder.extract("{{ds}}/*.jsonl*", format="jsonl")

    assert folder.rows(snapshot) == [
        {"id": 2, "body": "two"},
        {"id": 3, "body": "three"},
        {"id": 4, "body": "four"},
    ]
    assert snapshot.rejections_file is None


def test_parquet_keeps_its_types(folder: Folder) -> None:
    """What a snapshot can hold stays as it is; nested values, decimals and the rest are text."""
    moment = datetime(2026, 11, 3, 12, tzinfo=UTC)
    table = pa.table(
        {
            "id": pa.array([1, 2], pa.int32()),
            "body": pa.array(["one", "one"]).dictionary_encode(),
            "at": pa.array([moment, None], pa.timestamp("ns", "Europe/Berlin")),
            "day": [date(2026, 11, 3)] * 2,
            "price": [Decimal("1.50"), None],
            "tags": [["a", "b"], None],
            "none": pa.array([None, None], pa.float32()),
            "_internal": ["x", "y"],
        }
    )
    folder.write_table("x.parquet", table)

    snapshot = folder.extract("x.parquet")

    first, second = folder.rows(snapshot)
    assert first == {
        "id": 1,
        "body": "one",
        "at": moment,
        "day": date(2026, 11, 3),
        "price": "1.50",
        "tags": '["a","b"]',
        "none": None,
    }
    assert second["at"] is None
    with folder.artifacts.open(snapshot.path) as stream:
        assert pq.read_schema(stream).field("none").type == pa.float64()


def test_csv_is_text(folder: Folder) -> None:
    """Leading zeros stay, quoted line ends are part of a field, an empty field is empty text."""
    text = '\ufeffid,title,body\n007,,"two\nlines"\n\n008,"a ""b""",\u2028x\n'
    folder.write("x.csv.gz", gzip.compress(text.encode()))

    snapshot = folder.extract("x.csv.gz")

    assert folder.rows(snapshot) == [
        {"id": "007", "title": "", "body": "two\nlines"},
        {"id": "008", "title": 'a "b"', "body": "\u2028x"},
    ]


def test_the_same_files_make_the_same_snapshot(local: Folder) -> None:
    """Byte for byte: a snapshot is named by its content."""
    local.write("b.csv", "id,body\n2,two\n")
    local.write("a.csv", "body,id\none,1\n")

    first, second = (local.extract("*.csv") for _ in range(2))

    assert first == second
    assert [row["id"] for row in local.rows(first)] == ["1", "2"]


def test_broken_json_lines_are_refused_alone(local: Folder, caplog: Any) -> None:
    """Each is named with file and line, the others are taken; no text of a row is told."""
    lines = [
        b'{"id": 1, "body": "good"}',
        b'{"id": 2, "body": "secret',
        b"[1, 2]",
        b"",
        b'{"id": 5, "body": NaN}',
        b'{"id": 6, "body": "bad \xff text"}',
        b'{"id": 7, "other": "no body"}',
        b'{"body": "no key"}',
    ]
    local.write("x.jsonl", b"\n".join(lines))

    snapshot = local.extract("*.jsonl")

    name = f"{local.uri}/x.jsonl"
    message = (
        f"no row: {name}, line 2: is not valid JSON at character 19; {name}, line 3: is a JSON "
        f"list, expected an object; {name}, line 5: is not valid JSON"
    )
    assert local.refused(snapshot) == {
        1: ("broken_row", message, 3),
        2: ("broken_row", message, 0),
        3: ("broken_row", message, 0),
        4: ("bad_text", local.refused(snapshot)[4][1], 1),
        6: ("null_key", local.refused(snapshot)[6][1], 1),
    }
    assert local.rows(snapshot)[5] == {"id": 7, "body": None, "other": "no body"}
    assert "secret" not in caplog.text
    assert "line 5" in caplog.text


def test_ragged_csv_lines_are_refused_alone(local: Folder) -> None:
    """A field too many or too few, a stray quote: with the line of the file."""
    local.write("x.csv", 'id,body\n1,"a\nb"\n2\n3,c,d\n4,"e"f\n5,g\n,h\n')

    snapshot = local.extract("x.csv")

    refused = local.refused(snapshot)
    place = f"{local.uri}/x.csv, line"
    assert refused[1][0] == "broken_row"
    assert refused[1][1].startswith(
        f"no row: {place} 4: 1 fields instead of 2; {place} 5: 3 fields instead of 2; {place} 6: "
    )
    assert refused[1][2] == 3
    assert [why[0] for why in refused.values()].count("null_key") == 1
    assert [row["id"] for row in local.rows(snapshot)] == ["1", None, None, None, "5", None]


@pytest.mark.parametrize(
    ("text", "line"), [('id,body\n1,a\n2,"b\n3,c\n4,d\n', 3), ('id,"body\n1,a\n2,b\n', 1)]
)
def test_a_quote_that_is_never_closed_refuses_the_partition(
    local: Folder, text: str, line: int
) -> None:
    """All rows after it are inside of it: one line in the failures would stand for any number."""
    local.write("x.csv", text)

    with pytest.raises(ConfigurationError, match=rf"x\.csv, line {line}: a quote .* never closed"):
        local.extract("x.csv")


def test_broken_csv_of_several_lines_names_them_all(local: Folder) -> None:
    """A stray quote in a field that goes over lines: whoever mends it looks at all of them."""
    local.write("x.csv", 'id,body\n1,a\n2,"b\n3,"c"\n4,d\n')

    snapshot = local.extract("x.csv")

    assert [row["id"] for row in local.rows(snapshot)] == ["1", None, "4"]
    assert "x.csv, lines 3 to 4: " in local.refused(snapshot)[1][1]


def test_a_file_without_the_key_is_named(local: Folder) -> None:
    """With the columns that it has; so is a file that differs from the ones before it."""
    local.write_table("a.parquet", pa.table({"id": [1], "body": ["x"]}))
    local.write_table("b.parquet", pa.table({"ident": [1], "body": ["x"]}))
    local.write_table("c.parquet", pa.table({"id": [1], "body": ["x"], "more": [1]}))

    with pytest.raises(
        ConfigurationError, match=r"names `id`, which .*/b\.parquet does not .*iden"
    ):
        local.extract("[ab].parquet")
    with pytest.raises(ConfigurationError, match=r"/c\.parquet has other .* has more more\."):
        local.extract("[ac].parquet")
    with pytest.raises(ConfigurationError, match=r"prompt.md:1: {{ text }} is no column of .*/a\."):
        local.extract("a.parquet", prompt="{{ text }}")


def test_no_line_has_the_key(local: Folder) -> None:
    """The mistake is in the job, not in every row."""
    local.write("a.jsonl", '{"ident": 1, "body": "x"}\n')

    with pytest.raises(ConfigurationError, match=r"source.key names `id`, which .*\*\.jsonl"):
        local.extract("*.jsonl")


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("x.parquet", b"PAR1 no parquet", "is no Parquet file"),
        (
            "x.csv.gz",
            gzip.compress(b"id,body\n" + b"1,x\n" * 9_999, mtime=0)[:-40],
            "no whole gzip file",
        ),
        ("x.jsonl.gz", b"no gzip", "no whole gzip file"),
        ("x.csv", b"", "has no header"),
    ],
)
def test_a_damaged_file_refuses_the_partition(
    local: Folder, name: str, data: bytes, said: str
) -> None:
    """Nobody knows what it would have held; the error names the file, nothing is published."""
    local.write(name, data)

    with pytest.raises(ConfigurationError, match=rf"{name}.*{said}"):
        local.extract(name)


def test_no_file_is_an_error_unless_the_job_says_otherwise(folder: Folder) -> None:
    """An interval without files may be one whose files are late."""
    folder.write("other.csv", "id,body\n")

    with pytest.raises(TransientError, match=r"there is no file .*2026-11-03.*missing: empty"):
        folder.extract("{{ds}}/*.csv")
    with pytest.raises(TransientError, match="there is no file"):
        folder.extract("{{ ds_nodash }}.csv")
    assert folder.extract("{{ds}}/*.csv", missing="empty").rows == 0


def test_folders_may_have_wildcards(folder: Folder) -> None:
    """Each part of the path is matched by itself."""
    for name in ("eu/2026-11-03/a.csv", "us/2026-11-03/b.csv", "us/2026-11-02/c.csv", "d.csv"):
        folder.write(name, f"id,body\n{name},x\n")

    snapshot = folder.extract("[eu]*/{{ds}}/?.csv")

    assert [row["id"][:2] for row in folder.rows(snapshot)] == ["eu", "us"]


def test_a_store_that_is_away_is_transient(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No answer from S3 is no reason to give the job up, and no reason to load nothing."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")

    with pytest.raises(TransientError, match=f"{s3_bucket}/x.csv could not be read"):
        Folder(s3_bucket, tmp_path).extract("x.csv", missing="empty")


def test_a_store_that_refuses_is_not_empty(local: Folder) -> None:
    """A folder that may not be listed is no folder without files."""
    local.write("2026-11-03/x.csv", "id,body\n1,x\n")
    closed = Path(local.uri) / "2026-11-03"

    class Refusing(LocalFileSystem):  # type: ignore[misc]
        def ls(self, path: str, **kwargs: Any) -> Any:
            if str(path).rstrip("/") == str(closed):
                raise PermissionError(path)
            return super().ls(path, **kwargs)

    def refusing(uri: str) -> Any:
        return SimpleNamespace(fs=Refusing(skip_instance_cache=True), path=uri)

    for pattern in ("*/*.csv", "{{ds}}/*.csv", "*/?.csv"):
        spec = job(f"{local.uri}/{pattern}", missing="empty")
        with pytest.raises(ConfigurationError, match="may not be read"):
            extract_files(refusing, spec, START, END, artifacts=local.artifacts, directory="notes")


def test_types_widen_over_files(local: Folder) -> None:
    """A column of numbers in one file and text in the next is text in all rows."""
    local.write("a.jsonl", '{"id": 1, "body": {"b": [1]}}\n' * 1)
    local.write("b.jsonl", '{"id": "x", "body": null}\n{"id": 123456789012345678901, "body": 1}\n')

    rows = local.rows(local.extract("*.jsonl"))

    assert [row["id"] for row in rows] == ["1", "x", "123456789012345678901"]
    assert [row["body"] for row in rows] == ['{"b":[1]}', None, "1"]


def test_a_sample_and_duplicates_are_as_of_sql(local: Folder) -> None:
    """The key chooses the sample; rows that share a key over two files are both refused."""
    local.write("a.csv", "id,body\n" + "".join(f"{n},x\n" for n in range(2_500)))
    local.write("b.csv", "id,body\n7,y\n")
    spec = job(f"{local.uri}/*.csv")

    whole = local.run(spec)
    part = local.run(spec.model_copy(update={"sample": Decimal("0.2")}))

    assert (whole.rows, whole.duplicate_keys) == (2_501, 1)
    assert local.refused(whole)[7][2] == 2
    assert 350 < part.rows < 650
    assert part.rows + part.unsampled == 2_501


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"path": "s3://b/{{ dsx }}.csv"}, r"{{dsx}} is no placeholder; allowed: {{ds}}"),
        ({"path": "s3://b/{{ ds | upper }}.csv"}, "there are no filters"),
        ({"path": "s3://u:secret@b/x.csv"}, "must not hold a password"),
        ({"path": "data/x.csv"}, "an absolute path"),
        ({"path": "/data/../x.csv"}, "must name files"),
        ({"path": "/data/"}, "must name files"),
        ({"path": "/data/**/x.csv"}, "must name files"),
        ({"path": "/data/*"}, "format is missing"),
        ({"path": "/data/x.xml"}, "format is missing"),
        ({"path": "/data/x.csv", "format": "xml"}, "format"),
        ({"path": "/data/x.csv", "missing": "skip"}, "missing"),
        ({"path": "/data/x.csv", "sql": "SELECT 1", "conn_id": "db"}, "expected one of sql"),
        ({"sql": "SELECT 1"}, "conn_id is missing"),
        ({"sql": "SELECT 1", "conn_id": "db", "format": "csv"}, "for a path only"),
        ({}, "expected one of sql"),
    ],
)
def test_a_wrong_source_is_refused_with_the_job(source: dict[str, Any], said: str) -> None:
    """When Airflow reads the DAG, not when it runs."""
    spec = {
        "name": "notes",
        "source": {"key": "id", **source},
        "request": {"endpoint": "/v1/responses", "model": "m", "prompt": "{{ body }}"},
        "target": {"conn_id": "db", "table": "labels"},
    }

    with pytest.raises(ValueError, match=said):
        JobSpec.model_validate(spec)


def test_the_digest_of_an_sql_job_stays() -> None:
    """New forms of sources must not send an older job's rows again; files shape requests."""
    sql = Source(conn_id="a", sql="S", key=("id",))

    assert sql.shape == {"conn_id": "a", "sql": "S", "key": ("id",)}
    assert job("/x.csv").digest != job("/y.csv").digest
    assert job("/x.csv").digest == job("/x.csv", missing="empty").digest


# rows.py

JOB = """\
source: {rows: rows.py, key: id}
request: {endpoint: /v1/responses, model: gpt-5-nano, prompt: prompt.md}
target: {conn_id: results_db, table: labels}
"""


class Generated:
    """A job whose rows come from Python."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = Folder("", root / "artifacts")
        (root / "notes").mkdir()
        (root / "notes" / "job.yaml").write_text(JOB)
        (root / "notes" / "prompt.md").write_text("{{ body }}")

    def write(self, source: str) -> None:
        (self.root / "notes" / "rows.py").write_text(source)

    def spec(self) -> JobSpec:
        return load_job("notes", self.root)

    def extract(self, spec: JobSpec | None = None) -> Snapshot:
        return extract_generated(
            self.root,
            spec or self.spec(),
            START,
            END,
            artifacts=self.folder.artifacts,
            directory="notes",
        )


@pytest.fixture
def generated(tmp_path: Path) -> Generated:
    return Generated(tmp_path)


def test_rows_of_python(generated: Generated) -> None:
    """The function gets the interval as times; columns have the types of their values."""
    generated.write(
        "from collections.abc import Iterator\n"
        "def rows(interval_start, interval_end) -> Iterator[dict]:\n"
        "    yield {'id': 1, 'body': interval_start.isoformat(), 'at': interval_end}\n"
        "    yield {'id': 2, 'body': 'two', 'more': 0.5}\n"
        "    yield ['no', 'row']\n"
    )

    snapshot = generated.extract()

    assert generated.folder.rows(snapshot)[:2] == [
        {"id": 1, "body": "2026-11-03T00:00:00+00:00", "at": END, "more": None},
        {"id": 2, "body": "two", "at": None, "more": 0.5},
    ]
    refused = generated.folder.refused(snapshot)
    assert refused == {
        2: (
            "broken_row",
            "no row: rows.py, row 3: is a list, expected a dict with names as text",
            1,
        )
    }
    assert generated.extract() == snapshot


def test_rows_py_is_pinned(generated: Generated) -> None:
    """A run goes on with the file that it was opened with, or not at all."""
    generated.write("def rows(interval_start, interval_end):\n    yield {'id': 1, 'body': 'x'}\n")
    spec = generated.spec()
    generated.write("def rows(interval_start, interval_end):\n    yield {'id': 2, 'body': 'x'}\n")

    with pytest.raises(ConfigurationError, match=r"rows\.py has changed since the run began"):
        generated.extract(spec)
    assert generated.spec().digest != spec.digest


@pytest.mark.parametrize(
    ("error", "kind"),
    [("KeyError('secret')", ConfigurationError), ("ConnectionError('secret')", TransientError)],
)
def test_an_error_of_rows_py_is_told_by_line(
    generated: Generated, error: str, kind: type[Exception]
) -> None:
    """A mistake is not tried again, a service that is away is; the message is not told."""
    generated.write(
        "def rows(interval_start, interval_end):\n"
        "    yield {'id': 1, 'body': 'x'}\n"
        f"    raise {error}\n"
    )

    with pytest.raises(kind, match=r"rows\.py, line 3, raised \w+Error\.") as caught:
        generated.extract()

    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def row(a, b): pass", r"rows\.py: must define `def rows\(interval_start"),
        ("def rows(:", r"rows\.py:1: is not valid Python"),
        ("", r"rows\.py: is empty"),
        (None, r"job\.yaml:1: there is no file rows\.py"),
    ],
)
def test_a_wrong_rows_py_is_an_error_of_the_job(
    generated: Generated, source: str | None, said: str
) -> None:
    """Like every other file of the folder."""
    if source is not None:
        generated.write(source)

    with pytest.raises(JobSpecError, match=said) as caught:
        generated.spec()

    assert "a problem in" in str(caught.value)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_memory_is_that_of_some_rows(
    local: Folder, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows go to the snapshot a thousand at a time, never all at once."""
    count = 5_000
    rows = [{"id": n, "body": f"note {n}"} for n in range(count)]
    if suffix == "parquet":
        local.write_table("x.parquet", pa.Table.from_pylist(rows))
    elif suffix == "csv":
        local.write("x.csv", "id,body\n" + "".join(f"{r['id']},{r['body']}\n" for r in rows))
    else:
        local.write("x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    sizes: list[int] = []
    original = Extraction.add

    def counted(self: Extraction, taken: Any) -> None:
        sizes.append(len(taken))
        original(self, taken)

    monkeypatch.setattr(Extraction, "add", counted)

    snapshot = local.extract(f"x.{suffix}")

    assert snapshot.rows == sum(sizes) == count
    assert max(sizes) == 1_000

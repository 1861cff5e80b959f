"""Loading: every row in exactly one table, and twice is once."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.engine import Engine

from include.artifacts import Artifacts
from include.errors import ConfigurationError, PermanentError, TransientError
from include.job_spec import JobSpec
from include.loading import (
    LoadedRun,
    LoadReport,
    RoundFiles,
    RunFiles,
    known_custom_ids,
    load_run,
)
from include.table_writers import AnyWriter
from include.target_table import Family, create_tables, target_tables

START = datetime(2026, 1, 1, tzinfo=UTC)
END = START + timedelta(days=1)
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"type": "string"},
        "score": {"type": "number"},
        "n": {"type": "integer"},
        "good": {"type": "boolean"},
        "tags": {"type": "array"},
    },
}
OUTPUT = {
    "kind": pa.string(),
    "score": pa.float64(),
    "n": pa.int64(),
    "good": pa.bool_(),
    "tags": pa.string(),
}
ANSWER = {"kind": 'x,"é\n', "score": 0.1, "n": 2**63 - 1, "good": True, "tags": "[1]"}
Row = dict[str, Any]


def job(table: str = "results", key: tuple[str, ...] = ("id",)) -> JobSpec:
    """Return a job that loads into `table`."""
    return JobSpec.model_validate(
        {
            "name": "j",
            "source": {"conn_id": "s", "sql": "select 1", "key": list(key)},
            "request": {
                "endpoint": "/v1/responses",
                "model": "m",
                "prompt": "{{ text }}",
                "output_schema": SCHEMA,
            },
            "target": {"conn_id": "t", "table": table},
        }
    )


def done(key: Any, **values: Any) -> Row:
    """Return an outcome that succeeded."""
    return {"id": key, "_state": "succeeded", "_reason": ""} | ANSWER | values


def lost(key: Any, state: str = "failed", reason: str = "refusal") -> Row:
    """Return an outcome that did not."""
    return {"id": key, "_state": state, "_reason": reason, "_error_message": "no"}


def unchanged(report: LoadReport) -> int:
    """Return how many lines of both tables already were as they should be."""
    lines = report.loaded + report.failure_lines
    return lines - report.changed_results - report.changed_failures


def same(edges: list[Any], interval: tuple[datetime, ...]) -> bool:
    """Tell whether a line's times, which SQLite has as texts, are those of an interval."""
    times = [datetime.fromisoformat(one) if isinstance(one, str) else one for one in edges]
    return times == list(interval)


class Runs:
    """Loads runs into one database."""

    def __init__(self, engine: Engine, folder: Path, spec: JobSpec | None = None) -> None:
        self.engine = engine
        self.artifacts = Artifacts(folder)
        self.spec = spec or job()
        self.key_type = pa.int64()
        self._files = 0

    def load(
        self, *rounds: list[Row], rejected: list[Row] | None = None, **options: Any
    ) -> LoadReport:
        """Load a run whose rounds have these outcomes, one file a round."""
        files = []
        for number, rows in enumerate(rounds, 1):
            name = self._write(rows, {**OUTPUT, "_state": pa.string()})
            files.append(RoundFiles(number, (name,), (f"batch_{number}",)))
        path = self._write(rejected, {"_source_rows": pa.int64()}) if rejected else None
        return self.load_files(*files, rejected_file=path, **options)

    def load_files(
        self, *rounds: RoundFiles, rejected_file: str | None = None, **options: Any
    ) -> LoadReport:
        """Load a run of these files."""
        usual: dict[str, Any] = {"run_id": "r1", "interval_start": START, "interval_end": END}
        run = LoadedRun(**(usual | options))
        files = RunFiles(self.spec, rounds, rejected_file, self.artifacts)
        return load_run(self.engine, run, files)

    def _write(self, rows: list[Row], columns: dict[str, pa.DataType]) -> str:
        fields = dict.fromkeys(self.spec.source.key, self.key_type) | columns
        for name in ("_custom_id", "_reason", "_error_code", "_error_message"):
            fields[name] = pa.string()
        full = [{"_custom_id": f"c{row['id']}", "_source_rows": 1} | row for row in rows]
        self._files += 1
        name = f"{self._files}.parquet"
        with self.artifacts.create(name) as sink:
            pq.write_table(pa.Table.from_pylist(full, schema=pa.schema(fields)), sink)
        return name

    def rows(self, table: str, *columns: str) -> list[tuple[Any, ...]]:
        """Return columns of a table, by key."""
        order: list[sa.ColumnClause[Any]] = [sa.column(name) for name in self.spec.source.key]
        wanted: list[sa.ColumnClause[Any]] = [sa.column(name) for name in columns]
        query = sa.select(*wanted).select_from(sa.table(table)).order_by(*order)
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(query)]

    def lines(self, *interval: datetime) -> tuple[list[str], list[str]]:
        """Return the `custom_id`s of both tables, of one interval or of all."""
        found: list[list[str]] = []
        for name in (self.spec.target.table, self.spec.target.failures_table):
            is_there = sa.inspect(self.engine).has_table(name)
            columns = ("_custom_id", "_interval_start", "_interval_end")
            rows = self.rows(name, *columns) if is_there else []
            found.append([one for one, *edges in rows if not interval or same(edges, interval)])
        return found[0], found[1]

    def everything(self) -> list[list[tuple[Any, ...]]]:
        """Return all columns of both tables."""
        found = []
        for name in (self.spec.target.table, self.spec.target.failures_table):
            columns = [column["name"] for column in sa.inspect(self.engine).get_columns(name)]
            found.append(sorted(self.rows(name, *columns), key=repr))
        return found

    def ends(self) -> tuple[list[Any], list[Any]]:
        """Return the keys of both tables."""
        found = [
            [row[0] for row in self.rows(name, "id")]
            for name in (self.spec.target.table, self.spec.target.failures_table)
        ]
        return found[0], found[1]


@pytest.fixture(
    params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres),
            pytest.param("psycopg2", marks=pytest.mark.postgres), "any"]
)  # fmt: skip
def engine(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Engine]:
    """An empty database: SQLite, PostgreSQL by both drivers, and the way for any other."""
    if request.param in ("sqlite", "any"):
        if request.param == "any":
            monkeypatch.setattr("include.table_writers.SqliteWriter", TextTimeWriter)
        yield sa.create_engine(f"sqlite:///{tmp_path}/target.db")
        return
    url = sa.make_url(request.getfixturevalue("empty_postgres_url"))
    if request.param == "psycopg2":
        url = url.set(drivername="postgresql+psycopg2")
    found = sa.create_engine(url)
    yield found
    found.dispose()


class TextTimeWriter(AnyWriter):
    """The way for any database, on SQLite, whose time columns are texts."""

    def upsert(self, table: sa.Table, batches: Any, constants: Any) -> tuple[int, int]:
        """Write times as text."""
        fixed = {n: v.isoformat() if isinstance(v, datetime) else v for n, v in constants.items()}
        return super().upsert(table, batches, fixed)


@pytest.fixture
def runs(engine: Engine, tmp_path: Path) -> Runs:
    """Loads into an empty database."""
    return Runs(engine, tmp_path / "artifacts")


def test_the_index_is_there_after_every_load(runs: Runs) -> None:
    """The first load makes it anew of its rows; one that breaks off leaves it as it was."""

    def indexed() -> list[list[str | None]]:
        found = (
            sa.inspect(runs.engine).get_indexes(name) for name in ("results", "results_failures")
        )
        return [one["column_names"] for indexes in found for one in indexes]

    files = RoundFiles(
        1, (runs._write([done(1)], {**OUTPUT, "_state": pa.string()}), "gone.parquet"), ("b1", "b2")
    )
    with pytest.raises(ConfigurationError):
        runs.load_files(files)
    after_failure = indexed()
    runs.load([done(1), lost(2)])
    after_first = indexed()
    runs.load([done(3)])

    assert after_failure == after_first == indexed() == [["_custom_id"], ["_custom_id"]]
    assert known_custom_ids(runs.engine, runs.spec, ["c1", "c2", "c3", "c4"]) == {"c1", "c2", "c3"}


def test_values_arrive_as_they_are(runs: Runs) -> None:
    """Quotes, line ends, null against empty, the largest integer, exact floats."""
    empty = dict.fromkeys(ANSWER) | {"kind": ""}

    report = runs.load([done(1), done(2, **empty)])

    assert (report.loaded, report.failed, report.changed_results) == (2, 0, 2)
    assert runs.rows("results", *ANSWER) == [tuple(ANSWER.values()), ("", None, None, None, None)]
    assert runs.rows("results", "_custom_id", "_model", "_run_id")[0] == ("c1", "m", "r1")


def test_failed_and_left_over_rows_are_failures(runs: Runs) -> None:
    """With reason, rounds and batch; a row that succeeded later is none."""
    first = [lost(1), lost(2, "retry", "missing"), lost(3, "retry", "missing"), done(4)]
    second = [done(2), lost(3, "retry", "cut_off")]

    report = runs.load(first, second)

    assert runs.ends() == ([2, 4], [1, 3])
    assert (report.loaded, report.failed, report.source_rows) == (2, 2, 4)
    columns = ("_reason", "_error_message", "_rounds", "_batch_id", "_source_rows")
    assert runs.rows("results_failures", *columns) == [
        ("refusal", "no", 1, "batch_1", 1),
        ("cut_off", "no", 2, "batch_2", 1),
    ]


def test_a_key_that_is_rejected_for_two_reasons_has_one_line(runs: Runs) -> None:
    """A line that is no row and a row without a key both have the key null, on every database."""
    rejected: list[Row] = [
        {"id": None, "_reason": "broken_row", "_source_rows": 1},
        {"id": None, "_reason": "null_key", "_source_rows": 2},
    ]

    report = runs.load([done(4)], rejected=rejected)

    assert (report.loaded, report.failed) == (1, 3)
    assert len(runs.rows("results_failures", "_reason")) == 1


def test_rejected_rows_are_failures(runs: Runs) -> None:
    """A duplicate key has one line for all its rows, a null key has a line as well."""
    rejected: list[Row] = [
        {"id": 5, "_reason": "duplicate_key", "_source_rows": 3},
        {"id": None, "_reason": "null_key", "_source_rows": 2},
    ]

    report = runs.load([done(1)], rejected=rejected)

    assert (report.loaded, report.failed, report.failure_lines) == (1, 5, 2)
    columns = ("_reason", "_rounds", "_source_rows", "_batch_id")
    assert sorted(runs.rows("results_failures", *columns)) == [
        ("duplicate_key", 0, 3, None),
        ("null_key", 0, 2, None),
    ]


def test_run_with_only_rejected_rows_is_loaded(runs: Runs) -> None:
    """No round was built; the tables come from the rejected rows."""
    report = runs.load(rejected=[{"id": 5, "_reason": "too_large"}])

    assert (report.loaded, report.failed) == (0, 1)
    assert runs.ends() == ([], [5])


def test_run_without_rows_touches_nothing(runs: Runs) -> None:
    """There is nothing to say about the tables."""
    assert runs.load() == LoadReport(0, 0, 0, 0, 0)
    assert sa.inspect(runs.engine).get_table_names() == []


def test_loading_twice_changes_nothing(runs: Runs) -> None:
    """Not even the time of loading."""
    run = [[done(1), lost(2), lost(3, "retry")], [lost(3, "retry")]]
    runs.load(*run, rejected=[{"id": None, "_reason": "null_key"}])
    before = runs.everything()

    report = runs.load(*run, rejected=[{"id": None, "_reason": "null_key"}])

    assert (report.loaded, report.failed) == (1, 3)
    if runs.engine.dialect.name == "postgresql" or unchanged(report):
        assert runs.everything() == before
        assert unchanged(report) == 4
    else:  # the way for any database writes again, so only times differ
        assert [len(table) for table in runs.everything()] == [len(table) for table in before]


def test_changed_answer_is_updated(runs: Runs) -> None:
    """A row with another output is written, its neighbour is not."""
    runs.load([done(1), done(2)])

    report = runs.load([done(1), done(2, kind="new")], run_id="r2")

    assert [row[0] for row in runs.rows("results", "kind")] == [ANSWER["kind"], "new"]
    if unchanged(report):
        assert [row[0] for row in runs.rows("results", "_run_id")] == ["r1", "r2"]
        assert report.changed_results == 1


def test_row_is_in_one_table_only(runs: Runs) -> None:
    """A success takes it out of the failures, a failure out of the results."""
    runs.load([done(1), lost(2), done(3), lost(4)])

    runs.load([lost(1), done(2)], run_id="r2")

    assert runs.ends() == ([2, 3], [1, 4])


def test_failed_load_leaves_the_tables_as_they_were(runs: Runs) -> None:
    """One transaction: the second file is unreadable after the first has been written."""
    runs.load([done(1), lost(9)])
    before = runs.everything()
    good = runs._write([done(2), done(9)], {**OUTPUT, "_state": pa.string()})
    with runs.artifacts.create("broken.parquet") as sink:
        sink.write(b"no parquet")

    with pytest.raises(pa.ArrowInvalid):
        runs.load_files(RoundFiles(1, (good, "broken.parquet"), ("b1", "b2")), run_id="r2")

    assert runs.everything() == before


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        (pa.string(), ["a'b", 'q"%(x)s:y']),
        (pa.timestamp("us", "UTC"), [START, START + timedelta(microseconds=1)]),
        (pa.timestamp("us"), [datetime(2026, 1, 1, 5), datetime(2026, 1, 2)]),  # noqa: DTZ001
        (pa.date32(), [date(2026, 1, 1), date(2026, 1, 2)]),
        (pa.bool_(), [False, True]),
        (pa.float64(), [0.1, 1e300]),
    ],
)
def test_keys_of_every_type(runs: Runs, kind: pa.DataType, keys: list[Any]) -> None:
    """Keys keep their type, and are found again."""
    runs.key_type = kind
    if runs.engine.dialect.name == "sqlite" and "Text" in _writer_name():
        pytest.skip("SQLite's own writer turns times into texts")

    runs.load([done(keys[0]), lost(keys[1])])
    runs.load([lost(keys[0]), done(keys[1])])

    assert [len(found) for found in runs.ends()] == [1, 1]


def _writer_name() -> str:
    from include import table_writers

    return table_writers.SqliteWriter.__name__


def test_odd_column_names_are_quoted(engine: Engine, tmp_path: Path) -> None:
    """Percent signs, colons, quotes, spaces and reserved words are names like others."""
    key = ("id", 'a%b:c "d"', "select")
    runs = Runs(engine, tmp_path / "artifacts", job("order", key))
    odd = dict.fromkeys(key[1:], 1)

    runs.load([done(1, **odd), lost(2) | odd])
    runs.load([lost(1) | odd, done(2, **odd)])

    assert runs.rows("order", "id") == [(2,)]
    assert runs.rows("order_failures", "id") == [(1,)]


def test_key_that_was_text_before_is_stored_as_text(runs: Runs) -> None:
    """A source column may be text in one partition and integer in the next."""
    runs.key_type = pa.string()
    runs.load([done("1"), lost("x")])
    runs.key_type = pa.int64()

    runs.load([lost(1)], run_id="r2")

    assert runs.ends() == ([], ["1", "x"])


def test_table_that_does_not_fit_is_refused(runs: Runs) -> None:
    """Table, column, found and expected are named, and nothing is altered."""
    with runs.engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE results (id TEXT PRIMARY KEY, kind INTEGER, must TEXT NOT NULL)"
        )

    with pytest.raises(ConfigurationError) as caught:
        runs.load([done(1)])

    message = str(caught.value)
    assert "table results, column kind: found integer, expected text" in message
    assert "column score: found no such column, expected real" in message
    assert "column must: found a mandatory column without default" in message
    assert [c["name"] for c in sa.inspect(runs.engine).get_columns("results")] == [
        "id", "kind", "must",
    ]  # fmt: skip


def test_table_with_another_primary_key_is_refused(runs: Runs) -> None:
    """Without the job's key there is no upsert."""
    runs.load([done(1)])
    other = Runs(runs.engine, Path(str(runs.artifacts.uri(""))) / "x", job(key=("kind2",)))
    with runs.engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE results ADD COLUMN kind2 BIGINT")
        connection.exec_driver_sql("ALTER TABLE results_failures ADD COLUMN kind2 BIGINT")

    with pytest.raises(ConfigurationError, match=r"found primary key \(id\), expected \(kind2\)"):
        other.load([done(1, kind2=1)])


def test_known_requests_are_found(runs: Runs) -> None:
    """In results and, if asked, in failures; before the first load nothing is known."""
    wanted = [f"c{number}" for number in range(2_500)]
    assert known_custom_ids(runs.engine, runs.spec, wanted) == set()
    runs.load([done(1), done(2_400), lost(3)])

    known = known_custom_ids(runs.engine, runs.spec, wanted)
    loaded = known_custom_ids(runs.engine, runs.spec, wanted, include_failures=False)

    assert known == {"c1", "c2400", "c3"}
    assert loaded == {"c1", "c2400"}


def test_partitions_are_told_apart(runs: Runs) -> None:
    """Every line names the interval that it is of."""
    assert runs.lines() == ([], [])
    runs.load([done(1), lost(2)])
    next_day: dict[str, Any] = {"interval_start": END, "interval_end": END + timedelta(days=1)}
    runs.load([done(3), lost(4), lost(5)], **next_day)

    assert runs.lines() == (["c1", "c3"], ["c2", "c4", "c5"])
    assert runs.lines(START, END) == (["c1"], ["c2"])
    assert runs.lines(*next_day.values()) == (["c3"], ["c4", "c5"])


@pytest.mark.postgres
def test_refused_permission_is_the_users_to_mend(
    empty_postgres_url: str, postgres_role: str, tmp_path: Path
) -> None:
    """The table is named, values are not."""
    reader = sa.create_engine(sa.make_url(empty_postgres_url).set(username=postgres_role))
    try:
        with pytest.raises(ConfigurationError, match=r"Table results.*(permission|no schema)"):
            Runs(reader, tmp_path).load([done(1)])
    finally:
        reader.dispose()


@pytest.mark.postgres
def test_refused_value_is_not_quoted(empty_postgres_url: str, tmp_path: Path) -> None:
    """A message of the database that may hold row text is left out."""
    engine = sa.create_engine(empty_postgres_url)
    runs = Runs(engine, tmp_path)
    runs.load([done(1)])
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE results ADD CHECK (kind <> 'CANARY')")
    try:
        with pytest.raises(PermanentError) as caught:
            runs.load([done(2, kind="CANARY")])
        assert "CANARY" not in repr(caught.value)
        assert caught.value.__suppress_context__
        assert runs.ends() == ([1], [])
    finally:
        engine.dispose()


def test_server_that_is_away_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few times, then the task's own retry has to wait longer."""
    waits: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    engine = sa.create_engine("postgresql+psycopg2://nobody@127.0.0.1:9/none")

    with pytest.raises(TransientError, match="Table results"):
        Runs(engine, tmp_path).load([done(1)])

    assert len(waits) == 4


def test_locked_database_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole transaction runs again once the other writer has gone."""
    url = f"sqlite:///{tmp_path}/target.db"
    engine = sa.create_engine(url, connect_args={"timeout": 0.01})
    runs = Runs(engine, tmp_path / "artifacts")
    runs.load([done(1)])
    other = engine.raw_connection()
    other.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _seconds: other.rollback())

    runs.load([done(2)])

    assert runs.ends() == ([1, 2], [])
    other.close()


STATES = st.sampled_from(["succeeded", "failed", "retry"])


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.dictionaries(st.integers(0, 6), STATES, min_size=1), min_size=1, max_size=4))
def test_any_sequence_of_runs_keeps_each_row_in_one_table(
    tmp_path_factory: pytest.TempPathFactory, sequence: list[dict[int, str]]
) -> None:
    """The last run that had a row decides, and loading the last one again changes nothing."""
    folder = tmp_path_factory.mktemp("load")
    runs = Runs(sa.create_engine(f"sqlite:///{folder}/target.db"), folder)
    last: dict[int, str] = {}
    for number, states in enumerate(sequence):
        rows = [done(k) if s == "succeeded" else lost(k, s) for k, s in states.items()]
        for _ in range(2):
            runs.load(rows, run_id=f"r{number}")
        last |= states

    assert runs.ends() == (
        sorted(key for key, state in last.items() if state == "succeeded"),
        sorted(key for key, state in last.items() if state != "succeeded"),
    )
    before = runs.everything()
    runs.load(rows, run_id="again")
    assert runs.everything() == before


def test_two_runs_may_create_the_tables_at_once(empty_database: Engine) -> None:
    """The other run has made the first of the two tables, and has yet to make the second."""
    keys = {"id": Family.TEXT}
    other = sa.create_engine(empty_database.url)

    @sa.event.listens_for(empty_database, "before_cursor_execute")
    def overtake(*call: Any) -> None:
        if "CREATE TABLE" in call[2] and not sa.inspect(other).has_table("results"):
            target_tables(job(), keys).results.create(other)
            overtaken.append(call[2])

    overtaken: list[str] = []
    made = create_tables(empty_database, job(), keys)

    assert len(overtaken) == 1
    assert sa.inspect(other).has_table(made.failures.name)
    other.dispose()

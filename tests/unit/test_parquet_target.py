"""A Parquet dataset as target: whole files, every key in one of them, and twice is once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from upath import UPath

from include.artifacts import Artifacts
from include.digest_set import DigestSet, digests_of_hex
from include.errors import ConfigurationError, TransientError
from include.job_spec import JobSpec
from include.loading import LoadedRun, LoadReport, RoundFiles, RunFiles
from include.parquet_layout import FAILURES, RESULTS, opened, part_path
from include.parquet_target import ended_keys, known_requests, load_dataset

START = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"type": "string"}, "score": {"type": "number"}},
}
OUTPUT = {"kind": pa.string(), "score": pa.float64()}
Row = dict[str, Any]
_numbers = itertools.count()


def job(path: str = "/data/labels", key: tuple[str, ...] = ("id",), **schema: Any) -> JobSpec:
    """Return a job that loads into a dataset."""
    return JobSpec.model_validate(
        {
            "name": "j",
            "source": {"conn_id": "s", "sql": "select 1", "key": list(key)},
            "request": {
                "endpoint": "/v1/responses",
                "model": "m",
                "prompt": "{{ text }}",
                "output_schema": SCHEMA | schema,
            },
            "target": {"path": path},
        }
    )


def request_id(key: Any) -> str:
    """Return the `custom_id` of a row in these tests."""
    return format(abs(hash(str(key))) % 16**32, "032x")


def done(key: Any, **values: Any) -> Row:
    """Return an outcome that succeeded."""
    return {"id": key, "_state": "succeeded", "_reason": "", "kind": "a", "score": 0.5} | values


def lost(key: Any, state: str = "failed", reason: str = "refusal") -> Row:
    """Return an outcome that did not."""
    return {"id": key, "_state": state, "_reason": reason, "_error_message": "no"}


class Runs:
    """Loads runs into one dataset."""

    def __init__(self, dataset: Artifacts, artifacts: Artifacts) -> None:
        self.dataset = dataset
        self.artifacts = artifacts
        self.spec = job()
        self.key_type = pa.int64()
        self.start = START

    def load(
        self, *rounds: list[Row], rejected: list[Row] | None = None, run_id: str = "r1"
    ) -> LoadReport:
        """Load a run whose rounds have these outcomes, one file a round."""
        files = [
            RoundFiles(number, (self._write(rows, OUTPUT),), (f"batch_{number}",))
            for number, rows in enumerate(rounds, 1)
        ]
        path = self._write(rejected, {}) if rejected else None
        return self.load_files(*files, rejected_file=path, run_id=run_id)

    def load_files(
        self, *rounds: RoundFiles, rejected_file: str | None = None, run_id: str = "r1"
    ) -> LoadReport:
        """Load a run of these files."""
        run = LoadedRun(run_id, self.start, self.start + DAY)
        files = RunFiles(self.spec, rounds, rejected_file, self.artifacts)
        return load_dataset(self.dataset, run, files)

    def _write(self, rows: list[Row], columns: dict[str, pa.DataType]) -> str:
        fields = {"id": self.key_type} | columns | {"_source_rows": pa.int64()}
        for name in ("_state", "_custom_id", "_reason", "_error_code", "_error_message"):
            fields[name] = pa.string()
        full = [{"_custom_id": request_id(row["id"]), "_source_rows": 1} | row for row in rows]
        name = f"{next(_numbers)}.parquet"
        with self.artifacts.create(name) as sink:
            pq.write_table(pa.Table.from_pylist(full, schema=pa.schema(fields)), sink)
        return name

    def rows(self, kind: str) -> list[Row]:
        """Return the rows of one file of the interval."""
        with opened(self.dataset, part_path(kind, self.start)) as file:
            found: list[Row] = [] if file is None else file.read().to_pylist()
        return found

    def ends(self) -> tuple[list[Any], list[Any]]:
        """Return the keys of both files."""
        results, failures = ([row["id"] for row in self.rows(kind)] for kind in (RESULTS, FAILURES))
        return results, failures

    def bytes(self) -> list[bytes]:
        """Return what both files hold, to the byte."""
        found = []
        for kind in (RESULTS, FAILURES):
            with self.dataset.open(part_path(kind, self.start)) as stream:
                found.append(stream.read())
        return found


@pytest.fixture(params=["local", "memory"])
def runs(request: pytest.FixtureRequest, tmp_path: Path) -> Runs:
    """Loads into an empty dataset."""
    is_local = request.param == "local"
    root = tmp_path / "labels" if is_local else UPath(f"memory://{tmp_path.name}-{id(tmp_path)}")
    return Runs(Artifacts(root), Artifacts(tmp_path / "artifacts"))


@pytest.fixture
def local(tmp_path: Path) -> Runs:
    """Loads into an empty dataset on this machine."""
    return Runs(Artifacts(tmp_path / "labels"), Artifacts(tmp_path / "artifacts"))


def test_any_reader_finds_the_rows(local: Runs, tmp_path: Path) -> None:
    """By pandas and pyarrow.dataset, all intervals or one, with types and the interval's name."""
    local.load([done(1), lost(2)])
    local.start += DAY
    local.load([done(3), lost(4)])

    frame = pd.read_parquet(tmp_path / "labels" / "results")
    data = pyarrow.dataset.dataset(tmp_path / "labels" / "failures", partitioning="hive")
    one_day = pd.read_parquet(
        tmp_path / "labels" / "results", filters=[("interval", "==", "2026-01-02T0000Z")]
    )

    assert frame["id"].tolist() == [1, 3]
    assert frame["interval"].tolist() == ["2026-01-01T0000Z", "2026-01-02T0000Z"]
    assert one_day["id"].tolist() == [3]
    assert data.to_table(columns=["id", "_reason", "interval"]).to_pylist() == [
        {"id": 2, "_reason": "refusal", "interval": "2026-01-01T0000Z"},
        {"id": 4, "_reason": "refusal", "interval": "2026-01-02T0000Z"},
    ]


def test_columns_are_those_of_the_tables(runs: Runs) -> None:
    """Key, typed output and our own columns; failures with reason, rounds and batch."""
    runs.load([done(1), lost(2, "retry", "missing")], [lost(2, "retry", "cut_off")])

    (result,) = runs.rows(RESULTS)
    (failure,) = runs.rows(FAILURES)
    own = {"_model": "m", "_run_id": "r1", "_interval_start": START, "_interval_end": START + DAY}
    assert abs(result.pop("_loaded_at") - datetime.now(UTC)) < timedelta(minutes=5)
    assert result == {"id": 1, "kind": "a", "score": 0.5, "_custom_id": request_id(1)} | own
    assert failure.pop("_failed_at").tzinfo is not None
    assert len(failure.pop("_key")) == 32
    assert failure == own | {
        "id": 2, "_reason": "cut_off", "_error_code": None, "_error_message": "no", "_rounds": 2,
        "_source_rows": 1, "_batch_id": "batch_2", "_custom_id": request_id(2),
    }  # fmt: skip


def test_counts_are_those_of_the_source(runs: Runs) -> None:
    """A key that is rejected twice has one line, all its rows are counted."""
    rejected: list[Row] = [
        {"id": 5, "_reason": "duplicate_key", "_source_rows": 3},
        {"id": 5, "_reason": "bad_text", "_source_rows": 1},
        {"id": None, "_reason": "null_key", "_source_rows": 2},
    ]

    report = runs.load([done(1)], rejected=rejected)

    assert report == LoadReport(1, 6, 2, 1, 2)
    assert runs.ends() == ([1], [5, None])


def test_run_without_rows_touches_nothing(runs: Runs) -> None:
    """There is nothing to say."""
    assert runs.load() == LoadReport(0, 0, 0, 0, 0)
    assert not runs.dataset.exists(part_path(RESULTS, START))
    assert known_requests(runs.dataset, START)([request_id(1)]) == set()


def test_loading_twice_changes_no_byte(runs: Runs) -> None:
    """Not even the time of loading, and not when the run has another id."""
    run = [[done(1), lost(2), lost(3, "retry")], [lost(3, "retry")]]
    runs.load(*run, rejected=[{"id": None, "_reason": "null_key"}])
    before = runs.bytes()

    report = runs.load(*run, rejected=[{"id": None, "_reason": "null_key"}], run_id="r2")

    assert report == LoadReport(1, 3, 3, 0, 0)
    assert runs.bytes() == before


def test_rows_of_earlier_runs_stay(runs: Runs) -> None:
    """A run that reuses rows adds its own; an unchanged row keeps run and time."""
    runs.load([done(1), done(2), done(3)])
    before = {row["id"]: row for row in runs.rows(RESULTS)}

    report = runs.load([done(2), done(3, kind="new"), done(4)], run_id="r2")

    after = {row["id"]: row for row in runs.rows(RESULTS)}
    assert {key: row["_run_id"] for key, row in after.items()} == {
        1: "r1", 2: "r1", 3: "r2", 4: "r2",
    }  # fmt: skip
    assert (after[1], after[2], after[3]["kind"]) == (before[1], before[2], "new")
    assert report == LoadReport(3, 0, 0, 2, 0)


def test_row_is_in_one_file_only(runs: Runs) -> None:
    """A success takes it out of the failures, a failure out of the results."""
    runs.load([done(1), lost(2), done(3), lost(4)])

    runs.load([lost(1), done(2)], run_id="r2")

    assert runs.ends() == ([3, 2], [4, 1])


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    loads=st.lists(
        st.dictionaries(st.integers(0, 7), st.sampled_from(["done", "other", "lost"])), max_size=4
    )
)
def test_files_end_as_the_last_word_on_each_key(
    local: Runs, tmp_path: Path, loads: list[dict[int, str]]
) -> None:
    """Whatever runs there were, in whatever order."""
    local.dataset = Artifacts(tmp_path / f"dataset-{next(_numbers)}")
    make = {"done": done, "other": lambda key: done(key, kind="b"), "lost": lost}
    last: dict[int, str] = {}
    for number, outcomes in enumerate(loads):
        local.load([make[what](key) for key, what in outcomes.items()], run_id=f"r{number}")
        last |= outcomes

    results, failures = local.ends()
    assert sorted(results) == sorted(key for key, what in last.items() if what != "lost")
    assert sorted(failures) == sorted(key for key, what in last.items() if what == "lost")


def test_reader_sees_the_old_rows_until_the_end(
    local: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While both new files are being written, a reader of the folder finds the old ones."""
    local.load([done(1), lost(2)])
    seen = []

    def watched(rounds: Iterator[Any]) -> Iterator[Any]:
        for batch in rounds:
            seen.append(pd.read_parquet(tmp_path / "labels" / "results")["id"].tolist())
            seen.append(pd.read_parquet(tmp_path / "labels" / "failures")["id"].tolist())
            yield batch

    whole = RunFiles.failures  # the failures are written last
    monkeypatch.setattr(RunFiles, "failures", lambda *args: watched(whole(*args)))

    local.load([done(2), lost(1), done(3)])

    assert len(seen) >= 4
    assert all(ids in ([1], [2]) for ids in seen)
    assert local.ends() == ([2, 3], [1])


def test_load_that_dies_leaves_the_old_files(runs: Runs, tmp_path: Path) -> None:
    """The second round's file is unreadable after the first has been written."""
    runs.load([done(1), lost(9)])
    before = runs.bytes()
    good = runs._write([done(2), done(9)], OUTPUT)
    with runs.artifacts.create("broken.parquet") as sink:
        sink.write(b"no parquet")

    with pytest.raises(pa.ArrowInvalid):
        runs.load_files(RoundFiles(1, (good, "broken.parquet"), ("b1", "b2")), run_id="r2")

    assert runs.bytes() == before
    assert not list((tmp_path / "labels").rglob("*.part"))


def test_load_that_died_between_the_files_is_made_whole(
    local: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results were replaced, failures not; until then no row has been in neither of the two."""
    local.load([done(1), lost(2)])
    replace = Path.replace

    def dying(self: Path, target: Path) -> Path:
        if "failures" in str(target):
            raise SystemExit
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dying)
        with pytest.raises(SystemExit):
            local.load([done(2)], run_id="r2")
    assert local.ends() == ([1, 2], [2])

    local.load([done(2)], run_id="r2")

    assert local.ends() == ([1, 2], [])


def test_load_that_was_overtaken_merges_again(local: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run of the interval has replaced the files: its rows are not lost."""
    local.load([done(1)])
    other = Runs(local.dataset, local.artifacts)
    from include import parquet_target

    merge = parquet_target._merge
    once = iter([True])

    def overtaken(kind: str, *args: Any) -> Any:
        found = merge(kind, *args)
        if kind == RESULTS and next(once, False):
            other.load([done(2)], run_id="r2")
        return found

    monkeypatch.setattr("include.parquet_target._merge", overtaken)

    local.load([done(3)], run_id="r3")

    assert sorted(local.ends()[0]) == [1, 2, 3]


def test_load_that_is_always_overtaken_gives_up(
    local: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises what Airflow tries again later."""
    local.load([done(1)])
    versions = map(str, itertools.count())
    monkeypatch.setattr("include.parquet_target.version_of", lambda _file: next(versions))
    monkeypatch.setattr("include.loading.LOAD_ATTEMPTS", 1)

    with pytest.raises(TransientError, match="Another load"):
        local.load([done(2)])

    assert local.ends() == ([1], [])


def test_known_requests_are_found(runs: Runs) -> None:
    """In results and, if asked, in failures, of this interval only."""
    wanted = [request_id(number) for number in range(2_500)]
    runs.load([done(1), done(2_400), lost(3)])
    runs.start += DAY
    runs.load([done(7)])

    known = known_requests(runs.dataset, START)(wanted)
    loaded = known_requests(runs.dataset, START, include_failures=False)(wanted)

    assert known == {request_id(key) for key in (1, 2_400, 3)}
    assert loaded == {request_id(key) for key in (1, 2_400)}


def test_keys_are_found_whatever_their_type(runs: Runs) -> None:
    """A key column that was integer and is text now becomes text, and meets itself again."""
    runs.load([done(1), lost(2), done(3)])
    runs.key_type = pa.string()

    runs.load([lost("1"), done("2"), done("x")], run_id="r2")

    assert runs.ends() == (["3", "2", "x"], ["1"])
    results, failures = ended_keys(runs.dataset, START, ("id",))
    assert (len(results), len(failures)) == (3, 1)


def test_column_of_another_type_is_refused(runs: Runs) -> None:
    """Folder, column, found and expected are named, and nothing is altered."""
    runs.load([done(1)])
    before = runs.bytes()
    runs.spec = job(properties={"kind": {"type": "string"}, "score": {"type": "string"}})

    with pytest.raises(ConfigurationError, match="column score: found double, expected string"):
        runs.load([done(2)])

    assert runs.bytes() == before


def test_columns_that_are_asked_for_no_more_stay(runs: Runs) -> None:
    """They are null in new rows; new columns are null in old rows."""
    runs.load([done(1)])
    runs.spec = job(properties={"kind": {"type": "string"}})

    runs.load([done(2)], run_id="r2")

    assert [(row["id"], row["score"]) for row in runs.rows(RESULTS)] == [(1, 0.5), (2, None)]


def test_file_that_is_not_ours_is_refused(local: Runs, tmp_path: Path) -> None:
    """It is named, and left alone."""
    path = tmp_path / "labels" / part_path(RESULTS, START)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"something else")

    with pytest.raises(ConfigurationError, match=r"data\.parquet is no Parquet file"):
        local.load([done(1)])

    assert path.read_bytes() == b"something else"


def test_folder_that_cannot_be_written_is_named(local: Runs, tmp_path: Path) -> None:
    """The error says what to check."""
    (tmp_path / "labels").write_text("a file")

    with pytest.raises(ConfigurationError, match=r"cannot write below /data/labels"):
        local.load([done(1)])


def test_rows_are_read_and_written_in_pieces(local: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups end at their size, and no batch is larger than a chunk."""
    monkeypatch.setattr("include.parquet_target.GROUP_ROWS", 1_000)
    monkeypatch.setattr("include.loading.CHUNK_ROWS", 500)
    monkeypatch.setattr("include.parquet_target.CHUNK_ROWS", 500)

    local.load([done(key) for key in range(3_500)])
    local.load([done(key) for key in range(3_000, 6_000)])

    with opened(local.dataset, part_path(RESULTS, START)) as file:
        assert file is not None
        groups = [file.metadata.row_group(at).num_rows for at in range(file.num_row_groups)]
    assert sum(groups) == 6_000
    assert max(groups) == 1_000


def test_digest_set_knows_what_was_added() -> None:
    """Also digests that end in zeros, and none when it is empty."""
    ids = [f"{number:032x}" for number in (0, 1, 2**120, 2**128 - 1)] + ["ab" + "0" * 30]
    wanted = digests_of_hex([*ids, "ac" + "0" * 30])

    assert DigestSet([digests_of_hex(ids)]).has(wanted).tolist() == [True] * 5 + [False]
    assert DigestSet().has(wanted).tolist() == [False] * 6

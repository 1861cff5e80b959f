"""CSV files become source tables, any number of times."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sqlalchemy as sa

from include.artifacts import Artifacts
from include.errors import ConfigurationError
from include.job_spec import load_job
from include.rows import extract_sql
from include.source_tables import load_csv, load_sample_tickets, main

HEADER = "commit_id,repository,committed_at,subject,body\n"
ROWS = (
    'a1,x/y,2024-04-08T00:00:00Z,"Fix, at last","line 1\nline 2"\n'
    "b2,x/y,2024-04-08T23:30:00-02:00,NA,\n"
)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    """An empty source database of each kind."""
    if request.param == "sqlite":
        engine = sa.create_engine(f"sqlite:///{tmp_path / 'source.db'}")
    else:
        engine = sa.create_engine(request.getfixturevalue("empty_postgres_url"))
    yield engine
    engine.dispose()


def write(folder: Path, text: str) -> Path:
    """Write a CSV.gz file."""
    path = folder / "commits.csv.gz"
    path.write_bytes(gzip.compress(text.encode()))
    return path


def stored(engine: sa.Engine) -> list[tuple[str, ...]]:
    """Return what the table `commits` holds."""
    query = "SELECT commit_id, subject, body FROM commits ORDER BY commit_id"
    with engine.connect() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(query)]


def test_loading_twice_is_loading_once(engine: sa.Engine, tmp_path: Path) -> None:
    """Rows are upserted by their key; texts such as NA and empty ones stay as they are."""
    path = write(tmp_path, HEADER + ROWS)

    assert (load_csv(engine, path, "commits"), load_csv(engine, path, "commits")) == (2, 2)
    load_csv(engine, write(tmp_path, HEADER + ROWS.replace("NA", "new")), "commits")

    assert stored(engine) == [("a1", "Fix, at last", "line 1\nline 2"), ("b2", "new", "")]


def test_the_job_finds_its_interval(engine: sa.Engine, tmp_path: Path) -> None:
    """Times of any zone are stored so that rows.sql selects the right day on every database."""
    load_csv(engine, write(tmp_path, HEADER + ROWS), "commits")

    counts = []
    for day in (7, 8, 9):
        start, end = datetime(2024, 4, day, tzinfo=UTC), datetime(2024, 4, day + 1, tzinfo=UTC)
        snapshot = extract_sql(engine, load_job("commit_labels"), start, end,
                               artifacts=Artifacts(tmp_path), directory="run")  # fmt: skip
        counts.append(snapshot.rows)

    assert counts == [0, 1, 1]


def test_sample_tickets(engine: sa.Engine, tmp_path: Path) -> None:
    """The sample has 2,000 tickets, and every one of them lies in one of its 14 days."""
    load_sample_tickets(engine)

    start, end = datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 11, 15, tzinfo=UTC)
    snapshot = extract_sql(engine, load_job("ticket_triage"), start, end,
                           artifacts=Artifacts(tmp_path), directory="run")  # fmt: skip
    assert (snapshot.rows, snapshot.rejections_file) == (2_000, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("commit_id,subject\na,b\n", "lacks the columns committed_at, repository, body"),
        (HEADER + ROWS + "c3,x/y,yesterday,s,b\n", "row 4: committed_at must be an ISO 8601"),
        (HEADER + ",x/y,2024-04-08T00:00:00Z,s,b\n", "row 2: commit_id must be text"),
        ("", "not a CSV file with a header"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, expected: str) -> None:
    """A file that cannot be loaded is refused whole, with the row and column."""
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'source.db'}")

    with pytest.raises(ConfigurationError, match=expected):
        load_csv(engine, write(tmp_path, text), "commits")
    if sa.inspect(engine).has_table("commits"):
        assert stored(engine) == []
    engine.dispose()


def test_missing_file_and_unknown_table(tmp_path: Path) -> None:
    """A path or table name that is wrong is named."""
    engine = sa.create_engine("sqlite://")

    with pytest.raises(ConfigurationError, match=r"no file .*nothing\.csv"):
        load_csv(engine, tmp_path / "nothing.csv", "commits")
    with pytest.raises(ConfigurationError, match="known: commits, tickets"):
        load_csv(engine, tmp_path / "nothing.csv", "other")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints the count, or the error and a status that is not 0."""
    url = f"sqlite:///{tmp_path / 'source.db'}"

    assert main(["commits", str(write(tmp_path, HEADER + ROWS)), "--url", url]) == 0
    assert main(["commits", str(tmp_path / "nothing.csv"), "--url", url]) == 1

    printed = capsys.readouterr()
    assert printed.out.startswith("commits: 2 rows from ")
    assert "There is no file" in printed.err

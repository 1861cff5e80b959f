"""Load: outcomes go into the target tables, in PostgreSQL and in SQLite."""

from __future__ import annotations

import io
import sqlite3
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from include.artifacts import Artifacts
from include.bench import collect_step, postgres, shards
from include.bench.jobs import chat_job
from include.bench.measurement import Place, Task
from include.loading import LoadedRun, RoundFiles, RunFiles, load_run

FOLDER = collect_step.FOLDER
START = datetime(2026, 11, 1, tzinfo=UTC)
COLUMNS = ("ticket_id", "category", "priority", "confidence", "urgent", "summary", "_custom_id")
TABLE = (
    "CREATE TABLE bench_plain (ticket_id text PRIMARY KEY, category text, priority bigint, "
    "confidence double precision, urgent boolean, summary text, _custom_id text)"
)
PLAIN_ROWS = 1_000
LIMIT_ROWS = 10_000


def prepare(place: Place) -> None:
    """Collect what is loaded."""
    shards.collect(chat_job(), place.folder / FOLDER, "outcomes")


def product(place: Place) -> Task:
    """Return the first load of the product into PostgreSQL."""
    engine = _empty_postgres()
    server = postgres.ServerCpu(engine)
    return Task(lambda: _load(engine, place), _size(place), server)


def product_again(place: Place) -> Task:
    """Return a second load of the same rows, which changes nothing."""
    engine = _empty_postgres()
    _load(engine, place)
    return Task(lambda: _load(engine, place), _size(place), postgres.ServerCpu(engine))


def limit(place: Place) -> Task:
    """Return a bare COPY of a ready CSV into a table with the same key."""
    engine = _empty_postgres()
    _execute(engine, TABLE)
    path = place.scratch() / "rows.csv"
    options = pyarrow.csv.WriteOptions(include_header=False)
    with path.open("wb") as sink:
        for batch in _batches(place):
            pyarrow.csv.write_csv(batch, sink, options)

    def run() -> None:
        with engine.begin() as connection:
            driver: Any = connection.connection.driver_connection
            with (
                path.open("rb") as source,
                driver.cursor() as cursor,
                cursor.copy("COPY bench_plain FROM STDIN (FORMAT csv)") as copy,
            ):
                while chunk := source.read(1 << 20):
                    copy.write(chunk)

    return Task(run, _size(place), postgres.ServerCpu(engine))


def plain(place: Place) -> Task:
    """Return what an Airflow hook's `insert_rows` does: an executemany of 1,000 rows a commit."""
    engine = _empty_postgres()
    _execute(engine, TABLE)
    statement = _upsert("%s")
    return Task(lambda: _plain(engine, statement, place), _size(place), postgres.ServerCpu(engine))


def product_sqlite(place: Place) -> Task:
    """Return the first load of the product into SQLite."""
    engine = _empty_sqlite(place)
    return Task(lambda: _load(engine, place), _size(place))


def limit_sqlite(place: Place) -> Task:
    """Return one transaction of upserts, 10,000 rows at a time."""
    engine = _empty_sqlite(place)
    _execute(engine, TABLE)
    path = str(engine.url.database)

    def run() -> None:
        with sqlite3.connect(path) as connection:
            for batch in _batches(place, LIMIT_ROWS):
                connection.executemany(_upsert("?"), _values(batch))

    return Task(run, _size(place))


def plain_sqlite(place: Place) -> Task:
    """Return what an Airflow hook's `insert_rows` does: a statement a row, 1,000 a commit."""
    engine = _empty_sqlite(place)
    _execute(engine, TABLE)
    statement = _upsert("?")

    def run() -> None:
        for batch in _batches(place, PLAIN_ROWS):
            with engine.begin() as connection:
                for row in _values(batch):
                    connection.exec_driver_sql(statement, row)

    return Task(run, _size(place))


def _load(engine: Engine, place: Place) -> None:
    files = sorted((place.folder / FOLDER / "outcomes").glob("*.outcomes.parquet"))
    names = tuple(f"outcomes/{path.name}" for path in files)
    round_ = RoundFiles(1, names, tuple(path.stem for path in files))
    load_run(
        engine,
        LoadedRun("bench", START, START + timedelta(days=1)),
        RunFiles(chat_job(), (round_,), None, Artifacts(place.folder / FOLDER)),
    )


def _plain(engine: Engine, statement: str, place: Place) -> None:
    for batch in _batches(place, PLAIN_ROWS):
        with engine.begin() as connection:
            driver: Any = connection.connection.driver_connection
            with driver.cursor() as cursor:
                cursor.executemany(statement, _values(batch))


def _values(batch: pa.RecordBatch) -> list[tuple[Any, ...]]:
    return list(zip(*(column.to_pylist() for column in batch.columns), strict=True))


def _batches(place: Place, rows: int = 10_000) -> Iterator[pa.RecordBatch]:
    for path in sorted((place.folder / FOLDER / "outcomes").glob("*.outcomes.parquet")):
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(rows, columns=list(COLUMNS))


def _upsert(mark: str) -> str:
    marks = ", ".join([mark] * len(COLUMNS))
    updates = ", ".join(f"{name} = excluded.{name}" for name in COLUMNS[1:])
    return (
        f"INSERT INTO bench_plain VALUES ({marks}) "  # noqa: S608 - names of our own
        f"ON CONFLICT (ticket_id) DO UPDATE SET {updates}"
    )


def _empty_postgres() -> Engine:
    engine = postgres.engine()
    names = ("bench_plain", "bench_results", "bench_results_failures")
    _execute(engine, *(f"DROP TABLE IF EXISTS {name}" for name in names))
    return engine


def _empty_sqlite(place: Place) -> Engine:
    path = place.scratch() / "target.db"
    for old in place.scratch().glob("target.db*"):
        old.unlink()
    return sa.create_engine(f"sqlite:///{path}")


def _execute(engine: Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def _size(place: Place) -> int:
    """Return the bytes of the rows as CSV."""
    known = place.folder / FOLDER / "outcomes" / "csv-bytes"
    if not known.exists():
        known.write_text(str(_csv_bytes(place)))
    return int(known.read_text())


def _csv_bytes(place: Place) -> int:
    options, size = pyarrow.csv.WriteOptions(include_header=False), 0
    for batch in _batches(place):
        sink = io.BytesIO()
        pyarrow.csv.write_csv(batch, sink, options)
        size += sink.tell()
    return size


Contender = Callable[[Place], Task]
POSTGRES: dict[str, Contender] = {
    "limit": limit,
    "product": product,
    "product, second load": product_again,
    "plain": plain,
}
SQLITE: dict[str, Contender] = {
    "limit": limit_sqlite,
    "product": product_sqlite,
    "plain": plain_sqlite,
}

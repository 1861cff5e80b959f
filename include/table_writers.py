"""How rows get into the target tables, by database.

PostgreSQL: COPY into a staging table, then one INSERT … ON CONFLICT. SQLite: large executemany
upserts. Any other database: delete and insert by key. The caller owns the transaction.

Identifiers are quoted, values are bound or copied, never part of a statement.
A U+0000 in a source key becomes U+FFFD on PostgreSQL, which cannot store it.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any

import pyarrow as pa
import pyarrow.csv
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from include.target_table import TargetTables
from include.vector_arrays import as_binary, as_texts, is_vector
from include.vector_column import VectorType, brackets

COPY_BYTES = 1 << 20
DELETE_ROWS = 1_000
UNCOMPARED = {"_run_id", "_loaded_at", "_failed_at"}  # alone they are no reason to write a row

Batches = Iterable[pa.RecordBatch]
Constants = Mapping[str, Any]


def writer_of(connection: Connection, tables: TargetTables) -> TableWriter:
    """Return the fastest writer for the database behind `connection`."""
    kinds: dict[str, type[TableWriter]] = {"postgresql": PostgresWriter, "sqlite": SqliteWriter}
    return kinds.get(connection.dialect.name, AnyWriter)(connection, tables)


class TableWriter(ABC):
    """Writes into the two tables of a job within one transaction."""

    def __init__(self, connection: Connection, tables: TargetTables) -> None:
        self._connection = connection
        self._tables = tables
        self._set_aside: list[sa.Index] = []

    def begin(self) -> None:  # noqa: B027 - most databases need nothing
        """Keep other loads into the same tables out until the transaction ends."""

    def end(self) -> None:
        """Complete the tables; the last call before the transaction ends."""
        for index in self._set_aside:
            index.create(self._connection)

    def _set_index_aside(self) -> None:
        """Drop our index of an empty results table until `end`, where a transaction covers that.

        To make an index of rows costs a third of letting it grow with them.
        """
        results = self._tables.results
        if self._connection.execute(sa.select(sa.literal(1)).select_from(results).limit(1)).first():
            return
        found = {one["name"] for one in sa.inspect(self._connection).get_indexes(results.name)}
        self._set_aside = [index for index in results.indexes if index.name in found]
        for index in self._set_aside:
            index.drop(self._connection)

    @abstractmethod
    def upsert(self, table: sa.Table, batches: Batches, constants: Constants) -> tuple[int, int]:
        """Insert or update rows by key; return how many there were and how many differed."""

    @abstractmethod
    def drop_results_that_failed(self) -> None:
        """Delete from results the keys that were just written into failures."""

    def drop_failures_with_result(self) -> None:
        """Delete from failures what the results table has."""
        results, failures = self._tables.results, self._tables.failures
        same = [results.c[name] == failures.c[name] for name in self._tables.key]
        has_result = sa.exists().where(*same).correlate(failures)
        self._connection.execute(sa.delete(failures).where(has_result))

    def _quoted(self, name: str) -> str:
        # The dialect's own quoting also doubles %, which only some of our statements need.
        return '"' + name.replace('"', '""') + '"'

    def _list(self, names: Iterable[str], prefix: str = "") -> str:
        return ", ".join(prefix + self._quoted(name) for name in names)

    def _key(self, table: sa.Table) -> tuple[str, ...]:
        return self._tables.key if table is self._tables.results else ("_key",)

    def _on_conflict(self, table: sa.Table, names: Sequence[str], differs: str) -> str:
        """Return the clause that updates a row by key when it differs."""
        key = self._key(table)
        updates = ", ".join(
            f"{self._quoted(name)} = excluded.{self._quoted(name)}"
            for name in names
            if name not in key
        )
        return f"ON CONFLICT ({self._list(key)}) DO UPDATE SET {updates} WHERE {differs}"

    def _compared(self, table: sa.Table, names: Sequence[str]) -> list[str]:
        return [name for name in names if name not in {*self._key(table), *UNCOMPARED}]


class PostgresWriter(TableWriter):
    """COPY to a staging table, then one statement a table."""

    def begin(self) -> None:
        """Take a lock of this pair of tables: two loads at once would deadlock."""
        query = sa.text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))")
        self._connection.execute(query, {"name": f"llm_batch {self._tables.results.name}"})
        self._set_index_aside()

    def upsert(self, table: sa.Table, batches: Batches, constants: Constants) -> tuple[int, int]:
        """Do what `TableWriter.upsert` promises."""
        names = [column.name for column in table.columns if column.name not in constants]
        staging = self._staging(table)
        self._run(
            f"CREATE TEMPORARY TABLE {staging} ON COMMIT DROP AS "  # noqa: S608 - quoted
            f"SELECT {self._list(names)} FROM {self._quoted(table.name)} WITH NO DATA"
        )
        texts = (_with_vector_texts(table, batch) for batch in batches)
        rows = self._copy(f"COPY {staging} ({self._list(names)}) FROM STDIN (FORMAT csv)", texts)
        return rows, self._insert(table, names, constants) if rows else 0

    def drop_results_that_failed(self) -> None:
        """Do what `TableWriter.drop_results_that_failed` promises."""
        results, staging = self._tables.results, self._staging(self._tables.failures)
        pairs = ((f"r.{name}", f"s.{name}") for name in map(self._quoted, self._tables.key))
        same = " AND ".join(f"{left} = {right}" for left, right in pairs)
        target = self._quoted(results.name)
        self._run(f"DELETE FROM {target} r USING {staging} s WHERE {same}")  # noqa: S608 - quoted

    def _insert(self, table: sa.Table, names: Sequence[str], constants: Constants) -> int:
        everything = [*names, *constants]
        compared = self._compared(table, everything)
        differs = (
            f"({self._list(compared, 't.')}) IS DISTINCT FROM ({self._list(compared, 'excluded.')})"
        )
        # A key can be in the rejected file once for each reason; results have no key twice.
        failures = table is self._tables.failures
        distinct = f"DISTINCT ON ({self._list(self._key(table))})" if failures else ""
        kinds = {name: table.c[name].type.compile(self._connection.dialect) for name in constants}
        head = (
            f"INSERT INTO {self._quoted(table.name)} AS t ({self._list(everything)}) "
            f"SELECT {distinct} {self._list(names)}, "
        )
        values = ", ".join(f"CAST(%({name})s AS {kind})" for name, kind in kinds.items())
        tail = f" FROM {self._staging(table)} {self._on_conflict(table, everything, differs)}"
        # The driver formats the statement: a % in an identifier must be doubled.
        statement = head.replace("%", "%%") + values + tail.replace("%", "%%")
        return self._connection.exec_driver_sql(statement, dict(constants)).rowcount

    def _staging(self, table: sa.Table) -> str:
        kind = "results" if table is self._tables.results else "failures"
        return self._quoted(f"_llm_batch_{kind}")

    def _run(self, statement: str) -> None:
        """Run a statement without parameters, so that the driver does not format it."""
        with self._cursor() as cursor:
            cursor.execute(statement)

    def _cursor(self) -> Any:
        driver: Any = self._connection.connection.driver_connection
        return driver.cursor()

    def _copy(self, statement: str, batches: Batches) -> int:
        """Stream batches as CSV; works with psycopg2 and psycopg."""
        source = _CsvStream(batches)
        with self._cursor() as cursor:
            if hasattr(cursor, "copy_expert"):
                source.copied(lambda: cursor.copy_expert(statement, source, size=COPY_BYTES))
            else:
                with cursor.copy(statement) as copy:
                    for chunk in source.chunks:
                        copy.write(chunk)
        return source.rows


class _CsvStream:
    """A readable stream of the CSV text of batches, a batch in memory at a time."""

    def __init__(self, batches: Batches) -> None:
        self.rows = 0
        self.chunks = self._encoded(batches)
        self._rest = io.BytesIO()
        self._error: Exception | None = None

    def copied(self, copy: Callable[[], None]) -> None:
        """Run `copy`; an error of the batches themselves is raised as it was.

        psycopg2 reports an error in `read` as a failed query.
        """
        try:
            copy()
        except Exception:
            if self._error is not None:
                raise self._error from None
            raise

    def read(self, size: int = -1) -> bytes:
        """Return at least one byte, or none at the end."""
        while not (data := self._rest.read(size)):
            try:
                chunk = next(self.chunks, None)
            except Exception as error:
                self._error = error
                raise
            if chunk is None:
                return b""
            self._rest = io.BytesIO(chunk)
        return data

    def _encoded(self, batches: Batches) -> Iterator[bytes]:
        options = pyarrow.csv.WriteOptions(include_header=False)
        for batch in batches:
            if not batch.num_rows:
                continue
            self.rows += batch.num_rows
            sink = io.BytesIO()
            pyarrow.csv.write_csv(batch, sink, options)
            yield sink.getvalue().replace(b"\x00", "\ufffd".encode())


class _RowWriter(TableWriter):
    """Writers that bind rows as Python values."""

    def __init__(self, connection: Connection, tables: TargetTables) -> None:
        super().__init__(connection, tables)
        self._failed_keys: list[tuple[Any, ...]] = []

    def _note_failed(self, table: sa.Table, batch: pa.RecordBatch) -> None:
        if table is self._tables.failures:
            columns = (self._values(batch.column(name)) for name in self._tables.key)
            self._failed_keys += zip(*columns, strict=True)

    def _values(self, column: pa.Array) -> list[Any]:
        values: list[Any] = column.to_pylist()
        return values


class SqliteWriter(_RowWriter):
    """Upserts of 10,000 rows, a prepared statement each."""

    def begin(self) -> None:
        """Lock the database; the driver itself would begin only after the index is gone."""
        driver: Any = self._connection.connection.driver_connection
        if not driver.in_transaction:
            self._connection.exec_driver_sql("BEGIN IMMEDIATE")
        self._set_index_aside()

    def upsert(self, table: sa.Table, batches: Batches, constants: Constants) -> tuple[int, int]:
        """Do what `TableWriter.upsert` promises."""
        names = [column.name for column in table.columns if column.name not in constants]
        everything = [*names, *constants]
        statement = self._upsert(table, everything)
        fixed = tuple(_sqlite_value(value) for value in constants.values())
        rows = changed = 0
        for batch in batches:
            columns = [self._values(batch.column(name)) for name in names]
            values = [(*row, *fixed) for row in zip(*columns, strict=True)]
            if values:
                changed += self._connection.exec_driver_sql(statement, values).rowcount
            rows += len(values)
            self._note_failed(table, batch)
        return rows, changed

    def drop_results_that_failed(self) -> None:
        """Do what `TableWriter.drop_results_that_failed` promises."""
        if not self._failed_keys:
            return
        results = self._quoted(self._tables.results.name)
        same = " AND ".join(f"{self._quoted(name)} = ?" for name in self._tables.key)
        statement = f"DELETE FROM {results} WHERE {same}"  # noqa: S608 - quoted identifiers
        self._connection.exec_driver_sql(statement, self._failed_keys)

    def _upsert(self, table: sa.Table, names: Sequence[str]) -> str:
        target = self._quoted(table.name)
        differs = " OR ".join(
            f"{target}.{self._quoted(name)} IS NOT excluded.{self._quoted(name)}"
            for name in self._compared(table, names)
        )
        marks = ", ".join("?" * len(names))
        return (
            f"INSERT INTO {target} ({self._list(names)}) VALUES ({marks}) "  # noqa: S608 - quoted
            f"{self._on_conflict(table, names, differs)}"
        )

    def _values(self, column: pa.Array) -> list[Any]:
        if is_vector(column.type):
            column = as_binary(column)
        values: list[Any] = column.to_pylist()
        if pa.types.is_temporal(column.type):
            return [_sqlite_value(value) for value in values]
        return values


class AnyWriter(_RowWriter):
    """Delete and insert by key, in the SQL of any dialect; every row counts as changed."""

    def upsert(self, table: sa.Table, batches: Batches, constants: Constants) -> tuple[int, int]:
        """Do what `TableWriter.upsert` promises."""
        rows = 0
        for batch in batches:
            texts = _with_vector_texts(table, batch)
            key, found = self._key(table), texts.to_pylist()
            # A key can be in the rejected file once for each reason.
            values = {tuple(row[name] for name in key): {**row, **constants} for row in found}
            self._note_failed(table, batch)
            rows += len(found)
            if values:
                self._delete(table, key, list(values))
                self._connection.execute(sa.insert(table), list(values.values()))
        return rows, rows

    def drop_results_that_failed(self) -> None:
        """Do what `TableWriter.drop_results_that_failed` promises."""
        if self._failed_keys:
            self._delete(self._tables.results, self._tables.key, self._failed_keys)

    def _delete(
        self, table: sa.Table, key: Sequence[str], values: Sequence[tuple[Any, ...]]
    ) -> None:
        names = [f"key_{number}" for number in range(len(key))]
        same = [
            table.c[column] == sa.bindparam(name) for column, name in zip(key, names, strict=True)
        ]
        statement = sa.delete(table).where(*same)
        for start in range(0, len(values), DELETE_ROWS):
            part = values[start : start + DELETE_ROWS]
            rows = [dict(zip(names, row, strict=True)) for row in part]
            self._connection.execute(statement, rows)


def _with_vector_texts(table: sa.Table, batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return `batch` with its vectors as the texts that the database takes."""
    for at, field in enumerate(batch.schema):
        if is_vector(field.type):
            kind = table.c[field.name].type
            marks = brackets(kind) if isinstance(kind, VectorType) else ("[", "]")
            batch = batch.set_column(at, field.name, as_texts(batch.column(at), *marks))
    return batch


def _sqlite_value(value: Any) -> Any:
    """Return ISO 8601 text for dates and times, times in UTC."""
    if isinstance(value, datetime):
        return (value.astimezone(UTC) if value.tzinfo else value).isoformat()
    return value.isoformat() if isinstance(value, date) else value

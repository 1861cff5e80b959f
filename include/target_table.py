"""The results and failures table of a job: their columns, and how they come to be.

Results: key, output columns, `_custom_id`, `_model`, `_run_id`, `_interval_start`,
`_interval_end`, `_loaded_at`; the primary key is the job's key.

Failures: `_key`, key, `_reason`, `_error_code`, `_error_message`, `_rounds`, `_source_rows`,
`_batch_id`, `_custom_id`, `_model`, `_run_id`, `_interval_start`, `_interval_end`, `_failed_at`;
the primary key is `_key`, a digest of the key, because a row may have failed for a null in it.

SQLite has no time types: dates and times are ISO 8601 texts there, times in UTC.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from include.errors import ConfigurationError
from include.output_columns import Kind, OutputColumn, request_columns
from include.vector_column import VectorType, declared_types, prefers_pgvector, vector_problem

if TYPE_CHECKING:
    from include.job_spec import JobSpec

MAX_IDENTIFIER = 63  # PostgreSQL cuts longer names silently


class Family(StrEnum):
    """The kinds of values that a column can hold."""

    TEXT = "text"
    INTEGER = "integer"
    REAL = "real"
    NUMERIC = "numeric"
    BOOLEAN = "boolean"
    DATE = "date"
    TIME = "timestamp"
    AWARE_TIME = "timestamp with time zone"
    OTHER = "other"


# MySQL can index no text without a length; SQLite has no time types.
_TEXT = sa.Text().with_variant(sa.String(512), "mysql", "mariadb")
TYPES: Mapping[Family, sa.types.TypeEngine[Any]] = {
    Family.TEXT: _TEXT,
    Family.INTEGER: sa.BigInteger(),
    Family.REAL: sa.Double(),
    Family.BOOLEAN: sa.Boolean(),
    Family.DATE: sa.Date().with_variant(sa.Text(), "sqlite"),
    Family.TIME: sa.DateTime().with_variant(sa.Text(), "sqlite"),
    Family.AWARE_TIME: sa.DateTime(timezone=True).with_variant(sa.Text(), "sqlite"),
}
OUTPUT_FAMILIES = {
    Kind.TEXT: Family.TEXT,
    Kind.JSON: Family.TEXT,
    Kind.INTEGER: Family.INTEGER,
    Kind.REAL: Family.REAL,
    Kind.BOOLEAN: Family.BOOLEAN,
}
# Wider families that hold every value of a family as well.
WIDER: Mapping[Family, frozenset[Family]] = {
    Family.INTEGER: frozenset({Family.NUMERIC}),
    Family.REAL: frozenset({Family.NUMERIC}),
    Family.TIME: frozenset({Family.AWARE_TIME}),
}
TIMES = frozenset({Family.DATE, Family.TIME, Family.AWARE_TIME})
RUN_COLUMNS = ("_model", "_run_id", "_interval_start", "_interval_end")
RESULT_COLUMNS = ("_custom_id", *RUN_COLUMNS, "_loaded_at")
FAILURE_COLUMNS = (
    "_reason",
    "_error_code",
    "_error_message",
    "_rounds",
    "_source_rows",
    "_batch_id",
    "_custom_id",
    *RUN_COLUMNS,
    "_failed_at",
)
NULLABLE = {"_error_code", "_error_message", "_batch_id"}
OWN_FAMILIES = {
    "_rounds": Family.INTEGER,
    "_source_rows": Family.INTEGER,
    "_interval_start": Family.AWARE_TIME,
    "_interval_end": Family.AWARE_TIME,
    "_loaded_at": Family.AWARE_TIME,
    "_failed_at": Family.AWARE_TIME,
}


@dataclass(frozen=True)
class TargetTables:
    """The two tables of a job. Keys of another type than the table's are stored as text."""

    results: sa.Table
    failures: sa.Table
    key: tuple[str, ...]
    outputs: tuple[str, ...]
    text_keys: frozenset[str] = frozenset()


def key_families(spec: JobSpec, schema: pa.Schema) -> dict[str, Family]:
    """Return the family of each key column in an outcomes or rejected file."""
    return {name: _arrow_family(schema.field(name).type) for name in spec.source.key}


def _arrow_family(kind: pa.DataType) -> Family:
    if pa.types.is_timestamp(kind):
        return Family.TIME if kind.tz is None else Family.AWARE_TIME
    known = {
        pa.int64(): Family.INTEGER,
        pa.float64(): Family.REAL,
        pa.bool_(): Family.BOOLEAN,
        pa.date32(): Family.DATE,
    }
    return known.get(kind, Family.TEXT)


def create_tables(engine: Engine, spec: JobSpec, keys: Mapping[str, Family]) -> TargetTables:
    """Create the tables of a job where they are missing, and check them where they are not.

    Nothing is ever altered. Raises `ConfigurationError` naming table, column, what was found and
    what was expected.
    """
    form = _vector_form(engine, spec)
    tables = target_tables(spec, keys, is_pgvector=form)
    names = [tables.results.name, tables.failures.name]
    if not all(sa.inspect(engine).has_table(name) for name in names):
        _create(engine, tables)
    found = {name: _found_families(engine, name) for name in names}
    have = found[names[0]]
    text_keys = frozenset(
        name for name, family in keys.items() if _is_text_key(engine, family, have.get(name))
    )
    tables = target_tables(spec, keys, text_keys, is_pgvector=form)
    problems = [
        problem
        for table in (tables.results, tables.failures)
        for problem in _problems(engine, table, found[table.name])
    ] + _key_problems(engine, tables)
    if problems:
        raise ConfigurationError(
            f"Job {spec.name} cannot load into {names[0]}: {'; '.join(problems)}. Change the "
            "table, or name another one in target.table; nothing was altered."
        )
    return tables


def _is_text_key(engine: Engine, family: Family, found: Family | None) -> bool:
    """Tell whether a key goes into the table as text although it has another type here.

    That happens when an earlier partition had texts in the same key column.
    """
    if engine.dialect.name == "sqlite" and family in TIMES:
        return False  # they are stored as ISO 8601 in any case
    return family is not Family.TEXT and found is Family.TEXT


def _vector_form(engine: Engine, spec: JobSpec) -> bool:
    """Tell whether the job's vectors are, or are to be, of pgvector's type."""
    return any(
        prefers_pgvector(engine, spec.target.table, column.name, column.size)
        for column in request_columns(spec.request)
        if column.kind is Kind.VECTOR
    )


def target_tables(
    spec: JobSpec,
    keys: Mapping[str, Family],
    text_keys: frozenset[str] = frozenset(),
    *,
    is_pgvector: bool = False,
) -> TargetTables:
    """Describe the tables of a job, without a database."""
    metadata = sa.MetaData()
    families = {name: Family.TEXT if name in text_keys else keys[name] for name in spec.source.key}
    outputs = request_columns(spec.request)
    results = sa.Table(
        spec.target.table,
        metadata,
        *(sa.Column(name, TYPES[kind], primary_key=True) for name, kind in families.items()),
        *(sa.Column(one.name, _output_type(one, is_pgvector=is_pgvector)) for one in outputs),
        *(_own_column(name) for name in RESULT_COLUMNS),
    )
    failures = sa.Table(
        spec.target.failures_table,
        metadata,
        sa.Column("_key", _TEXT, primary_key=True),
        *(sa.Column(name, TYPES[kind]) for name, kind in families.items()),
        *(_own_column(name) for name in FAILURE_COLUMNS),
    )
    for table in (results, failures):
        # Only ever compared for equality, and random: a hash costs half of a tree.
        sa.Index(_index_name(table.name), table.c["_custom_id"], postgresql_using="hash")
    names = tuple(column.name for column in outputs)
    return TargetTables(results, failures, spec.source.key, names, text_keys)


def _output_type(column: OutputColumn, *, is_pgvector: bool) -> sa.types.TypeEngine[Any]:
    if column.kind is Kind.VECTOR:
        return VectorType(column.size, is_pgvector=is_pgvector)
    return TYPES[OUTPUT_FAMILIES[column.kind]]


def _own_column(name: str) -> sa.Column[Any]:
    kind = TYPES[OWN_FAMILIES.get(name, Family.TEXT)]
    return sa.Column(name, kind, nullable=name in NULLABLE)


def _index_name(table: str) -> str:
    name = f"{table}_custom_id"
    if len(name) <= MAX_IDENTIFIER:
        return name
    digest = hashlib.sha256(table.encode()).hexdigest()[:8]
    return f"{table[: MAX_IDENTIFIER - 19]}_{digest}_custom_id"


def _create(engine: Engine, tables: TargetTables) -> None:
    """Create what is missing; another run may do the same at this moment."""
    metadata = tables.results.metadata
    for _ in metadata.tables:
        with suppress(sa.exc.DBAPIError):  # another run was quicker with one of them
            metadata.create_all(engine)
            return
    metadata.create_all(engine)


def _found_families(engine: Engine, table: str) -> dict[str, Family]:
    return {found["name"]: sql_family(found["type"]) for found in _columns(engine, table)}


def _columns(engine: Engine, table: str) -> Sequence[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sa.exc.SAWarning)  # a type of an extension: judged below
        return sa.inspect(engine).get_columns(table)


def sql_family(kind: sa.types.TypeEngine[Any]) -> Family:
    """Return the family of a column's type."""
    if isinstance(kind, sa.DateTime):
        return Family.AWARE_TIME if kind.timezone else Family.TIME
    known: list[tuple[type[Any], Family]] = [
        (sa.Boolean, Family.BOOLEAN),
        (sa.Integer, Family.INTEGER),
        (sa.Float, Family.REAL),
        (sa.Numeric, Family.NUMERIC),
        (sa.Date, Family.DATE),
        (sa.Enum, Family.OTHER),
        (sa.String, Family.TEXT),
    ]
    return next((family for base, family in known if isinstance(kind, base)), Family.OTHER)


def _problems(engine: Engine, table: sa.Table, found: Mapping[str, Family]) -> list[str]:
    expected = {
        column.name: sql_family(column.type.dialect_impl(engine.dialect))
        for column in table.columns
        if not isinstance(column.type, VectorType)
    }
    problems = [
        f"table {table.name}, column {name}: found {found.get(name, 'no such column')}, "
        f"expected {family}"
        for name, family in expected.items()
        if found.get(name) != family and found.get(name) not in WIDER.get(family, ())
    ]
    problems += _vector_problems(engine, table)
    return problems + [
        f"table {table.name}, column {column['name']}: found a mandatory column without default, "
        "expected none besides those of the job"
        for column in _columns(engine, table.name)
        if column["name"] not in table.c and not column["nullable"] and not column.get("default")
    ]


def _vector_problems(engine: Engine, table: sa.Table) -> list[str]:
    kinds = {one.name: one.type for one in table.columns if isinstance(one.type, VectorType)}
    if not kinds:
        return []
    found = declared_types(engine, table.name)
    judged = {name: vector_problem(engine, kind, found.get(name)) for name, kind in kinds.items()}
    return [
        f"table {table.name}, column {name}: {wrong}" for name, wrong in judged.items() if wrong
    ]


def _key_problems(engine: Engine, tables: TargetTables) -> list[str]:
    inspector = sa.inspect(engine)
    problems = []
    for table, key in ((tables.results, tables.key), (tables.failures, ("_key",))):
        found = [inspector.get_pk_constraint(table.name)["constrained_columns"]]
        found += [one["column_names"] for one in inspector.get_unique_constraints(table.name)]
        if not any(set(columns) == set(key) for columns in found):
            problems.append(
                f"table {table.name}: found primary key ({', '.join(found[0]) or 'none'}), "
                f"expected ({', '.join(key)})"
            )
    return problems

"""A column of vectors in a database.

SQLite: BLOB of little-endian float32, which sqlite-vec and `numpy.frombuffer(v, "<f4")` read.
PostgreSQL: `vector(n)` where the extension pgvector is installed in the database, else `real[]`.
Any other database: text that holds a JSON array.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.ext.compiler import compiles

MOST_PGVECTOR = 16_000  # numbers of a `vector`, README of pgvector
_DECLARED = sa.text(
    "SELECT a.attname, format_type(a.atttypid, a.atttypmod) FROM pg_attribute a "
    "WHERE a.attrelid = to_regclass(:name) AND a.attnum > 0 AND NOT a.attisdropped"
)
_EXTENSION = sa.text("SELECT to_regtype('vector') IS NOT NULL")


class VectorType(sa.types.UserDefinedType[Any]):
    """The type of a column of vectors of `size` numbers."""

    cache_ok = True

    def __init__(self, size: int, *, is_pgvector: bool = False) -> None:
        self.size = size
        self.is_pgvector = is_pgvector

    def get_col_spec(self, **_options: object) -> str:
        """Return the name of the type in a database without one of its own."""
        return "TEXT"


@compiles(VectorType, "sqlite")
def _on_sqlite(_kind: VectorType, _compiler: Any, **_options: object) -> str:
    return "BLOB"


@compiles(VectorType, "postgresql")
def _on_postgresql(kind: VectorType, _compiler: Any, **_options: object) -> str:
    return f"vector({kind.size})" if kind.is_pgvector else "real[]"


def brackets(kind: VectorType) -> tuple[str, str]:
    """Return what stands around the numbers in PostgreSQL's text of a vector."""
    return ("[", "]") if kind.is_pgvector else ("{", "}")


def prefers_pgvector(engine: Engine, table: str, column: str, size: int) -> bool:
    """Tell whether a column is, or is to be, of pgvector's type."""
    if engine.dialect.name != "postgresql":
        return False
    found = declared_types(engine, table).get(column)
    if found is not None:
        return found.startswith("vector")
    with engine.connect() as connection:
        return size <= MOST_PGVECTOR and bool(connection.scalar(_EXTENSION))


def declared_types(engine: Engine, table: str) -> Mapping[str, str]:
    """Return the types of a table's columns as the database writes them; {} without the table."""
    if engine.dialect.name == "postgresql":
        quoted = '"' + table.replace('"', '""') + '"'
        with engine.connect() as connection:
            return {row[0]: row[1] for row in connection.execute(_DECLARED, {"name": quoted})}
    inspector = sa.inspect(engine)
    if not inspector.has_table(table):
        return {}
    return {one["name"]: str(one["type"]) for one in inspector.get_columns(table)}


def vector_problem(engine: Engine, kind: VectorType, found: str | None) -> str | None:
    """Return "found …, expected …" when a column of type `found` cannot hold the vectors."""
    allowed = {
        "sqlite": ("BLOB",),
        "postgresql": ("real[]", f"vector({kind.size})", "vector"),
    }.get(engine.dialect.name, ("TEXT", "LONGTEXT", "MEDIUMTEXT"))
    if found in allowed:
        return None
    expected = " or ".join(allowed[:2]) if len(allowed) == 3 else allowed[0]
    return f"found {found or 'no such column'}, expected {expected}"

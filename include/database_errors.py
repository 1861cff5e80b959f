"""What an error of the target database means for the run.

Messages carry the SQLSTATE and, where it speaks of tables and permissions only, the first line of
the database's own message. A message that may quote a value is never passed on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa

from include.errors import ConfigurationError, LLMBatchError, PermanentError, TransientError

# SQLSTATE classes and codes, PostgreSQL manual, appendix A.
RETRY_CODES = ("40001", "40P01", "55P03", "57P01", "57P02", "57P03", "53", "08")
CONFIGURATION_CLASSES = ("42", "3D", "3F", "28", "0A", "25006")
BUSY = ("database is locked", "database table is locked", "database schema is locked")
# What a PostgreSQL driver says, without any SQLSTATE, of a connection that it was not given.
REFUSED = (
    "authentication failed",
    "permission denied",
    "no pg_hba.conf entry",
    "does not exist",
    "no password supplied",
)
SETUP = ("readonly database", "no such table", "no such column", "unable to open database")


def translated(error: BaseException, table: str) -> LLMBatchError:
    """Return the error of this project for one of the driver or of SQLAlchemy."""
    code, line = _code(error), first_line(error)
    original = getattr(error, "orig", None) or error
    where = f"Table {table}: the database answered"
    if _may_pass(error):
        return TransientError(
            f"{where} {code or line}. Nothing was loaded; the same load may succeed later."
        )
    if is_configuration(error):
        return ConfigurationError(
            f"{where}: {line}. Nothing was loaded. Mend the table, its permissions or the "
            "connection in target.conn_id, then clear the load task."
        )
    return PermanentError(
        f"{where} {code or type(original).__name__} (its message may quote values and is left "
        "out). Nothing was loaded. Check that the table's columns hold the job's values."
    )


def is_configuration(error: BaseException) -> bool:
    """Tell whether somebody has to mend a connection, a right or a table before this can work."""
    if _code(error).startswith(CONFIGURATION_CLASSES) or _is_refused(error):
        return True
    return not _may_pass(error) and any(words in first_line(error) for words in SETUP)


def first_line(error: BaseException) -> str:
    """Return the first line of what the database said; it quotes values for some errors only."""
    original = getattr(error, "orig", None) or error
    return next(iter(str(original).splitlines()), type(original).__name__)


def _code(error: BaseException) -> str:
    original = getattr(error, "orig", None) or error
    return str(getattr(original, "pgcode", None) or getattr(original, "sqlstate", None) or "")


def _may_pass(error: BaseException) -> bool:
    code = _code(error)
    if code.startswith(RETRY_CODES) or first_line(error).startswith(BUSY):
        return True
    return _is_disconnect(error, code) and not _is_refused(error)


def _is_refused(error: BaseException) -> bool:
    """Tell whether a server has refused to let this user in: trying again cannot help."""
    is_connecting = not _code(error) and isinstance(error, sa.exc.OperationalError)
    text = str(error.orig) if is_connecting and isinstance(error, sa.exc.DBAPIError) else ""
    return "FATAL" in text and any(words in text for words in REFUSED)


def _is_disconnect(error: BaseException, code: str) -> bool:
    if getattr(error, "connection_invalidated", False):
        return True
    original = getattr(error, "orig", None) or error
    kinds = {kind.__name__ for kind in type(original).__mro__}
    # A driver reports a server that is away without any SQLSTATE.
    return not code and "OperationalError" in kinds and "sqlite3" not in type(original).__module__


@contextmanager
def database_errors(engine: sa.engine.Engine, table: str) -> Iterator[None]:
    """Turn what the block raises from the database into errors of this project."""
    try:
        yield
    except (sa.exc.SQLAlchemyError, engine.dialect.loaded_dbapi.Error) as error:
        # The driver's error may hold statement parameters: it must not be chained.
        raise translated(error, table) from None

"""CSV files into source tables: `commits` for real data, `tickets` and `reviews` for the demo.

A file may be loaded any number of times: rows are upserted by their key.

    python -m include.source_tables commits data/commits.csv.gz --url sqlite:///source.db
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import Column, DateTime, Engine, MetaData, Table, Text, create_engine
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError

from include.errors import ConfigurationError, PermanentError
from include.figures import counted

if TYPE_CHECKING:
    import pandas as pd

SAMPLE_TICKETS = Path(__file__).parent / "sample_data" / "tickets.csv.gz"
SAMPLE_REVIEWS = Path(__file__).parent / "sample_data" / "reviews.csv.gz"
ROWS_PER_CHUNK = 5_000
# SQLite has no type for times: ISO 8601 text in UTC, so that text order is time order.
_MOMENT = DateTime(timezone=True).with_variant(Text(), "sqlite")
_TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
_METADATA = MetaData()


def _table(name: str, key: str, moment: str, *texts: str) -> Table:
    return Table(
        name,
        _METADATA,
        Column(key, Text, primary_key=True),
        Column(moment, _MOMENT, nullable=False, index=True),
        *(Column(text, Text) for text in texts),
    )


TABLES = {
    "commits": _table("commits", "commit_id", "committed_at", "repository", "subject", "body"),
    "tickets": _table(
        "tickets", "ticket_id", "created_at", "channel", "customer_tier", "subject", "body"
    ),
    "reviews": _table("reviews", "review_id", "written_at", "product", "title", "body"),
}


def load_csv(engine: Engine, csv_path: Path | str, table: str) -> int:
    """Upsert the rows of a CSV or CSV.gz file (UTF-8, with a header) into `table`.

    Creates the table (one of `TABLES`) when it is not there, and returns the number of rows
    read. All or nothing. Raises `ConfigurationError` for a missing file, table, column or value,
    naming the line, and `PermanentError` when the database refuses.
    """
    target, path = _known_table(table), Path(csv_path)
    _check_header(path, target)
    count = 0
    try:
        _METADATA.create_all(engine, [target])
        with engine.begin() as connection:
            upsert = _upsert(engine.dialect.name, target)
            for records in _records(path, target):
                connection.execute(upsert, records)
                count += len(records)
    except DBAPIError as error:
        reason = type(error.orig).__name__
        raise PermanentError(f"Table {table} cannot be loaded from {path}: {reason}.") from None
    return count


def load_sample_tickets(engine: Engine) -> int:
    """Load the 2,000 sample tickets (2026-11-01 to 2026-11-14) into the table `tickets`."""
    return load_csv(engine, SAMPLE_TICKETS, "tickets")


def load_sample_reviews(engine: Engine) -> int:
    """Load the sample reviews (2026-11-01 to 2026-11-14) into the table `reviews`."""
    return load_csv(engine, SAMPLE_REVIEWS, "reviews")


def _known_table(name: str) -> Table:
    if name not in TABLES:
        raise ConfigurationError(f"Unknown table {name[:60]!r}; known: {', '.join(TABLES)}.")
    return TABLES[name]


def _check_header(path: Path, table: Table) -> None:
    import pandas as pd

    if not path.is_file():
        raise ConfigurationError(f"There is no file {path}; give the path of a CSV or CSV.gz file.")
    try:
        found = list(pd.read_csv(path, nrows=0, encoding="utf-8-sig").columns)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigurationError(
            f"{path} is not a CSV file with a header: {type(error).__name__}."
        ) from None
    missing = [column.name for column in table.columns if column.name not in found]
    if missing:
        raise ConfigurationError(
            f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(map(str, found))}."
        )


def _records(path: Path, table: Table) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows in chunks, checked, times in one form, the last of equal keys kept."""
    import pandas as pd

    names = [column.name for column in table.columns]
    first = 2  # the header is line 1
    try:
        with pd.read_csv(
            path,
            usecols=names,
            dtype=str,
            keep_default_na=False,
            chunksize=ROWS_PER_CHUNK,
            encoding="utf-8-sig",
            quoting=csv.QUOTE_MINIMAL,
        ) as chunks:
            for frame in chunks:
                checked = _checked(frame, table, path, first)
                first += len(frame)
                yield cast("list[dict[str, Any]]", checked.to_dict("records"))
    except (pd.errors.ParserError, UnicodeDecodeError, EOFError, OSError) as error:
        raise ConfigurationError(
            f"{path} cannot be read after row {first - 1}: {type(error).__name__}."
        ) from None


def _checked(frame: pd.DataFrame, table: Table, path: Path, first: int) -> pd.DataFrame:
    import pandas as pd

    key, moment = (column.name for column in list(table.columns)[:2])
    times = pd.to_datetime(frame[moment], utc=True, format="ISO8601", errors="coerce")
    for name, wrong in ((key, frame[key] == ""), (moment, times.isna())):
        if wrong.any():
            row = first + int(wrong.to_numpy().argmax())
            expected = "text" if name == key else "an ISO 8601 time such as 2024-04-08T00:00:00Z"
            raise ConfigurationError(f"{path}: row {row}: {name} must be {expected}.")
    frame = frame.assign(**{moment: times.dt.strftime(_TIME_FORMAT)})
    return frame.drop_duplicates(key, keep="last")


def _upsert(dialect: str, table: Table) -> Any:
    if dialect not in ("sqlite", "postgresql"):
        raise ConfigurationError(
            f"Source tables can be made on SQLite and PostgreSQL, not {dialect}."
        )
    insert = (postgresql if dialect == "postgresql" else sqlite).insert(table)
    key, *others = (column.name for column in table.columns)
    return insert.on_conflict_do_update(
        index_elements=[key], set_={name: insert.excluded[name] for name in others}
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Load one CSV file and say how many rows it had."""
    parser = argparse.ArgumentParser(prog="include.source_tables", description=load_csv.__doc__)
    parser.add_argument("table", choices=sorted(TABLES))
    parser.add_argument("csv", type=Path)
    parser.add_argument("--url", required=True, help="SQLAlchemy URL of the source database")
    options = parser.parse_args(arguments)
    try:
        count = load_csv(create_engine(options.url), options.csv, options.table)
    except (ConfigurationError, PermanentError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{options.table}: {counted(count, 'row')} from {options.csv}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

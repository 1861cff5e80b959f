"""What survives a kill: SQLite for the books, plain files for the contents."""

from __future__ import annotations

import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from include.simulator.records import BatchRecord, FileRecord

SCHEMA = Path(__file__).with_name("schema.sql")
INPUT_LIFETIME = 30 * 86_400


class Store:
    """One state folder. Threads borrow connections from a pool; writers take turns.

    `synchronous=OFF` is enough here: a killed process loses nothing that was committed, and a
    simulator need not survive a power cut.
    """

    def __init__(self, state: Path) -> None:
        self.state = state
        self._mine = threading.local()
        self._idle: list[sqlite3.Connection] = []
        for folder in ("files", "scratch"):
            (state / folder).mkdir(parents=True, exist_ok=True)
        for left_over in (state / "scratch").iterdir():
            left_over.unlink()
        with self._connection() as db:
            db.executescript(SCHEMA.read_text(encoding="utf-8"))

    def close(self) -> None:
        """Close the connections that nobody uses."""
        while self._idle:
            self._idle.pop().close()

    def _connect(self) -> sqlite3.Connection:
        path = self.state / "simulator.db"
        db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=OFF")
        return db

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """The connection that this thread holds already, or one from the pool."""
        held: sqlite3.Connection | None = getattr(self._mine, "db", None)
        if held is not None:
            yield held
            return
        try:
            db = self._idle.pop()
        except IndexError:
            db = self._connect()
        self._mine.db = db
        try:
            yield db
        finally:
            self._mine.db = None
            self._idle.append(db)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing; nested use joins the outer transaction."""
        with self._connection() as db:
            if db.in_transaction:
                yield db
                return
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    def rows(self, sql: str, arguments: Iterable[Any] = ()) -> list[sqlite3.Row]:
        """All rows of one query."""
        with self._connection() as db:
            return db.execute(sql, tuple(arguments)).fetchall()

    def stream(self, sql: str, arguments: Iterable[Any] = ()) -> Iterator[sqlite3.Row]:
        """The rows of one query, one by one, over a connection of their own."""
        db = self._connect()
        try:
            yield from db.execute(sql, tuple(arguments))
        finally:
            db.close()

    def change(self, sql: str, arguments: Iterable[Any] = ()) -> sqlite3.Cursor:
        """Execute one statement that writes."""
        with self.transaction() as db:
            return db.execute(sql, tuple(arguments))

    def scratch(self) -> Path:
        """A fresh path for a file that is not yet part of the state."""
        return self.state / "scratch" / secrets.token_hex(8)

    def content(self, file: FileRecord) -> Path:
        """Where the bytes of `file` are."""
        return self.state / "files" / f"{file.no:08d}"

    def add_file(
        self, source: Path, *, filename: str, purpose: str, lifetime: int | None, long: bool = False
    ) -> FileRecord:
        """Move `source` into the state and record it, at once or not at all."""
        now = time.time()
        expires = now + lifetime if lifetime else None
        identity = long_id("file-") if long else "file-" + secrets.token_hex(11)
        with self.transaction() as db:
            cursor = db.execute(
                "INSERT INTO file (id, filename, purpose, bytes, created_at, expires_at)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (identity, filename, purpose, source.stat().st_size, now, expires),
            )
            source.replace(self.state / "files" / f"{cursor.lastrowid:08d}")
        record = self.file(identity)
        if record is None:
            raise LookupError(f"file {identity} vanished while it was being added")
        return record

    def file(self, identity: str) -> FileRecord | None:
        """The file with this id, None when unknown, deleted or expired."""
        sql = "SELECT * FROM file WHERE id = ? AND NOT deleted AND ifnull(expires_at, 1e12) > ?"
        found = self.rows(sql, (identity, time.time()))
        return FileRecord(**found[0]) if found else None

    def files(self) -> list[FileRecord]:
        """All files that can be read, newest first."""
        sql = "SELECT * FROM file WHERE NOT deleted AND ifnull(expires_at, 1e12) > ?"
        return [FileRecord(**r) for r in self.rows(f"{sql} ORDER BY no DESC", (time.time(),))]

    def delete_file(self, file: FileRecord) -> None:
        """Forget the file and free its bytes."""
        self.change("UPDATE file SET deleted = 1 WHERE no = ?", (file.no,))
        self.content(file).unlink(missing_ok=True)

    def remember_size(self, file: FileRecord, *, tokens: int, model: str | None) -> None:
        """Keep what a scan of the file found."""
        sql = "UPDATE file SET input_tokens = ?, model = ? WHERE no = ?"
        self.change(sql, (tokens, model, file.no))

    def add_batch(self, **columns: Any) -> BatchRecord:
        """Record a new batch."""
        names = ", ".join(columns)
        marks = ", ".join("?" * len(columns))
        sql = f"INSERT INTO batch ({names}) VALUES ({marks})"  # noqa: S608 our own column names
        return self.batch_no(self.change(sql, columns.values()).lastrowid or 0)

    def batch_no(self, number: int) -> BatchRecord:
        """The batch with this number, which must exist."""
        return BatchRecord(**self.rows("SELECT * FROM batch WHERE no = ?", (number,))[0])

    def batch(self, identity: str) -> BatchRecord | None:
        """The batch with this id, None when unknown."""
        found = self.rows("SELECT * FROM batch WHERE id = ?", (identity,))
        return BatchRecord(**found[0]) if found else None

    def batches(self, *, below: int | None = None, limit: int = -1) -> list[BatchRecord]:
        """Batches, newest first, with a number under `below`."""
        sql = "SELECT * FROM batch WHERE no < ? ORDER BY no DESC LIMIT ?"
        return [BatchRecord(**row) for row in self.rows(sql, (below or 1 << 60, limit))]

    def batches_since(self, moment: float) -> list[float]:
        """When the batches since `moment` were created, oldest first."""
        sql = "SELECT created_at FROM batch WHERE created_at > ? ORDER BY no"
        return [row["created_at"] for row in self.rows(sql, (moment,))]

    def enqueued(self, model: str | None) -> int:
        """Input tokens of the unfinished batches of a model."""
        sql = "SELECT ifnull(sum(enqueued_tokens), 0) AS n FROM batch WHERE model IS ?"
        return int(self.rows(sql, (model,))[0]["n"])

    def due(self, now: float) -> list[BatchRecord]:
        """Batches whose present status is over."""
        sql = "SELECT * FROM batch WHERE next_at <= ? ORDER BY next_at"
        return [BatchRecord(**row) for row in self.rows(sql, (now,))]

    def next_due(self) -> float | None:
        """When the next status is over."""
        moment: float | None = self.rows("SELECT min(next_at) FROM batch")[0][0]
        return moment

    def change_batch(self, batch: BatchRecord, **columns: Any) -> bool:
        """Set columns if the batch still has the status it had; say whether it had."""
        assignments = ", ".join(f"{name} = ?" for name in columns)
        sql = f"UPDATE batch SET {assignments} WHERE no = ? AND status = ?"  # noqa: S608 our names
        return self.change(sql, (*columns.values(), batch.no, batch.status)).rowcount == 1

    def add_counts(self, counts: dict[str, int]) -> None:
        """Add to the lasting counters."""
        with self.transaction() as db:
            db.executemany(
                "INSERT INTO counter VALUES (?, ?) ON CONFLICT DO UPDATE SET n = n + excluded.n",
                counts.items(),
            )

    def counts(self) -> dict[str, int]:
        """The lasting counters."""
        return {row["name"]: row["n"] for row in self.rows("SELECT name, n FROM counter")}


def long_id(prefix: str) -> str:
    """An id of 260 characters: longer than a file name may be."""
    return prefix + secrets.token_hex(130)[: 260 - len(prefix)]

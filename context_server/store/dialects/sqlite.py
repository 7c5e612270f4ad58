"""SQLite: two engines on one file.

* The *writer* is a single connection in a thread of its own, and its transactions begin IMMEDIATE: a read followed by
  a write can never fail with SQLITE_BUSY_SNAPSHOT, and exactly one connection writes and checkpoints, which also keeps
  clear of the WAL bug of SQLite 3.7.0 to 3.51.2 (mended in 3.44.6, 3.50.7 and 3.51.3).
* The *readers* are query-only, in a few threads.

A whole transaction is one hop to a thread. With a hop for each statement, as an asyncio driver makes them, a busy event
loop would be waited for ten times a commit; and a task that is cancelled while it waits cannot tear a transaction.
"""

import contextlib
import fcntl
import json
import os
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, Self

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool

from context_server.errors import (
    ContextServerError,
    DatabaseBusy,
    DatabaseInUse,
    DatabaseNotSupported,
    StorageBroken,
    StorageFull,
)
from context_server.records import Append, Chunk

BUSY_TIMEOUT_MS = 5000
READERS = 4

WRITER_PRAGMAS = (
    "PRAGMA journal_mode=WAL",
    "PRAGMA synchronous=FULL",  # NORMAL lost 200 of 200 acknowledged commits in a simulated power cut.
    f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}",
    "PRAGMA foreign_keys=ON",
    "PRAGMA journal_size_limit=67108864",
    "PRAGMA trusted_schema=OFF",
    "PRAGMA cache_size=-16384",
)
READER_PRAGMAS = (
    f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}",
    "PRAGMA wal_autocheckpoint=0",
    "PRAGMA trusted_schema=OFF",
    "PRAGMA query_only=ON",
)


def file_url(url: URL) -> URL:
    """The URL of a SQLite file, with the driver that is used.

    Raises:
        DatabaseNotSupported: ``:memory:`` (one shared connection: one task's rollback would discard another's work).
    """
    if not url.database or url.database == ":memory:":
        raise DatabaseNotSupported("an in-memory SQLite database cannot be shared; use the path of a file")
    return url.set(drivername="sqlite+pysqlite")


def _prepare(engine: Engine, pragmas: tuple[str, ...], begin: str) -> None:
    """Has each new connection run ``pragmas`` and each transaction open with ``begin``.

    The driver's own transaction control is off: it would leave SELECT and DDL outside of transactions.
    """

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in pragmas:
            cursor.execute(pragma)
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        connection.exec_driver_sql(begin)


def open_writer(url: URL) -> Engine:
    """The engine of the one connection that writes and checkpoints; to be used by one thread at a time."""
    return _open(url, WRITER_PRAGMAS, "BEGIN IMMEDIATE", connections=1)


def open_readers(url: URL) -> Engine:
    """The engine of the query-only connections; to be used by up to ``READERS`` threads."""
    return _open(url, READER_PRAGMAS, "BEGIN", connections=READERS)


def _open(url: URL, pragmas: tuple[str, ...], begin: str, *, connections: int) -> Engine:
    engine = create_engine(
        url,
        poolclass=QueuePool,
        pool_size=connections,
        max_overflow=0,
        pool_reset_on_return=None,  # Every transaction is ended by its own context manager.
        connect_args={"check_same_thread": False},
        hide_parameters=True,  # An error's text must not carry what was said.
    )
    _prepare(engine, pragmas, begin)
    return engine


# All rows of a batch travel as one JSON parameter: the driver lets go of the interpreter lock once for a statement,
# and not once for a row, which a busy event loop would make it wait for each time.
_ADVANCE_MESSAGES = """
UPDATE messages
SET sequence = batch.sequence,
    content_bytes = batch.content_bytes,
    status = CASE WHEN batch.sequence > 0 THEN 'streaming' ELSE status END
FROM (
    SELECT json_extract(value, '$[0]') AS id, json_extract(value, '$[1]') AS attempt,
           json_extract(value, '$[2]') AS expected, json_extract(value, '$[3]') AS sequence,
           json_extract(value, '$[4]') AS content_bytes
    FROM json_each(?)
) AS batch
WHERE messages.id = batch.id AND messages.attempt = batch.attempt AND messages.sequence = batch.expected
  AND messages.status IN ('pending', 'streaming')
"""
_INSERT_CHUNKS = """
INSERT INTO chunks (message_id, sequence, kind, text, data)
SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
       json_extract(value, '$[3]'), json_extract(value, '$[4]')
FROM json_each(?)
"""


def lock_context(_connection: Connection, _owner: str, _context_id: str) -> None:
    """Nothing: the one writer's transaction, which began IMMEDIATE, holds the whole database."""


def lock_key(_connection: Connection, _owner: str, _key: str) -> None:
    """Nothing, for the same reason."""


def lock_schema(_connection: Connection) -> None:
    """Nothing, for the same reason."""


def end_stalled_sessions(_connection: Connection) -> int:
    """There are none: no other process has the file."""
    return 0


def version_of(_connection: Connection) -> str:
    """The version of the library."""
    return sqlite3.sqlite_version


def advance_messages(connection: Connection, appends: Sequence[Append]) -> bool:
    """Moves the head of each message of a batch, by primary key. Leases are not looked at: there is one process."""
    rows = [
        (append.run.message_id, append.run.attempt, append.expected_sequence, append.sequence, append.content_bytes)
        for append in appends
    ]
    return connection.exec_driver_sql(_ADVANCE_MESSAGES, (json.dumps(rows),)).rowcount == len(rows)


def insert_chunks(connection: Connection, message_id_and_chunk: Iterable[tuple[str, Chunk]]) -> None:
    """Adds the chunks of a batch, in one statement."""
    rows = [
        (
            message_id,
            chunk.sequence,
            chunk.kind,
            chunk.text,
            None if chunk.data is None else json.dumps(chunk.data, separators=(",", ":")),
        )
        for message_id, chunk in message_id_and_chunk
    ]
    if rows:
        connection.exec_driver_sql(_INSERT_CHUNKS, (json.dumps(rows, ensure_ascii=False),))


def named_failure(error: DBAPIError) -> ContextServerError | None:
    """The failure that a driver's error means, or None for a defect of ours.

    A failed *write* was rolled back and can be repeated when there is room again. After a failed *sync* nobody knows
    what the disk holds, so nothing may be acknowledged any more.
    """
    name = getattr(error.orig, "sqlite_errorname", None) or ""
    if name == "SQLITE_FULL" or name in ("SQLITE_IOERR_WRITE", "SQLITE_IOERR_TRUNCATE", "SQLITE_IOERR_SHMSIZE"):
        return StorageFull()
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return DatabaseBusy()
    if name.startswith(("SQLITE_IOERR", "SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_READONLY")) or name in (
        "SQLITE_CANTOPEN",
        "SQLITE_PERM",
    ):
        return StorageBroken(name)
    return None


def has_wal_bug(version: tuple[int, ...] = sqlite3.sqlite_version_info) -> bool:
    """Whether this SQLite can corrupt a WAL database that two connections write or checkpoint at once."""
    mended = (version >= (3, 51, 3)) or ((3, 50, 7) <= version < (3, 51)) or ((3, 44, 6) <= version < (3, 45))
    return version >= (3, 7, 0) and not mended


class FileLock:
    """One serving process per SQLite file: an advisory lock beside it, freed by the kernel when the process dies."""

    def __init__(self, url: URL) -> None:
        self._database = Path(url.database or "").expanduser().resolve()
        self._path = self._database.with_name(self._database.name + ".lock")
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        """Takes the lock.

        Raises:
            DatabaseInUse: another process has it.
            DatabaseNotSupported: the folder cannot be written.
        """
        try:
            self._file = self._path.open("a+", encoding="ascii")
        except OSError as error:
            raise DatabaseNotSupported(f"database {self._database} cannot be opened: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise DatabaseInUse(
                f"database {self._database} is served by another process (pid {holder}); one SQLite file has one server"
            ) from None
        with contextlib.suppress(OSError):  # It is for a message only, and the disk may be full.
            self._file.seek(0)
            self._file.truncate()
            self._file.write(str(os.getpid()))
            self._file.flush()
        return self

    def __exit__(self, *_: object) -> None:
        # The file stays: removing it would let a third process lock another inode of the same name.
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

"""PostgreSQL, by asyncpg: many nodes write, so rows are locked, leases looked at, and a commit's outcome can be lost.

Locks are taken in one order, context, then messages, then runs, so that two transactions never wait for each other;
where they do all the same (a deletion's cascade), PostgreSQL ends one of them, and it is run again.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError

from context_server.errors import (
    ContextServerError,
    DatabaseBusy,
    DatabaseNotSupported,
    DatabaseUnreachable,
    StorageFull,
)
from context_server.records import Append, Chunk

if TYPE_CHECKING:  # It needs greenlet, which only the extra brings.
    from sqlalchemy.ext.asyncio import AsyncEngine

CONNECT_SECONDS = 5.0
COMMAND_SECONDS = 12.0
"""How long a statement may take before its connection is given up: the network may be gone without a word."""
POOL_SECONDS = 5.0

_APPLICATION_NAME = "context-server"
_SERVER_SETTINGS = {
    "application_name": _APPLICATION_NAME,
    "synchronous_commit": "on",
    "statement_timeout": "10000",
    "lock_timeout": "4000",
    # A node that was stopped in the middle of a transaction must not hold its rows until it goes on.
    "idle_in_transaction_session_timeout": "5000",
    # A node whose machine or network is gone without a word: its sessions end, and their locks with them.
    "tcp_keepalives_idle": "5",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "15000",
    "jit": "off",  # Every statement here is short: compiling one costs more than running it.
    # Every statement here finds its rows by an index. A plan that was made while a table was small, and reads all of
    # it, is kept while it grows: 165 ms with 300,000 chunks in place of 0.5, until the statistics had caught up.
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_material": "off",
}
_DRIVERS = ("postgresql", "postgres", "postgresql+asyncpg")
_SCHEMA_LOCK = 6_015_203_497_110_382_000  # Any number that no other program is likely to lock.


def server_url(url: URL) -> URL:
    """The URL of a database, with the driver that is used.

    Raises:
        DatabaseNotSupported: it names another driver, or the extra is not installed.
    """
    if url.drivername not in _DRIVERS:
        raise DatabaseNotSupported(f"driver {url.drivername!r} is not supported; use postgresql+asyncpg://…")
    try:
        import asyncpg  # type: ignore[import-untyped]  # noqa: F401  # Looked for only when it is asked for.
    except ImportError:
        raise DatabaseNotSupported(
            "PostgreSQL needs the extra 'postgres': pip install 'context-server[postgres]'"
        ) from None
    return url.set(drivername="postgresql+asyncpg")


def open_appender(url: URL) -> "AsyncEngine":
    """The engine of the group commit: it waits for no lock longer than leases of the default length can bear."""
    return _open(url, 1, isolation_level="READ COMMITTED", settings={"lock_timeout": "1000"})


def open_writers(url: URL, connections: int) -> "AsyncEngine":
    """The engine for transactions that write: READ COMMITTED, with row locks."""
    return _open(url, connections, isolation_level="READ COMMITTED")


def open_alterer(url: URL) -> "AsyncEngine":
    """The engine for a change of the schema: a statement may take as long as a large table needs."""
    settings = {"statement_timeout": "0"}
    return _open(url, 1, isolation_level="READ COMMITTED", settings=settings, command_seconds=None)


def open_readers(url: URL, connections: int) -> "AsyncEngine":
    """The engine for transactions that read: each sees one consistent picture of the log."""
    engine = _open(url, connections, isolation_level="REPEATABLE READ")
    return engine.execution_options(postgresql_readonly=True)


def _open(
    url: URL,
    connections: int,
    *,
    isolation_level: str,
    settings: Mapping[str, str] | None = None,
    command_seconds: float | None = COMMAND_SECONDS,
) -> "AsyncEngine":
    from sqlalchemy.ext.asyncio import create_async_engine

    return create_async_engine(
        url,
        pool_size=connections,
        max_overflow=0,
        pool_timeout=POOL_SECONDS,
        # No ping before each use, which would be a round trip more: a transaction whose connection turns out to be gone
        # has done nothing, and is run again on another.
        pool_pre_ping=False,
        isolation_level=isolation_level,
        connect_args={
            "timeout": CONNECT_SECONDS,
            "command_timeout": command_seconds,
            "server_settings": {**_SERVER_SETTINGS, **(settings or {})},
        },
        hide_parameters=True,  # An error's text must not carry what was said.
    )


# Locks

_LOCK_CONTEXT = text("SELECT 1 FROM contexts WHERE id = :id AND owner = :owner FOR UPDATE")
_LOCK_NUMBER = text("SELECT pg_advisory_xact_lock(:number)")


def lock_context(connection: Connection, owner: str, context_id: str) -> None:
    """Locks the context's row; what is read of it afterwards is the newest."""
    connection.execute(_LOCK_CONTEXT, {"id": context_id, "owner": owner})


def lock_key(connection: Connection, owner: str, key: str) -> None:
    """Locks a number made from the key, since a new key has no row yet."""
    digest = hashlib.blake2b(json.dumps([owner, key]).encode(), digest_size=8).digest()
    connection.execute(_LOCK_NUMBER, {"number": int.from_bytes(digest, "big", signed=True)})


def lock_schema(connection: Connection) -> None:
    """Locks a number: there may be no table yet."""
    connection.execute(_LOCK_NUMBER, {"number": _SCHEMA_LOCK})


_END_STALLED_SESSIONS = text("""
SELECT count(pg_terminate_backend(pid))
FROM pg_stat_activity
WHERE datname = current_database() AND usename = session_user AND application_name = :application_name
  AND state = 'active' AND wait_event IN ('ClientRead', 'ClientWrite')
  AND state_change < clock_timestamp() - :stalled_ms * interval '1 millisecond'
""")
_STALLED_MS = 3000
_NOT_OFFERED = ("42501", "42883", "42P01", "0A000")
"""insufficient_privilege, undefined_function, undefined_table, feature_not_supported"""


def end_stalled_sessions(connection: Connection) -> int:
    """Ends sessions of nodes that have stood still in the middle of a statement for 3 s; how many.

    Between the messages of one statement (Parse, Bind, Execute), and while an answer does not get through, a session is
    not idle in its transaction, and no time-out of the server holds: what its transaction has locked stays locked. A
    server that does not offer this to its users is left alone.
    """
    values = {"application_name": _APPLICATION_NAME, "stalled_ms": _STALLED_MS}
    try:
        return int(connection.execute(_END_STALLED_SESSIONS, values).scalar_one())
    except DBAPIError as error:
        if sqlstate_of(error) in _NOT_OFFERED:
            return 0
        raise


def version_of(connection: Connection) -> str:
    """The version of the server."""
    return str(connection.execute(text("SHOW server_version")).scalar_one()).partition(" ")[0]


# The append: the rows of a batch travel as arrays, so that a statement is one round trip however many there are.

_ADVANCE_MESSAGES = """
UPDATE messages
SET sequence = batch.sequence,
    content_bytes = batch.content_bytes,
    status = CASE WHEN batch.sequence > 0 THEN 'streaming' ELSE messages.status END
FROM unnest($1::text[], $2::text[], $3::int[], $4::bigint[], $5::bigint[], $6::bigint[])
     AS batch (message_id, run_id, attempt, expected, sequence, content_bytes),
     runs
WHERE messages.id = batch.message_id AND messages.attempt = batch.attempt AND messages.sequence = batch.expected
  AND messages.status IN ('pending', 'streaming')
  AND runs.id = batch.run_id AND runs.attempt = batch.attempt AND runs.status = 'running'
  AND runs.lease_expires_at > (extract(epoch FROM clock_timestamp()) * 1000)::bigint
"""
_INSERT_CHUNKS = """
INSERT INTO chunks (message_id, sequence, kind, text, data)
SELECT message_id, sequence, kind, text, data::json
FROM unnest($1::text[], $2::bigint[], $3::text[], $4::text[], $5::text[])
     AS batch (message_id, sequence, kind, text, data)
"""


def advance_messages(connection: Connection, appends: Sequence[Append]) -> bool:
    """Moves the head of each message of a batch, by primary keys; runs without a living lease are not hit."""
    columns: tuple[list[Any], ...] = (
        [append.run.message_id for append in appends],
        [append.run.id for append in appends],
        [append.run.attempt for append in appends],
        [append.expected_sequence for append in appends],
        [append.sequence for append in appends],
        [append.content_bytes for append in appends],
    )
    return connection.exec_driver_sql(_ADVANCE_MESSAGES, columns).rowcount == len(appends)


def insert_chunks(connection: Connection, message_id_and_chunk: Iterable[tuple[str, Chunk]]) -> None:
    """Adds the chunks of a batch, in one statement."""
    rows = [
        (
            message_id,
            chunk.sequence,
            chunk.kind.value,
            chunk.text,
            None if chunk.data is None else json.dumps(chunk.data, separators=(",", ":")),
        )
        for message_id, chunk in message_id_and_chunk
    ]
    if rows:
        connection.exec_driver_sql(_INSERT_CHUNKS, tuple(map(list, zip(*rows, strict=True))))


# Failures

_REPEATABLE = ("40001", "40P01")  # serialization_failure, deadlock_detected
_WAITED_TOO_LONG = ("55P03", "57014")  # lock_not_available, query_canceled (by statement_timeout)
_UNREACHABLE_CLASSES = ("08", "53", "57", "58")  # connection, resources, operator intervention, system error
_UNREACHABLE = ("25P03", "25006")  # idle_in_transaction_session_timeout; a standby after a failover
_MISNAMED_CLASSES = ("28", "3D")  # authorization, no such database


def named_failure(error: Exception) -> ContextServerError | None:
    """The failure that an error of the driver or of the server means, or None for a defect of ours."""
    state = sqlstate_of(error)
    if state == "53100":
        return StorageFull()
    if state in _REPEATABLE or state in _WAITED_TOO_LONG:
        return DatabaseBusy()
    if is_disconnect(error) or state in _UNREACHABLE or state[:2] in _UNREACHABLE_CLASSES:
        return DatabaseUnreachable(reason_of(error))
    if state[:2] in _MISNAMED_CLASSES:
        return DatabaseNotSupported(f"the database cannot be used: {getattr(error, 'orig', error)}")
    return None


def reason_of(error: Exception) -> str:
    """What the driver says of a connection that it could not make or has lost: ``ConnectionRefusedError: …``."""
    origin = getattr(error, "orig", error)
    return f"{type(origin).__name__}: {origin}".rstrip(": ")


def sqlstate_of(error: Exception) -> str:
    """The five characters by which the server names an error, or nothing; also of one that SQLAlchemy did not wrap."""
    return getattr(getattr(error, "orig", error), "sqlstate", None) or ""


def is_disconnect(error: Exception) -> bool:
    """Whether the connection turned out to be gone."""
    return isinstance(error, DBAPIError) and error.connection_invalidated


def is_repeatable(error: Exception) -> bool:
    """Whether the transaction was rolled back only because of another one, and may simply be run again."""
    return sqlstate_of(error) in _REPEATABLE

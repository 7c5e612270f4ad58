"""Ends a message whose writer is not there to say what it wrote: the text is read back for its digest."""

import hashlib
from dataclasses import dataclass

from sqlalchemy import Connection

from context_server.records import (
    MAX_INTEGER,
    Chunk,
    ChunkKind,
    EndedMessage,
    Failure,
    MessageStatus,
    unfinished_result,
)
from context_server.store import statements
from context_server.store.dialects import dialect_of
from context_server.store.rows import from_failure

_ROWS = 1000


@dataclass(frozen=True, slots=True)
class _Written:
    """What a message holds: its chunks, the SHA-256 of its text, and the tool calls that have no result."""

    sequence: int
    digest: str
    open_calls: tuple[str, ...]


def _read(connection: Connection, message_id: str) -> _Written:
    """What a message holds, read a thousand rows at a time."""
    digest = hashlib.sha256()
    sequence = 0
    open_calls: dict[str, None] = {}
    while rows := connection.execute(*statements.select_chunks(message_id, sequence, MAX_INTEGER, _ROWS)).all():
        for row in rows:
            match row.kind:
                case ChunkKind.TEXT:
                    digest.update(row.text.encode())
                case ChunkKind.TOOL_CALL:
                    open_calls[str(row.data.get("id"))] = None
                case ChunkKind.TOOL_RESULT:
                    open_calls.pop(str(row.data.get("id")), None)
        sequence = rows[-1].sequence
    return _Written(sequence, digest.hexdigest(), tuple(open_calls))


def end_message(
    connection: Connection,
    message_id: str,
    status: MessageStatus,
    version: int,
    now_ms: int,
    failure: Failure | None = None,
    *,
    open_calls: str,
) -> EndedMessage:
    """Closes the message at the sequence that it holds, after a result for each open tool call that has none.

    ``open_calls`` is the status of those results: ``cancelled``, ``expired`` or ``interrupted``.
    """
    written = _read(connection, message_id)
    results = [
        Chunk(written.sequence + number, ChunkKind.TOOL_RESULT, None, unfinished_result(call_id, open_calls))
        for number, call_id in enumerate(written.open_calls, start=1)
    ]
    if results:
        dialect_of(connection).insert_chunks(connection, [(message_id, chunk) for chunk in results])
        connection.execute(*statements.add_content_bytes(message_id, sum(chunk.size_bytes for chunk in results)))
    sequence = written.sequence + len(results)
    values = {
        "status": status,
        "sequence": sequence,
        "final_sequence": sequence,
        "digest": written.digest,
        "ended_version": version,
        "completed_at": now_ms,
        "error": from_failure(failure),
    }
    connection.execute(*statements.update_message(message_id, values))
    return EndedMessage(id=message_id, status=status, final_sequence=sequence)

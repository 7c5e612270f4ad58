"""Ends a message whose writer is not there to say what it wrote: the text is read back for its digest."""

import hashlib

from sqlalchemy import Connection

from context_server.records import MAX_INTEGER, ChunkKind, EndedMessage, Failure, MessageStatus
from context_server.store import statements
from context_server.store.rows import from_failure

_ROWS = 1000


def _read_digest(connection: Connection, message_id: str) -> tuple[int, str]:
    """The number of chunks of a message and the SHA-256 of its text, read a thousand rows at a time."""
    digest = hashlib.sha256()
    sequence = 0
    while rows := connection.execute(*statements.select_chunks(message_id, sequence, MAX_INTEGER, _ROWS)).all():
        for row in rows:
            if row.kind == ChunkKind.TEXT:
                digest.update(row.text.encode())
        sequence = rows[-1].sequence
    return sequence, digest.hexdigest()


def end_message(
    connection: Connection,
    message_id: str,
    status: MessageStatus,
    version: int,
    now_ms: int,
    failure: Failure | None = None,
) -> EndedMessage:
    """Closes the message at the sequence that it holds."""
    sequence, digest = _read_digest(connection, message_id)
    values = {
        "status": status,
        "final_sequence": sequence,
        "digest": digest,
        "ended_version": version,
        "completed_at": now_ms,
        "error": from_failure(failure),
    }
    connection.execute(*statements.update_message(message_id, values))
    return EndedMessage(id=message_id, status=status, final_sequence=sequence)

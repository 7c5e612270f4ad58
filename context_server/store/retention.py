"""Retention: contexts without activity are deleted, the large ones too in small transactions.

First a context is taken from its owner: every request is scoped by owner, so in that moment, in one transaction, it is
gone for everybody with all that it holds, and nobody can see it half deleted. Then its rows are deleted, some in each
transaction. What a crash leaves is nobody's, and the next process goes on with it.
"""

from dataclasses import dataclass

from sqlalchemy import Connection

from context_server.store import keeping_statements, statements

_CONTEXTS = 50
_MESSAGES = 50
_ROWS = 500
_SEGMENT_ROWS = 20
"""What one transaction deletes: contexts, messages, rows of chunks; and how many of those a segment counts for.

A commit of live replies may have to wait for it.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpiredContext:
    """A context that was deleted: whose it was, and the version that its deletion made."""

    owner: str
    context_id: str
    version: int


def expire_contexts(connection: Connection, *, inactive_since_ms: int) -> list[ExpiredContext]:
    """Some contexts in which nothing has happened since then and no run is active, oldest first; deleted for everybody.

    Their rows are left for ``clear_contexts``.
    """
    rows = connection.execute(*keeping_statements.lock_inactive(inactive_since_ms, _CONTEXTS)).all()
    if rows:
        connection.execute(*keeping_statements.disown([row.id for row in rows]))
    return [ExpiredContext(owner=row.owner, context_id=row.id, version=row.version + 1) for row in rows]


def clear_contexts(connection: Connection) -> bool:
    """Deletes some rows of a context that is nobody's any more; False when there is none."""
    context_id = connection.scalars(*keeping_statements.lock_nobodys()).one_or_none()
    if context_id is None:
        return False
    message_ids = connection.scalars(*keeping_statements.lock_messages(context_id, _MESSAGES)).all()
    emptied = []
    left = _ROWS
    for message_id in message_ids:
        left -= connection.execute(*keeping_statements.delete_first_chunks(message_id, left)).rowcount
        if left <= 0:
            break
        limit = -(-left // _SEGMENT_ROWS)
        left -= (
            _SEGMENT_ROWS * connection.execute(*keeping_statements.delete_first_segments(message_id, limit)).rowcount
        )
        if left <= 0:
            break
        emptied.append(message_id)
    if emptied:
        connection.execute(*keeping_statements.delete_messages(emptied))
    if len(emptied) == len(message_ids) < _MESSAGES:
        connection.execute(*statements.delete_context(context_id))
    return True

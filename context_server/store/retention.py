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


def expire_contexts(connection: Connection, *, min_age_ms: int) -> list[ExpiredContext]:
    """Some contexts in which nothing has happened for so long and no run is active, oldest first; gone for everybody.

    Their rows are left for ``clear_contexts``. What time it is says the database: no node whose clock is ahead may
    delete what others still want.
    """
    now_ms = connection.execute(*statements.select_now_ms()).scalar_one()
    rows = connection.execute(*keeping_statements.lock_inactive(now_ms - min_age_ms, _CONTEXTS)).all()
    if rows:
        connection.execute(*keeping_statements.disown([row.id for row in rows]))
    return [ExpiredContext(owner=row.owner, context_id=row.id, version=row.version + 1) for row in rows]


def clear_contexts(connection: Connection) -> bool:
    """Deletes some rows of contexts that are nobody's any more; False when there are none."""
    rows = _ROWS
    for number in range(_CONTEXTS):
        context_id = connection.scalars(*keeping_statements.lock_nobodys()).one_or_none()
        if context_id is None:
            return number > 0
        rows = _clear_context(connection, context_id, rows)
        if rows <= 0:
            break
    return True


def _clear_context(connection: Connection, context_id: str, rows: int) -> int:
    """Deletes up to so many rows of a context, and it too once it is empty; how many more may be deleted."""
    message_ids = connection.scalars(*keeping_statements.lock_messages(context_id, _MESSAGES)).all()
    emptied = []
    for message_id in message_ids:
        rows -= connection.execute(*keeping_statements.delete_first_chunks(message_id, rows)).rowcount
        if rows <= 0:
            break
        limit = -(-rows // _SEGMENT_ROWS)
        rows -= (
            _SEGMENT_ROWS * connection.execute(*keeping_statements.delete_first_segments(message_id, limit)).rowcount
        )
        if rows <= 0:
            break
        emptied.append(message_id)
    if emptied:
        connection.execute(*keeping_statements.delete_messages(emptied))
    if len(emptied) < len(message_ids) or len(message_ids) == _MESSAGES:
        return 0  # The rest of it in the next transaction.
    if connection.execute(*keeping_statements.select_has_messages(context_id)).first() is None:
        connection.execute(*statements.delete_context(context_id))
    return rows - len(emptied) - 1

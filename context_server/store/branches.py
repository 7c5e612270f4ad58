"""Forks: a new context with the history of another, whose text it shares. Inside a write transaction of ``Store``."""

from typing import Any

from sqlalchemy import Connection, Row

from context_server.errors import MessageOpen
from context_server.records import Context, State, new_id
from context_server.store import branch_statements, statements, waiting
from context_server.store.conversations import fetch_context, fetch_message, lock_row

_COPIED = (
    "role",
    "status",
    "sequence",
    "content_bytes",
    "final_sequence",
    "display",
    "client_metadata",
    "payload",
    "error",
    "digest",
    "mode",
    "created_at",
    "completed_at",
)


def fork(
    connection: Connection,
    *,
    owner: str,
    epoch: str,
    now_ms: int,
    context_id: str,
    message_id: str,
    title: str | None,
) -> Context:
    """A new idle context, whose history is the line of another up to a message; no text is copied.

    Raises:
        ContextNotFound, MessageNotFound.
        MessageOpen: the message, or one before it, is still being written or waits for its turn.
    """
    source = lock_row(connection, owner, context_id, None)
    fetch_message(connection, source, message_id)
    line = connection.execute(*branch_statements.select_forked(context_id, message_id)).all()
    for row in line:  # A message of a person has ended, but what waits or steers may follow a reply that has not.
        if row.final_sequence is None:
            raise MessageOpen(row.id)
    waiting.refuse_as_parent(connection, source, message_id)
    fork_id = new_id()
    ids = {row.id: new_id() for row in line}
    connection.execute(
        *statements.insert_context(
            {
                "id": fork_id,
                "owner": owner,
                "title": source.title if title is None else title,
                "mode": source.mode,
                "state": State.IDLE,
                "version": 1,
                "message_count": len(line),
                "head_message_id": ids[message_id],
                "metadata": source.metadata,
                "model": source.model,
                "created_at": now_ms,
                "updated_at": now_ms,
            }
        )
    )
    rows = [_shared(row, number, fork_id, ids) for number, row in enumerate(line, start=1)]
    connection.execute(*statements.insert_messages(rows))
    return fetch_context(connection, owner, fork_id, epoch)


def _shared(row: Row[Any], position: int, context_id: str, ids: dict[str, str]) -> dict[str, Any]:
    """The row of a message in a fork. Its usage is not copied: it was paid for once."""
    copied = {name: getattr(row, name) for name in _COPIED}
    return copied | {
        "id": ids[row.id],
        "context_id": context_id,
        "position": position,
        "parent_id": ids.get(row.parent_id),
        "ended_version": 1,
        "attempt": 0,
        "content_id": row.content_id or row.id,
        # It has no chunks of its own to be compacted.
        "compacted_sequence": row.final_sequence,
        # What steered another context's run stands in the history as what it was; no run takes it any more.
        "steers_run_id": None if row.steered_at is None else row.steers_run_id,
        "steered_at": row.steered_at,
    }

"""What clients' commands do to the database; each function runs inside one write transaction of ``Store``."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Row

from context_server.errors import CommandNotAllowed, ContextNotFound, VersionMismatch
from context_server.machine import ALLOWED_COMMANDS, Event, TransitionRefused, advance
from context_server.records import (
    Chunk,
    ChunkKind,
    Command,
    Context,
    EndedMessage,
    MessageStatus,
    Mode,
    Receipt,
    Role,
    RunStatus,
    State,
    Transition,
    new_id,
)
from context_server.storable import split_text
from context_server.store import keeping_statements, run_statements, statements
from context_server.store.dialects import dialect_of
from context_server.store.endings import end_message
from context_server.store.moves import move_context
from context_server.store.rows import to_context

_CHUNKS_AT_ONCE = 1000
"""So many rows a deletion takes with it in one transaction; they take about 30 ms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Post:
    """A user's message as it came in."""

    text: str
    display: Any = None
    client_metadata: Mapping[str, Any] = field(default_factory=dict)


def fetch_context(connection: Connection, owner: str, context_id: str, epoch: str) -> Context:
    """The context.

    Raises:
        ContextNotFound: there is none, or it belongs to another owner.
    """
    return to_context(_fetch_row(connection, owner, context_id), epoch)


def _lock_row(connection: Connection, owner: str, context_id: str, if_match: int | None) -> Row[Any]:
    """The row of a context that this transaction is about to change; nobody else changes it until it ends."""
    dialect_of(connection).lock_context(connection, owner, context_id)
    row = _fetch_row(connection, owner, context_id)
    if if_match is not None and row.version != if_match:
        raise VersionMismatch(if_match, row.version)
    return row


def _fetch_row(connection: Connection, owner: str, context_id: str) -> Row[Any]:
    row = connection.execute(*statements.select_context(owner, context_id)).one_or_none()
    if row is None:
        raise ContextNotFound(context_id)
    return row


def create_context(
    connection: Connection,
    *,
    owner: str,
    epoch: str,
    now_ms: int,
    title: str | None,
    mode: Mode,
    metadata: Mapping[str, Any],
) -> Context:
    """A new context, idle, at version 1."""
    context_id = new_id()
    connection.execute(
        *statements.insert_context(
            {
                "id": context_id,
                "owner": owner,
                "title": title,
                "mode": mode,
                "state": State.IDLE,
                "version": 1,
                "message_count": 0,
                "metadata": dict(metadata),
                "created_at": now_ms,
                "updated_at": now_ms,
            }
        )
    )
    return fetch_context(connection, owner, context_id, epoch)


def change_context(
    connection: Connection,
    *,
    owner: str,
    epoch: str,
    now_ms: int,
    context_id: str,
    changes: Mapping[str, Any],
    if_match: int | None,
) -> Context:
    """The context with ``changes`` (columns), one version on; unchanged when there are none.

    Raises:
        ContextNotFound, VersionMismatch.
    """
    row = _lock_row(connection, owner, context_id, if_match)
    if changes:
        values = {**changes, "version": row.version + 1, "updated_at": now_ms}
        move_context(connection, context_id, row.version, values)
    return fetch_context(connection, owner, context_id, epoch)


def delete_context(
    connection: Connection, *, owner: str, epoch: str, now_ms: int, context_id: str, if_match: int | None
) -> Context:
    """The context as it was, gone with its messages; a run of it hits no row any more and is fenced.

    A long one is taken from its owner, and the keeper deletes its rows in small steps: a cascade over very many would
    hold up the replies of others.

    Raises:
        ContextNotFound, VersionMismatch.
    """
    row = _lock_row(connection, owner, context_id, if_match)
    if connection.execute(*statements.count_chunks(context_id)).scalar_one() <= _CHUNKS_AT_ONCE:
        connection.execute(*statements.delete_context(context_id))
        return to_context(row, epoch)
    if row.active_run_id is not None:
        connection.execute(*statements.lock_message(row.run_message_id))  # Its writer may be about to append.
        _end_run_here(connection, row, row.version + 1, now_ms)
        values = {"state": State.IDLE, "version": row.version + 1, "active_run_id": None, "updated_at": now_ms}
        move_context(connection, context_id, row.version, values)
    connection.execute(*keeping_statements.disown([context_id]))
    return to_context(row, epoch)


def post_message(
    connection: Connection, *, owner: str, now_ms: int, context_id: str, post: Post, if_match: int | None
) -> tuple[Receipt, Transition]:
    """The user's message, the empty reply and its queued run; the context is ``queued``.

    Raises:
        ContextNotFound, VersionMismatch.
        CommandNotAllowed: the context is busy.
    """
    row = _lock_row(connection, owner, context_id, if_match)
    state = State(row.state)
    try:
        queued = advance(state, Event.MESSAGE_POSTED)
    except TransitionRefused:
        raise CommandNotAllowed(Command.SEND, state, ALLOWED_COMMANDS[state]) from None
    receipt = Receipt(
        context_id=context_id,
        message_id=new_id(),
        reply_message_id=new_id(),
        run_id=new_id(),
        state=queued,
        version=row.version + 1,
    )
    _insert_exchange(connection, row, receipt, post, now_ms)
    move_context(
        connection,
        context_id,
        row.version,
        {
            "state": queued,
            "version": receipt.version,
            "message_count": row.message_count + 2,
            "head_message_id": receipt.reply_message_id,
            "active_run_id": receipt.run_id,
            "updated_at": now_ms,
        },
    )
    transition = Transition(
        context_id=context_id,
        run_id=receipt.run_id,
        previous_state=state,
        previous_version=row.version,
        state=queued,
        version=receipt.version,
    )
    return receipt, transition


def _insert_exchange(connection: Connection, context: Row[Any], receipt: Receipt, post: Post, now_ms: int) -> None:
    """The rows of a user's message and of the reply that will answer it."""
    pieces = split_text(post.text)
    encoded = post.text.encode()
    common = {"context_id": context.id, "attempt": 0, "error": None, "usage": None, "created_at": now_ms}
    user = {
        "id": receipt.message_id,
        "position": context.message_count + 1,
        "parent_id": context.head_message_id,
        "role": Role.USER,
        "status": MessageStatus.COMPLETED,
        "sequence": len(pieces),
        "content_bytes": len(encoded),
        "final_sequence": len(pieces),
        "ended_version": receipt.version,
        "run_id": None,
        "display": post.display,
        "client_metadata": dict(post.client_metadata),
        "digest": hashlib.sha256(encoded).hexdigest(),
        "completed_at": now_ms,
    }
    reply = {
        "id": receipt.reply_message_id,
        "position": context.message_count + 2,
        "parent_id": receipt.message_id,
        "role": Role.ASSISTANT,
        "status": MessageStatus.PENDING,
        "sequence": 0,
        "content_bytes": 0,
        "final_sequence": None,
        "ended_version": None,
        "run_id": receipt.run_id,
        "display": None,
        "client_metadata": {},
        "digest": None,
        "completed_at": None,
    }
    connection.execute(*statements.insert_messages([common | user, common | reply]))
    dialect_of(connection).insert_chunks(
        connection,
        [(receipt.message_id, Chunk(number, ChunkKind.TEXT, piece)) for number, piece in enumerate(pieces, start=1)],
    )
    connection.execute(
        *run_statements.insert_run(
            {
                "id": receipt.run_id,
                "context_id": context.id,
                "message_id": receipt.reply_message_id,
                "status": RunStatus.QUEUED,
                "attempt": 0,
                "created_at": now_ms,
            }
        )
    )


def request_cancel(
    connection: Connection, *, owner: str, epoch: str, now_ms: int, context_id: str, if_match: int | None
) -> tuple[Context, Transition | None]:
    """The context, told to stop: ``cancelling`` where a run is on, ``idle`` where one only waited.

    With nothing to cancel the context is given back as it is, and the transition is None.

    Raises:
        ContextNotFound, VersionMismatch.
    """
    row = _lock_row(connection, owner, context_id, if_match)
    state = State(row.state)
    try:
        target = advance(state, Event.CANCEL_REQUESTED)
    except TransitionRefused:
        return to_context(row, epoch), None
    version = row.version + 1
    values: dict[str, Any] = {"state": target, "version": version, "updated_at": now_ms}
    ended = None
    if target is State.IDLE:
        values["active_run_id"] = None
        ended = _end_run_here(connection, row, version, now_ms)
    move_context(connection, context_id, row.version, values)
    transition = Transition(
        context_id=context_id,
        run_id=row.active_run_id,
        previous_state=state,
        previous_version=row.version,
        state=target,
        version=version,
        ended=ended,
    )
    return fetch_context(connection, owner, context_id, epoch), transition


def _end_run_here(connection: Connection, context: Row[Any], version: int, now_ms: int) -> EndedMessage:
    """Ends a run that nobody is running, or that is to be fenced, and its reply."""
    ended = end_message(connection, context.run_message_id, MessageStatus.CANCELLED, version, now_ms)
    values = {"status": RunStatus.CANCELLED, "ended_at": now_ms, "lease_expires_at": None}
    connection.execute(*run_statements.update_run(context.active_run_id, values))
    return ended

"""Contexts: created, changed, deleted; each function runs inside one write transaction of ``Store``."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Row

from context_server.errors import CommandNotAllowed, ContextNotFound, MessageNotFound, VersionMismatch
from context_server.machine import ALLOWED_COMMANDS, BUSY
from context_server.records import (
    ApprovalStatus,
    Context,
    EndedMessage,
    Failure,
    MessageStatus,
    Mode,
    RunStatus,
    State,
    new_id,
)
from context_server.store import approvals, branch_statements, keeping_statements, run_statements, statements
from context_server.store.dialects import dialect_of
from context_server.store.endings import end_message
from context_server.store.moves import move_context
from context_server.store.rows import to_context

_CHUNKS_AT_ONCE = 1000
"""So many rows a deletion takes with it in one transaction; they take about 30 ms."""


def fetch_context(connection: Connection, owner: str, context_id: str, epoch: str) -> Context:
    """The context.

    Raises:
        ContextNotFound: there is none, or it belongs to another owner.
    """
    return to_context(_fetch_row(connection, owner, context_id), epoch)


def lock_row(connection: Connection, owner: str, context_id: str, if_match: int | None) -> Row[Any]:
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
    context_id: str | None = None,
) -> Context:
    """A new context, idle, at version 1, with an id of its own unless it is given one."""
    context_id = context_id or new_id()
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
        MessageNotFound: ``head_message_id`` is no message of the context.
        CommandNotAllowed: the head cannot be moved while the context is busy.
    """
    row = lock_row(connection, owner, context_id, if_match)
    if "head_message_id" in changes:
        _check_head(connection, row, changes["head_message_id"])
    if changes:
        values = {**changes, "version": row.version + 1, "updated_at": now_ms}
        move_context(connection, context_id, row.version, values)
    return fetch_context(connection, owner, context_id, epoch)


def _check_head(connection: Connection, context: Row[Any], message_id: str | None) -> None:
    """Passes where the head may be moved to a message, or before all of them (None)."""
    state = State(context.state)
    if state in BUSY:
        raise CommandNotAllowed("move the head", state, ALLOWED_COMMANDS[state])
    if message_id is not None:
        fetch_message(connection, context, message_id)


def fetch_message(connection: Connection, context: Row[Any], message_id: str) -> Row[Any]:
    """The row of a message of a context.

    Raises:
        MessageNotFound.
    """
    found = connection.execute(*statements.select_message(context.owner, context.id, message_id)).one_or_none()
    if found is None:
        raise MessageNotFound(message_id)
    return found


def delete_context(
    connection: Connection, *, owner: str, epoch: str, now_ms: int, context_id: str, if_match: int | None
) -> Context:
    """The context as it was, gone with its messages; a run of it hits no row any more and is fenced.

    A long one is taken from its owner, and the keeper deletes its rows in small steps: a cascade over very many would
    hold up the replies of others. So is one of whose text a fork has a share: those messages stay as long as the fork.

    Raises:
        ContextNotFound, VersionMismatch.
    """
    row = lock_row(connection, owner, context_id, if_match)
    is_short = connection.execute(*statements.count_chunks(context_id)).scalar_one() <= _CHUNKS_AT_ONCE
    if is_short and connection.execute(*branch_statements.select_shared(context_id)).first() is None:
        connection.execute(*statements.delete_context(context_id))
        return to_context(row, epoch)
    if row.active_run_id is not None:
        connection.execute(*statements.lock_message(row.run_message_id))  # Its writer may be about to append.
        end_unheld_run(connection, row, MessageStatus.CANCELLED, row.version + 1, now_ms)
        values = {"state": State.IDLE, "version": row.version + 1, "active_run_id": None, "updated_at": now_ms}
        move_context(connection, context_id, row.version, values)
    connection.execute(*keeping_statements.disown([context_id]))
    return to_context(row, epoch)


def end_unheld_run(
    connection: Connection,
    context: Row[Any],
    status: MessageStatus,
    version: int,
    now_ms: int,
    failure: Failure | None = None,
    *,
    open_calls: str = "cancelled",
) -> EndedMessage:
    """Ends a run that nobody is running, or that is to be fenced, with its reply and what it asks approval for."""
    run_id = context.active_run_id
    approvals.close(connection, run_id, ApprovalStatus(open_calls), now_ms)
    ended = end_message(connection, context.run_message_id, status, version, now_ms, failure, open_calls=open_calls)
    values = {"status": RunStatus.CANCELLED, "ended_at": now_ms, "lease_expires_at": None, "tool": None}
    connection.execute(*run_statements.update_run(run_id, values))
    return ended

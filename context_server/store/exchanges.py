"""The rows of what is said: a user's message, the reply that will answer it, and the run that will write that."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection

from context_server.records import (
    Chunk,
    ChunkKind,
    FileRef,
    IfBusy,
    MessageStatus,
    Role,
    RunStatus,
    WorkflowCall,
)
from context_server.storable import split_text
from context_server.store import run_statements, statements
from context_server.store.dialects import dialect_of
from context_server.store.rows import from_payload

HEAD = "head"
"""The parent of a message that goes on from wherever the context is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Post:
    """A user's message as it came in. ``parent_id`` is a message's id, None for the start of the history, or HEAD."""

    text: str
    display: Any = None
    client_metadata: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[FileRef, ...] = ()
    workflow: WorkflowCall | None = None
    parent_id: str | None = HEAD
    if_busy: IfBusy = IfBusy.REJECT


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a message goes: the number in its context, the message before it, the context's version and mode then."""

    context_id: str
    position: int
    parent_id: str | None
    version: int
    mode: str


def insert_user_message(
    connection: Connection, message_id: str, place: Place, post: Post, now_ms: int, steers_run_id: str | None = None
) -> None:
    """A user's message, complete, with its text as chunks."""
    pieces = split_text(post.text)
    encoded = post.text.encode()
    row = {
        "id": message_id,
        "context_id": place.context_id,
        "position": place.position,
        "parent_id": place.parent_id,
        "role": Role.USER,
        "status": MessageStatus.COMPLETED,
        "sequence": len(pieces),
        "content_bytes": len(encoded),
        "final_sequence": len(pieces),
        "ended_version": place.version,
        "attempt": 0,
        "display": post.display,
        "client_metadata": dict(post.client_metadata),
        "payload": from_payload(post.files, post.workflow),
        "digest": hashlib.sha256(encoded).hexdigest(),
        "mode": place.mode,
        "steers_run_id": steers_run_id,
        "created_at": now_ms,
        "completed_at": now_ms,
    }
    connection.execute(*statements.insert_messages([row]))
    dialect_of(connection).insert_chunks(
        connection,
        [(message_id, Chunk(number, ChunkKind.TEXT, piece)) for number, piece in enumerate(pieces, start=1)],
    )


def insert_reply(connection: Connection, message_id: str, place: Place, run_id: str, now_ms: int) -> None:
    """A reply that holds nothing yet."""
    row = {
        "id": message_id,
        "context_id": place.context_id,
        "position": place.position,
        "parent_id": place.parent_id,
        "role": Role.ASSISTANT,
        "status": MessageStatus.PENDING,
        "sequence": 0,
        "content_bytes": 0,
        "attempt": 0,
        "run_id": run_id,
        "client_metadata": {},
        "mode": place.mode,
        "created_at": now_ms,
    }
    connection.execute(*statements.insert_messages([row]))


def insert_run(connection: Connection, run_id: str, context_id: str, reply_message_id: str, now_ms: int) -> None:
    """A run that waits for a runner."""
    connection.execute(
        *run_statements.insert_run(
            {
                "id": run_id,
                "context_id": context_id,
                "message_id": reply_message_id,
                "status": RunStatus.QUEUED,
                "attempt": 0,
                "created_at": now_ms,
            }
        )
    )

"""Rows to records and back: the only place that knows how a record lies in a table."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Row

from context_server.records import (
    ActiveRun,
    Chunk,
    ChunkKind,
    ContentDelta,
    Context,
    Failure,
    Message,
    MessageCompleted,
    MessageStatus,
    Mode,
    Role,
    RunStatus,
    Snapshot,
    State,
)


def from_ms(milliseconds: int) -> datetime:
    """The aware UTC time."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def to_context(row: Row[Any], epoch: str) -> Context:
    """A row of ``statements.select_context``."""
    active_run = None
    if row.active_run_id is not None:
        active_run = ActiveRun(
            id=row.active_run_id,
            message_id=row.run_message_id,
            status=RunStatus(row.run_status),
            attempt=row.run_attempt,
        )
    return Context(
        id=row.id,
        owner=row.owner,
        epoch=epoch,
        title=row.title,
        mode=Mode(row.mode),
        state=State(row.state),
        version=row.version,
        head_message_id=row.head_message_id,
        active_run=active_run,
        metadata=row.metadata,
        created_at=from_ms(row.created_at),
        updated_at=from_ms(row.updated_at),
    )


def to_failure(error: Mapping[str, Any] | None) -> Failure | None:
    """The ``error`` column of a message."""
    return None if error is None else Failure(code=error["code"], detail=error.get("detail"))


def from_failure(failure: Failure | None) -> dict[str, Any] | None:
    """The ``error`` column for a failure."""
    return None if failure is None else {"code": failure.code, "detail": failure.detail}


def to_message(row: Row[Any]) -> Message:
    """A row of ``messages``, without its content."""
    return Message(
        id=row.id,
        context_id=row.context_id,
        parent_id=row.parent_id,
        role=Role(row.role),
        status=MessageStatus(row.status),
        sequence=row.sequence,
        final_sequence=row.final_sequence,
        display=row.display,
        client_metadata=row.client_metadata,
        run_id=row.run_id,
        error=to_failure(row.error),
        usage=row.usage,
        digest=row.digest,
        created_at=from_ms(row.created_at),
        completed_at=None if row.completed_at is None else from_ms(row.completed_at),
    )


def to_chunk(row: Row[Any]) -> Chunk:
    """A row of ``statements.select_chunks``."""
    return Chunk(row.sequence, ChunkKind(row.kind), row.text, row.data)


def to_completed(row: Row[Any], at: datetime) -> MessageCompleted:
    """The signal of a message that has ended."""
    return MessageCompleted(
        context_id=row.context_id,
        message_id=row.id,
        final_sequence=row.final_sequence,
        status=MessageStatus(row.status),
        version=row.ended_version,
        timestamp=at,
    )


def to_snapshot(context: Row[Any], newest: Row[Any] | None, ended: list[Row[Any]], at: datetime) -> Snapshot:
    """What a subscriber of a context is told on connect."""
    head: MessageCompleted | ContentDelta | None = None
    sequence = 0
    if newest is not None:
        sequence = newest.sequence
        if newest.final_sequence is not None:
            head = to_completed(newest, at)
        elif sequence:
            head = ContentDelta(context_id=context.id, message_id=newest.id, current_sequence=sequence, timestamp=at)
    return Snapshot(
        context_id=context.id,
        state=State(context.state),
        version=context.version,
        run_id=context.active_run_id,
        newest=head,
        newest_sequence=sequence,
        ended=tuple(to_completed(row, at) for row in ended),
        at=at,
    )

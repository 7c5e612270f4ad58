"""Rows to records and back: the only place that knows how a record lies in a table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Row

from context_server.records import (
    ActiveRun,
    Approval,
    ApprovalStatus,
    Chunk,
    ChunkKind,
    ContentDelta,
    Context,
    Failure,
    FileRef,
    Message,
    MessageCompleted,
    MessageStatus,
    Mode,
    Role,
    RunStatus,
    Snapshot,
    State,
    Usage,
    WorkflowCall,
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
            tool=_running_tool(row),
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
        model=row.model,
    )


def _running_tool(context: Row[Any]) -> str | None:
    """The tool that runs; the run's row keeps the name of the last one."""
    tool: str | None = context.run_tool
    return tool if context.state == State.CALLING_TOOL else None


def to_failure(error: Mapping[str, Any] | None) -> Failure | None:
    """The ``error`` column of a message."""
    return None if error is None else Failure(code=error["code"], detail=error.get("detail"))


def from_failure(failure: Failure | None) -> dict[str, Any] | None:
    """The ``error`` column for a failure."""
    return None if failure is None else {"code": failure.code, "detail": failure.detail}


def from_usage(usage: Usage) -> dict[str, Any]:
    """The ``usage`` column of a message."""
    return asdict(usage)


def to_usage(usage: Mapping[str, Any] | None) -> Usage | None:
    """What the ``usage`` column of a message says."""
    return None if usage is None else Usage(**usage)


def to_files(payload: Mapping[str, Any] | None) -> tuple[FileRef, ...]:
    """The files in the ``payload`` column of a message."""
    return tuple(FileRef(**found) for found in (payload or {}).get("files", ()))


def to_workflow(payload: Mapping[str, Any] | None) -> WorkflowCall | None:
    """The workflow in the ``payload`` column of a message."""
    found = (payload or {}).get("workflow")
    return None if found is None else WorkflowCall(**found)


def from_payload(files: Sequence[FileRef], workflow: WorkflowCall | None) -> dict[str, Any] | None:
    """The ``payload`` column for what a user's message holds besides its text."""
    payload: dict[str, Any] = {}
    if files:
        payload["files"] = [asdict(each) for each in files]
    if workflow is not None:
        payload["workflow"] = asdict(workflow)
    return payload or None


def to_approval(row: Row[Any]) -> Approval:
    """A row of ``approvals``."""
    return Approval(
        id=row.id,
        context_id=row.context_id,
        message_id=row.message_id,
        run_id=row.run_id,
        call_id=row.call_id,
        tool=row.tool,
        arguments=row.arguments,
        arguments_sha256=row.arguments_sha256,
        editable=row.editable,
        status=ApprovalStatus(row.status),
        edited_arguments=row.edited_arguments,
        note=row.note,
        created_at=from_ms(row.created_at),
        expires_at=from_ms(row.expires_at),
        decided_at=None if row.decided_at is None else from_ms(row.decided_at),
    )


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
        mode=None if row.mode is None else Mode(row.mode),
        files=to_files(row.payload),
        workflow=to_workflow(row.payload),
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
        tool=_running_tool(context),
    )

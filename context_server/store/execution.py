"""What runs do to the database: claim, append, end, and the repair of what a crash left.

Each function runs inside one write transaction of ``Store``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Row

from context_server.machine import WORKING, Event, advance, phase_event
from context_server.records import (
    Append,
    EndedMessage,
    Ending,
    Failure,
    MessageStatus,
    Mode,
    Outcome,
    Run,
    RunStatus,
    State,
    Transition,
)
from context_server.store import approvals, run_statements, statements
from context_server.store.dialects import dialect_of
from context_server.store.endings import end_message
from context_server.store.moves import move_context
from context_server.store.rows import from_failure, from_usage
from context_server.store.waiting import promote

INTERRUPTED = Failure(code="interrupted", detail="The server stopped while this reply was being written.")


_QUEUE_LIMIT = 10_000


class BatchRefused(Exception):
    """Some run of the batch has been fenced; nothing was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """For whom and for how long runs are leased."""

    node_id: str
    lease_ms: int


def claim_runs(connection: Connection, *, now_ms: int, limit: int, lease: Lease | None) -> list[tuple[Run, Transition]]:
    """Up to ``limit`` queued runs, oldest first, now running in this process with their attempt raised."""
    claimed = [_claim(connection, row, now_ms) for row in connection.execute(*run_statements.claim_runs(limit)).all()]
    if claimed and lease is not None:
        connection.execute(*run_statements.take_leases([run.id for run, _ in claimed], lease.node_id, lease.lease_ms))
    return claimed


def renew_leases(connection: Connection, *, run_ids: Sequence[str], lease: Lease) -> frozenset[str]:
    """Renews the leases of a node's runs; the ids of those that it has lost."""
    held = connection.scalars(*run_statements.renew_leases(run_ids, lease.node_id, lease.lease_ms)).all()
    return frozenset(run_ids) - frozenset(held)


def _claim(connection: Connection, row: Row[Any], now_ms: int) -> tuple[Run, Transition]:
    state = State(row.state)
    thinking = advance(state, Event.RUN_CLAIMED)
    run = _to_run(row, row.attempt + 1)
    connection.execute(
        *run_statements.update_run(
            run.id,
            {
                "status": RunStatus.RUNNING,
                "attempt": run.attempt,
                "started_at": now_ms,
                "start_sequence": run.sequence,
            },
        )
    )
    values = {"attempt": run.attempt, "mode": run.mode}
    connection.execute(*statements.update_message(run.message_id, values))
    transition = Transition(
        context_id=run.context_id,
        run_id=run.id,
        previous_state=state,
        previous_version=row.version,
        state=thinking,
        version=row.version + 1,
    )
    values = {"state": thinking, "version": transition.version, "updated_at": now_ms}
    move_context(connection, run.context_id, row.version, values)
    return run, transition


def _to_run(row: Row[Any], attempt: int) -> Run:
    return Run(
        id=row.id,
        context_id=row.context_id,
        message_id=row.message_id,
        owner=row.owner,
        attempt=attempt,
        mode=Mode(row.mode),
        metadata=row.context_metadata,
        sequence=row.sequence,
        content_bytes=row.content_bytes,
        model=row.model,
    )


def append(connection: Connection, *, now_ms: int, batch: Sequence[Append]) -> list[Transition | None]:
    """Adds a batch of many runs to the log; for each, the transition that it caused.

    Raises:
        BatchRefused: a message is not where its run believes; the caller finds out which and leaves it out.
    """
    dialect = dialect_of(connection)
    moving = [append.run.context_id for append in batch if _moves(append)]
    states: Mapping[str, Row[Any]] = {}
    if moving:
        states = {row.id: row for row in connection.execute(*statements.lock_states(moving))}
    if not dialect.advance_messages(connection, batch):
        raise BatchRefused
    for append in batch:
        if append.usage is not None:
            values = {"usage": from_usage(append.usage)}
            connection.execute(*statements.update_message(append.run.message_id, values))
    dialect.insert_chunks(connection, ((append.run.message_id, chunk) for append in batch for chunk in append.chunks))
    return [
        _move(connection, append, states[append.run.context_id], now_ms) if _moves(append) else None for append in batch
    ]


def _moves(append: Append) -> bool:
    """Whether an append may move its context."""
    return bool(append.phases or append.ending or append.approvals)


class Standing(StrEnum):
    """What the log says of an append that was refused, or whose commit has an unknown outcome."""

    NOT_WRITTEN = "not_written"
    WRITTEN = "written"
    FENCED = "fenced"
    """The message is gone, has ended, belongs to another attempt, or its lease is over."""


def standings(connection: Connection, *, batch: Sequence[Append]) -> list[tuple[Standing, Transition | None]]:
    """Where each append of a batch stands; of a written one also how its context stands now."""
    message_ids = [append.run.message_id for append in batch]
    rows = {row.id: row for row in connection.execute(*run_statements.select_standings(message_ids))}
    return [_standing(append, rows.get(append.run.message_id)) for append in batch]


def _standing(append: Append, row: Row[Any] | None) -> tuple[Standing, Transition | None]:
    if row is None or row.attempt != append.run.attempt:
        return Standing.FENCED, None
    if row.final_sequence is None and row.is_held and row.sequence == append.expected_sequence:
        return Standing.NOT_WRITTEN, None
    digest = None if append.ending is None else append.ending.digest
    if (row.sequence, row.digest) == (append.sequence, digest):
        return Standing.WRITTEN, _standing_of_context(append, row)
    return Standing.FENCED, None


def _standing_of_context(append: Append, row: Row[Any]) -> Transition:
    """How the context stands now, as a transition of which nobody knows where it came from."""
    ended = None
    if append.ending is not None:
        status = MessageStatus(row.status)
        ended = EndedMessage(id=append.run.message_id, status=status, final_sequence=row.final_sequence)
    return Transition(
        context_id=append.run.context_id,
        run_id=append.run.id,
        previous_state=None,
        previous_version=None,
        state=State(row.state),
        version=row.version,
        ended=ended,
    )


def _move(connection: Connection, append: Append, context: Row[Any], now_ms: int) -> Transition | None:
    """Applies what an append says about its run to the context's state."""
    state, version, tool = _phase(append, State(context.state), context.version)
    values: dict[str, Any] = {}
    ended = None
    if append.ending:
        event, status, run_status = _verdict(state, append.ending)
        state, version = advance(state, event), version + 1
        _end_run(connection, append, append.ending, status, run_status, version, now_ms)
        values = {"active_run_id": None, "updated_at": now_ms}
        ended = EndedMessage(id=append.run.message_id, status=status, final_sequence=append.sequence)
    elif append.approvals and state in WORKING:  # Else it was told to stop, and its runner is about to hear of that.
        state, version = advance(state, Event.APPROVAL_REQUESTED), version + 1
        connection.execute(*run_statements.update_run(append.run.id, _SUSPENDED_RUN))
        approvals.request(connection, append.approvals)
        values = {"updated_at": now_ms}
    elif tool is not None:
        connection.execute(*run_statements.update_run(append.run.id, {"tool": tool}))
    if version == context.version:
        return _not_moved(append, context) if append.approvals else None
    move_context(connection, context.id, context.version, {"state": state, "version": version, **values})
    promoted = None
    if ended is not None:
        promoted = promote(connection, context_id=context.id, ended_run_id=append.run.id, now_ms=now_ms)
    return Transition(
        context_id=context.id,
        run_id=append.run.id,
        previous_state=State(context.state),
        previous_version=context.version,
        state=state,
        version=version,
        ended=ended,
        tool=tool if state is State.CALLING_TOOL else None,
        promoted=promoted,
    )


_SUSPENDED_RUN = {"status": RunStatus.SUSPENDED, "lease_expires_at": None, "tool": None}


def _phase(append: Append, state: State, version: int) -> tuple[State, int, str | None]:
    """The state and version after the phases of an append, and the tool whose call moved it last."""
    tool = None
    for phase in append.phases:
        # A cancelled context is not in WORKING: what its run still says is kept and moves nothing.
        if state in WORKING and (event := phase_event(state, phase.kind, phase.open_tools)):
            state, version = advance(state, event), version + 1
            tool = phase.tool if event is Event.TOOL_STARTED else tool
    return state, version, tool


def _not_moved(append: Append, context: Row[Any]) -> Transition:
    """Says that a run which was to be suspended was told to stop before: the context as it stands."""
    return Transition(
        context_id=context.id,
        run_id=append.run.id,
        previous_state=State(context.state),
        previous_version=context.version,
        state=State(context.state),
        version=context.version,
    )


def _verdict(state: State, ending: Ending) -> tuple[Event, MessageStatus, RunStatus]:
    """How a run ends: one that was told to stop is cancelled, whatever it said last."""
    if state is State.CANCELLING:
        return Event.RUN_STOPPED, MessageStatus.CANCELLED, RunStatus.CANCELLED
    if ending.outcome is Outcome.SUCCEEDED:
        return Event.RUN_SUCCEEDED, MessageStatus.COMPLETED, RunStatus.SUCCEEDED
    return Event.RUN_FAILED, MessageStatus.FAILED, RunStatus.FAILED


def _end_run(
    connection: Connection,
    append: Append,
    ending: Ending,
    status: MessageStatus,
    run_status: RunStatus,
    version: int,
    now_ms: int,
) -> None:
    connection.execute(*run_statements.update_run(append.run.id, _ended_run(run_status, now_ms)))
    connection.execute(
        *statements.update_message(
            append.run.message_id,
            {
                "status": status,
                "final_sequence": append.sequence,
                "digest": ending.digest,
                "ended_version": version,
                "completed_at": now_ms,
                "error": from_failure(ending.failure) if status is MessageStatus.FAILED else None,
            },
        )
    )


def _ended_run(status: RunStatus, now_ms: int) -> dict[str, Any]:
    return {"status": status, "ended_at": now_ms, "lease_expires_at": None, "tool": None}


def expired_runs(connection: Connection, *, limit: int) -> list[Run]:
    """Runs marked as running that nobody holds, oldest first; where there are no leases, all that are so marked."""
    rows = connection.execute(*run_statements.select_expired_runs(limit)).all()
    return [
        Run(id=row.id, context_id=row.context_id, message_id=row.message_id, owner=row.owner, attempt=row.attempt)
        for row in rows
    ]


def running_states(connection: Connection, *, run_ids: Sequence[str], lease: Lease | None) -> dict[str, State]:
    """The context's state of those of these runs that are marked as running on this node, by the run's id."""
    ours = run_statements.select_running_states(run_ids, None if lease is None else lease.node_id)
    return {row.id: State(row.state) for row in connection.execute(*ours)}


def claimed_runs(connection: Connection, *, lease: Lease | None) -> list[tuple[Run, Transition]]:
    """Runs that are leased to this node and have written nothing, each with how its context stands now."""
    if lease is None:
        return []
    found = []
    for row in connection.execute(*run_statements.select_claimed_runs(lease.node_id)):
        run = _to_run(row, row.attempt)
        transition = Transition(
            context_id=run.context_id,
            run_id=run.id,
            previous_state=None,
            previous_version=None,
            state=State(row.state),
            version=row.version,
        )
        found.append((run, transition))
    return found


def unclaimed_runs(connection: Connection) -> list[Run]:
    """The runs that wait for a runner or for a person, oldest first, as far as one would look."""
    rows = connection.execute(*run_statements.select_unclaimed_runs(_QUEUE_LIMIT))
    return [_to_run(row, row.attempt) for row in rows]


def expire_run(connection: Connection, *, run: Run, now_ms: int) -> Transition | None:
    """Ends a run whose process is gone: ``failed`` (``interrupted``), or ``idle`` where it was being cancelled.

    Everything that it appended is kept. None where somebody holds it again, has ended it, or is about to.
    """
    context = connection.execute(*run_statements.lock_expired_run(run.id, run.attempt)).one_or_none()
    if context is None:
        return None
    state = State(context.state)
    target = advance(state, Event.LEASE_EXPIRED)
    version = context.version + 1
    cancelled = state is State.CANCELLING
    status = MessageStatus.CANCELLED if cancelled else MessageStatus.FAILED
    run_status = RunStatus.CANCELLED if cancelled else RunStatus.FAILED
    connection.execute(*run_statements.update_run(run.id, _ended_run(run_status, now_ms)))
    failure = None if cancelled else INTERRUPTED
    open_calls = "cancelled" if cancelled else "interrupted"
    ended = end_message(connection, run.message_id, status, version, now_ms, failure, open_calls=open_calls)
    values = {"state": target, "version": version, "active_run_id": None, "updated_at": now_ms}
    move_context(connection, run.context_id, context.version, values)
    promoted = promote(connection, context_id=run.context_id, ended_run_id=run.id, now_ms=now_ms)
    return Transition(
        context_id=run.context_id,
        run_id=run.id,
        previous_state=state,
        previous_version=context.version,
        state=target,
        version=version,
        ended=ended,
        promoted=promoted,
    )

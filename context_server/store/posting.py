"""What starts and stops runs: posts, regenerations, cancels, decisions on approvals.

Each function runs inside one write transaction of ``Store``.
"""

from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Row

from context_server.errors import CommandNotAllowed
from context_server.machine import ALLOWED_COMMANDS, Event, TransitionRefused, advance
from context_server.records import (
    Command,
    Context,
    IfBusy,
    MessageStatus,
    Receipt,
    Role,
    State,
    Transition,
    new_id,
)
from context_server.store import approvals, waiting
from context_server.store.approvals import Decided, Decision
from context_server.store.conversations import end_unheld_run, fetch_context, fetch_message, lock_row
from context_server.store.exchanges import HEAD, Place, Post, insert_reply, insert_run, insert_user_message
from context_server.store.moves import move_context
from context_server.store.rows import to_context


def post_message(
    connection: Connection,
    *,
    owner: str,
    now_ms: int,
    context_id: str,
    post: Post,
    if_match: int | None,
    max_waiting: int,
) -> tuple[Receipt, Transition | None]:
    """The user's message, the empty reply and its run; the context is ``queued``, or as busy as before.

    The transition is None where the message waits, or was handed to the run that is on.

    Raises:
        ContextNotFound, VersionMismatch, MessageNotFound (the parent), QueueFull.
        MessageOpen: the parent waits for its turn itself, and may never have one.
        CommandNotAllowed: the context is busy, and nothing was said for that case.
    """
    row = lock_row(connection, owner, context_id, if_match)
    if post.parent_id not in (None, HEAD):
        fetch_message(connection, row, str(post.parent_id))
        waiting.refuse_as_parent(connection, row, str(post.parent_id))
    state = State(row.state)
    if Command.SEND in ALLOWED_COMMANDS[state]:
        receipt = _new_receipt(row, new_id())
        parent_id = row.head_message_id if post.parent_id == HEAD else post.parent_id
        place = Place(
            context_id=context_id,
            position=row.message_count + 1,
            parent_id=parent_id,
            version=receipt.version,
            mode=row.mode,
        )
        insert_user_message(connection, receipt.message_id, place, post, now_ms)
        return receipt, _queue_reply(connection, row, receipt, 2, now_ms)
    if post.if_busy is IfBusy.REJECT:
        raise CommandNotAllowed(Command.SEND, state, ALLOWED_COMMANDS[state])
    if post.if_busy is IfBusy.STEER and state is not State.CANCELLING and post.workflow is None:
        return waiting.steer(connection, row, post, now_ms, max_waiting=max_waiting), None
    disposition = IfBusy.QUEUE if post.if_busy is IfBusy.STEER else post.if_busy
    receipt = waiting.enqueue(connection, row, post, disposition, now_ms, max_waiting=max_waiting)
    if disposition is IfBusy.QUEUE:
        return receipt, None
    enqueued = lock_row(connection, owner, context_id, None)
    stopped = _stop(connection, enqueued, now_ms, keep_waiting=True)
    if stopped is None:
        return receipt, None
    last = stopped.promoted or stopped
    # To whoever follows the context it was one move: nobody is told of the version in between.
    moved = replace(stopped, previous_version=row.version)
    return replace(receipt, state=last.state, version=last.version), moved


def _new_receipt(context: Row[Any], message_id: str) -> Receipt:
    return Receipt(
        context_id=context.id,
        message_id=message_id,
        reply_message_id=new_id(),
        run_id=new_id(),
        state=advance(State(context.state), Event.MESSAGE_POSTED),
        version=context.version + 1,
    )


def _queue_reply(
    connection: Connection, context: Row[Any], receipt: Receipt, new_messages: int, now_ms: int
) -> Transition:
    """The reply of a receipt as the new head, and its queued run."""
    count = context.message_count + new_messages
    place = Place(
        context_id=context.id,
        position=count,
        parent_id=receipt.message_id,
        version=receipt.version,
        mode=context.mode,
    )
    insert_reply(connection, receipt.reply_message_id, place, receipt.run_id, now_ms)
    insert_run(connection, receipt.run_id, context.id, receipt.reply_message_id, now_ms)
    move_context(
        connection,
        context.id,
        context.version,
        {
            "state": receipt.state,
            "version": receipt.version,
            "message_count": count,
            "head_message_id": receipt.reply_message_id,
            "active_run_id": receipt.run_id,
            "updated_at": now_ms,
        },
    )
    return Transition(
        context_id=context.id,
        run_id=receipt.run_id,
        previous_state=State(context.state),
        previous_version=context.version,
        state=receipt.state,
        version=receipt.version,
    )


def regenerate(
    connection: Connection, *, owner: str, now_ms: int, context_id: str, message_id: str, if_match: int | None
) -> tuple[Receipt, Transition]:
    """Another reply beside one that is there, or one to a user's message; it is the head, and its run is queued.

    Raises:
        ContextNotFound, VersionMismatch, MessageNotFound.
        CommandNotAllowed: the context is busy.
    """
    row = lock_row(connection, owner, context_id, if_match)
    found = fetch_message(connection, row, message_id)
    state = State(row.state)
    if Command.SEND not in ALLOWED_COMMANDS[state]:
        raise CommandNotAllowed("regenerate", state, ALLOWED_COMMANDS[state])
    while found.steers_run_id is not None:  # It has no reply of its own: that of the run it steered stands before it.
        found = fetch_message(connection, row, found.parent_id)
    asked = found.id if found.role == Role.USER else found.parent_id
    receipt = _new_receipt(row, asked)
    return receipt, _queue_reply(connection, row, receipt, 1, now_ms)


def request_cancel(
    connection: Connection, *, owner: str, epoch: str, now_ms: int, context_id: str, if_match: int | None
) -> tuple[Context, Transition | None]:
    """The context, told to stop: ``cancelling`` where a run is on, ``idle`` where one only waited.

    What waits behind that run is cancelled with it. With nothing to cancel the context is given back as it is, and the
    transition is None.

    Raises:
        ContextNotFound, VersionMismatch.
    """
    row = lock_row(connection, owner, context_id, if_match)
    transition = _stop(connection, row, now_ms, keep_waiting=False)
    context = to_context(row, epoch) if transition is None else fetch_context(connection, owner, context_id, epoch)
    return context, transition


def _stop(connection: Connection, context: Row[Any], now_ms: int, *, keep_waiting: bool) -> Transition | None:
    """Tells a run to stop, or ends one that nobody runs; what that moved."""
    state = target = State(context.state)
    version = context.version + 1
    also_ended = () if keep_waiting else waiting.drop(connection, context, version, now_ms)
    try:
        target = advance(state, Event.CANCEL_REQUESTED)
    except TransitionRefused:
        if not also_ended:
            return None
    values: dict[str, Any] = {"state": target, "version": version, "updated_at": now_ms}
    ended = None
    if target is State.IDLE:
        values["active_run_id"] = None
        ended = end_unheld_run(connection, context, MessageStatus.CANCELLED, version, now_ms)
    move_context(connection, context.id, context.version, values)
    promoted = None
    if ended is not None:
        promoted = waiting.promote(connection, context_id=context.id, ended_run_id=context.active_run_id, now_ms=now_ms)
    return Transition(
        context_id=context.id,
        run_id=context.active_run_id,
        previous_state=state,
        previous_version=context.version,
        state=target,
        version=version,
        ended=ended,
        also_ended=also_ended,
        promoted=promoted,
    )


def expire_approvals(connection: Connection, *, owner: str, context_id: str, now_ms: int) -> Transition | None:
    """Ends a run whose approval nobody has decided on in time; None where somebody has, or the context is gone."""
    row = lock_row(connection, owner, context_id, None)
    overdue = approvals.approvals(connection, context_id, only_pending=True)
    state = State(row.state)
    if state is not State.AWAITING_APPROVAL or not any(
        each.expires_at.timestamp() * 1000 <= now_ms for each in overdue
    ):
        return None
    version = row.version + 1
    target = advance(state, Event.CANCEL_REQUESTED)
    ended = end_unheld_run(
        connection, row, MessageStatus.CANCELLED, version, now_ms, approvals.EXPIRED, open_calls="expired"
    )
    values = {"state": target, "version": version, "active_run_id": None, "updated_at": now_ms}
    move_context(connection, context_id, row.version, values)
    promoted = waiting.promote(connection, context_id=context_id, ended_run_id=row.active_run_id, now_ms=now_ms)
    return Transition(
        context_id=context_id,
        run_id=row.active_run_id,
        previous_state=state,
        previous_version=row.version,
        state=target,
        version=version,
        ended=ended,
        promoted=promoted,
    )


def decide(
    connection: Connection,
    *,
    owner: str,
    now_ms: int,
    context_id: str,
    approval_id: str,
    decision: Decision,
    if_match: int | None,
) -> Decided:
    """The approval as it stands after a decision; once nothing of the run is pending, it is queued again.

    Raises:
        ContextNotFound, VersionMismatch, ApprovalNotFound, ApprovalDecided, ArgumentsNotEditable.
    """
    row = lock_row(connection, owner, context_id, if_match)
    return approvals.decide(connection, row, approval_id, decision, now_ms)


def remove_waiting(
    connection: Connection, *, owner: str, now_ms: int, context_id: str, message_id: str, if_match: int | None
) -> tuple[int, str]:
    """Takes back a message that waits; the context's new version, and the reply that will never be written.

    Raises:
        ContextNotFound, VersionMismatch, WaitingNotFound.
    """
    row = lock_row(connection, owner, context_id, if_match)
    reply_message_id = waiting.remove(connection, row, message_id, now_ms)
    return int(row.version) + 1, reply_message_id

"""What is posted while a context is busy: it waits for its turn, or is handed to the run that is on.

What waits has its messages already, so that a client can follow the reply, and a place in the history once its turn
comes: in the transaction that ends the run before it. Each function runs inside one write transaction of ``Store``.
"""

from typing import Any

from sqlalchemy import Connection, Row

from context_server.errors import MessageOpen, QueueFull, WaitingNotFound
from context_server.machine import Event, advance
from context_server.records import (
    EndedMessage,
    IfBusy,
    MessageStatus,
    Receipt,
    State,
    Transition,
    new_id,
)
from context_server.store import waiting_statements as statements
from context_server.store.endings import end_message
from context_server.store.exchanges import (
    HEAD,
    Place,
    Post,
    insert_reply,
    insert_run,
    insert_user_message,
)
from context_server.store.moves import move_context

_PRIORITIES = {IfBusy.INTERRUPT: 0, IfBusy.QUEUE: 1}


def enqueue(
    connection: Connection, context: Row[Any], post: Post, if_busy: IfBusy, now_ms: int, *, max_waiting: int
) -> Receipt:
    """The message, its reply and its run, which waits behind the active one; the context is one version on.

    Raises:
        QueueFull: as many wait as may.
    """
    if connection.execute(*statements.count_waiting(context.id)).scalar_one() >= max_waiting:
        raise QueueFull(max_waiting)
    receipt = Receipt(
        context_id=context.id,
        message_id=new_id(),
        reply_message_id=new_id(),
        run_id=new_id(),
        state=State(context.state),
        version=context.version + 1,
        disposition=if_busy,
    )
    parent_id = context.head_message_id if post.parent_id == HEAD else post.parent_id
    count = context.message_count
    place = Place(
        context_id=context.id, position=count + 1, parent_id=parent_id, version=receipt.version, mode=context.mode
    )
    insert_user_message(connection, receipt.message_id, place, post, now_ms)
    _insert_reply_after(connection, receipt.reply_message_id, receipt.message_id, place, receipt.run_id, now_ms)
    connection.execute(
        *statements.insert_waiting(
            {
                "run_id": receipt.run_id,
                "context_id": context.id,
                "message_id": receipt.message_id,
                "reply_message_id": receipt.reply_message_id,
                "priority": _PRIORITIES[if_busy],
                "follows_head": post.parent_id == HEAD,
                "created_at": now_ms,
            }
        )
    )
    values = {"version": receipt.version, "message_count": count + 2, "updated_at": now_ms}
    move_context(connection, context.id, context.version, values)
    return receipt


def _insert_reply_after(
    connection: Connection, reply_id: str, message_id: str, place: Place, run_id: str, now_ms: int
) -> None:
    behind = Place(
        context_id=place.context_id,
        position=place.position + 1,
        parent_id=message_id,
        version=place.version,
        mode=place.mode,
    )
    insert_reply(connection, reply_id, behind, run_id, now_ms)


def steer(connection: Connection, context: Row[Any], post: Post, now_ms: int, *, max_waiting: int) -> Receipt:
    """The message, for the run that is on to take at its next step; the context is one version on.

    Raises:
        QueueFull: the run has as many to take as may wait.
    """
    if len(connection.execute(*statements.select_steering(context.active_run_id)).all()) >= max_waiting:
        raise QueueFull(max_waiting)
    receipt = Receipt(
        context_id=context.id,
        message_id=new_id(),
        reply_message_id=context.run_message_id,
        run_id=context.active_run_id,
        state=State(context.state),
        version=context.version + 1,
        disposition=IfBusy.STEER,
    )
    count = context.message_count
    place = Place(
        context_id=context.id,
        position=count + 1,
        parent_id=context.run_message_id,
        version=receipt.version,
        mode=context.mode,
    )
    insert_user_message(connection, receipt.message_id, place, post, now_ms, steers_run_id=context.active_run_id)
    values = {"version": receipt.version, "message_count": count + 1, "updated_at": now_ms}
    move_context(connection, context.id, context.version, values)
    return receipt


def take_steering(connection: Connection, context: Row[Any], run_id: str, now_ms: int) -> list[Row[Any]]:
    """The messages that were posted for a run; they are its own now, and the head follows them."""
    rows = list(connection.execute(*statements.select_steering(run_id)))
    if rows:
        head = _chain(connection, rows, context.head_message_id, {"steered_at": now_ms})
        values = {"version": context.version + 1, "head_message_id": head, "updated_at": now_ms}
        move_context(connection, context.id, context.version, values)
    return rows


def _chain(connection: Connection, rows: list[Row[Any]], head: str | None, values: dict[str, Any]) -> str | None:
    """Puts messages one behind the other after the head; the new head."""
    for row in rows:
        connection.execute(*statements.place_message(row.id, {"parent_id": head, **values}))
        head = row.id
    return head


def refuse_as_parent(connection: Connection, context: Row[Any], message_id: str) -> None:
    """Passes unless the message waits: it may be removed, or have its turn after what would follow it.

    Raises:
        MessageOpen.
    """
    rows = connection.execute(*statements.select_waiting(context.id)).all()
    if any(message_id in (row.message_id, row.reply_message_id) for row in rows):
        raise MessageOpen(message_id)


def remove(connection: Connection, context: Row[Any], message_id: str, now_ms: int) -> str:
    """Takes back a message that waits, with its reply; that one's id.

    Raises:
        WaitingNotFound: it does not wait; its turn may have come.
    """
    for row in connection.execute(*statements.select_waiting(context.id)).all():
        if message_id in (row.message_id, row.reply_message_id):
            connection.execute(*statements.delete_message(row.message_id))
            connection.execute(*statements.delete_message(row.reply_message_id))
            move_context(
                connection, context.id, context.version, {"version": context.version + 1, "updated_at": now_ms}
            )
            return str(row.reply_message_id)
    raise WaitingNotFound(message_id)


def drop(connection: Connection, context: Row[Any], version: int, now_ms: int) -> tuple[EndedMessage, ...]:
    """Ends the replies of whatever waits as cancelled; the messages stay, as a branch that was not answered."""
    ended = []
    for row in connection.execute(*statements.select_waiting(context.id)).all():
        connection.execute(*statements.delete_waiting(row.run_id))
        ended.append(
            end_message(
                connection, row.reply_message_id, MessageStatus.CANCELLED, version, now_ms, open_calls="cancelled"
            )
        )
    if context.active_run_id is not None:
        for row in connection.execute(*statements.select_steering(context.active_run_id)).all():
            connection.execute(*statements.place_message(row.id, {"steers_run_id": None}))
    return tuple(ended)


def promote(connection: Connection, *, context_id: str, ended_run_id: str, now_ms: int) -> Transition | None:
    """Gives what waits its turn, as the run before it has ended; what that moved, or None where nothing waits.

    What was posted to steer that run and came too late goes first: it is answered by a run of its own.
    """
    context = connection.execute(*statements.select_context(context_id)).one()
    steering = list(connection.execute(*statements.select_steering(ended_run_id)))
    if steering:
        return _answer_late(connection, context, steering, now_ms)
    row = connection.execute(*statements.select_first(context_id)).one_or_none()
    if row is None:
        return None
    connection.execute(*statements.delete_waiting(row.run_id))
    count = context.message_count
    place: dict[str, Any] = {"position": count + 1}
    if row.follows_head:
        place["parent_id"] = context.head_message_id
    connection.execute(*statements.place_message(row.message_id, place))
    connection.execute(*statements.place_message(row.reply_message_id, {"position": count + 2}))
    return _begin(connection, context, row.run_id, row.reply_message_id, count + 2, now_ms)


def _answer_late(connection: Connection, context: Row[Any], steering: list[Row[Any]], now_ms: int) -> Transition:
    head = _chain(connection, steering, context.head_message_id, {"steers_run_id": None})
    run_id, reply_id, count = new_id(), new_id(), context.message_count + 1
    place = Place(context_id=context.id, position=count, parent_id=head, version=context.version + 1, mode=context.mode)
    insert_reply(connection, reply_id, place, run_id, now_ms)
    return _begin(connection, context, run_id, reply_id, count, now_ms)


def _begin(
    connection: Connection, context: Row[Any], run_id: str, reply_id: str, message_count: int, now_ms: int
) -> Transition:
    """Queues a run whose reply is there, and makes that the head."""
    insert_run(connection, run_id, context.id, reply_id, now_ms)
    state = State(context.state)
    queued = advance(state, Event.MESSAGE_POSTED)
    values = {
        "state": queued,
        "version": context.version + 1,
        "message_count": message_count,
        "head_message_id": reply_id,
        "active_run_id": run_id,
        "updated_at": now_ms,
    }
    move_context(connection, context.id, context.version, values)
    return Transition(
        context_id=context.id,
        run_id=run_id,
        previous_state=state,
        previous_version=context.version,
        state=queued,
        version=context.version + 1,
    )

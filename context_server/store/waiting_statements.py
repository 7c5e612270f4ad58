"""The statements of what waits for its turn in a busy context, named as those of ``statements``."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import bindparam, delete, func, insert, select, update

from context_server.store.statements import Bound
from context_server.store.tables import contexts, messages, runs, waiting_runs

_OF_CONTEXT = waiting_runs.c.context_id == bindparam("key_context_id")
# Not by time: several come in one millisecond, and the clocks of nodes differ. Positions are given under a lock.
_IN_TURN = (waiting_runs.c.priority, messages.c.position)
_INSERT_WAITING = insert(waiting_runs)
_SELECT_WAITING = (
    select(waiting_runs)
    .join(messages, messages.c.id == waiting_runs.c.message_id)
    .where(_OF_CONTEXT)
    .order_by(*_IN_TURN)
)
_SELECT_FIRST = _SELECT_WAITING.limit(1)
_COUNT_WAITING = select(func.count()).select_from(waiting_runs).where(_OF_CONTEXT)
_DELETE_WAITING = delete(waiting_runs).where(waiting_runs.c.run_id == bindparam("key_run_id"))
_PLACE = update(messages).where(messages.c.id == bindparam("key_id"))
_DELETE_MESSAGE = delete(messages).where(messages.c.id == bindparam("key_id"))
_SELECT_CONTEXT = select(
    contexts.c.id,
    contexts.c.state,
    contexts.c.version,
    contexts.c.mode,
    contexts.c.message_count,
    contexts.c.head_message_id,
).where(contexts.c.id == bindparam("key_id"))
_SELECT_ALL_STEERING = (
    select(messages)
    .where(messages.c.steers_run_id == bindparam("key_run_id"), messages.c.content_id.is_(None))
    .order_by(messages.c.position)
)
_SELECT_STEERING = (
    select(messages)
    .where(messages.c.steers_run_id == bindparam("key_run_id"), messages.c.steered_at.is_(None))
    .order_by(messages.c.position)
)
_MODE_OF_RUN = (
    select(contexts.c.mode).join(runs, runs.c.context_id == contexts.c.id).where(runs.c.id == bindparam("key_run_id"))
)


def insert_waiting(values: Mapping[str, Any]) -> Bound:
    """A run that waits for its turn."""
    return _INSERT_WAITING, dict(values)


def select_waiting(context_id: str) -> Bound:
    """What waits in a context, in the order of its turns; index context, priority."""
    return _SELECT_WAITING, {"key_context_id": context_id}


def select_first(context_id: str) -> Bound:
    """What has its turn next; index context, priority."""
    return _SELECT_FIRST, {"key_context_id": context_id}


def count_waiting(context_id: str) -> Bound:
    """How many wait in a context; index context, priority."""
    return _COUNT_WAITING, {"key_context_id": context_id}


def delete_waiting(run_id: str) -> Bound:
    """One that waits no more, by primary key."""
    return _DELETE_WAITING, {"key_run_id": run_id}


def place_message(message_id: str, values: Mapping[str, Any]) -> Bound:
    """Gives a message its place, by primary key."""
    return _PLACE, {"key_id": message_id, **values}


def delete_message(message_id: str) -> Bound:
    """Deletes one message, by primary key."""
    return _DELETE_MESSAGE, {"key_id": message_id}


def select_context(context_id: str) -> Bound:
    """What a new exchange needs of its context, by primary key; the transaction has locked it."""
    return _SELECT_CONTEXT, {"key_id": context_id}


def select_steering(run_id: str) -> Bound:
    """Messages that were posted for a run, and that it has not taken, oldest first; partial index of such ones."""
    return _SELECT_STEERING, {"key_run_id": run_id}


def select_all_steering(run_id: str) -> Bound:
    """Messages that were posted for a run, taken or not, oldest first; partial index of such ones."""
    return _SELECT_ALL_STEERING, {"key_run_id": run_id}


def select_mode(run_id: str) -> Bound:
    """The mode of a run's context as it is now, by primary keys."""
    return _MODE_OF_RUN, {"key_run_id": run_id}

"""The statements of keeping house, named as those of ``statements``: segments, compaction, retention."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Column, Delete, Table, bindparam, delete, exists, insert, or_, select, text, tuple_, update

from context_server.store.branch_statements import IS_SHARED
from context_server.store.statements import Bound
from context_server.store.tables import (
    NOBODY,
    WITHOUT_RUN,
    WORTH_COMPACTING,
    chunks,
    contexts,
    messages,
    segments,
)

Place = tuple[int, str]
"""Where a pass over the ended messages is: ``(completed_at, id)`` of the last one that it has dealt with."""

# Written as in the index: SQLite takes a partial index only where it can see that no other row is asked for.
_WORTH_COMPACTING = text(WORTH_COMPACTING)
_WITHOUT_RUN = text(WITHOUT_RUN)

# Segments

_SELECT_SEGMENTS = (
    select(segments.c.first_sequence, segments.c.last_sequence, segments.c.body)
    .where(
        segments.c.message_id == bindparam("key_message_id"),
        segments.c.last_sequence > bindparam("after"),
        segments.c.first_sequence <= bindparam("until"),
    )
    .order_by(segments.c.last_sequence)
    .limit(bindparam("rows"))
)
_INSERT_SEGMENTS = insert(segments)


def select_segments(message_id: str, after: int, until: int, limit: int) -> Bound:
    """The segments that hold ``after < sequence <= until`` of a message: a range of the primary key, in order."""
    return _SELECT_SEGMENTS, {"key_message_id": message_id, "after": after, "until": until, "rows": limit}


def insert_segments(rows: Sequence[Mapping[str, Any]]) -> Bound:
    """New segments of messages that this transaction has locked."""
    return _INSERT_SEGMENTS, [dict(row) for row in rows]


# Compaction

_LOCK_COMPACTABLE = (
    select(messages.c.id, messages.c.completed_at, messages.c.compacted_sequence, messages.c.final_sequence)
    .join(contexts, contexts.c.id == messages.c.context_id)
    .where(
        _WORTH_COMPACTING,
        messages.c.completed_at <= bindparam("until"),
        tuple_(messages.c.completed_at, messages.c.id) > tuple_(bindparam("after_at"), bindparam("after_id")),
        contexts.c.owner != NOBODY,
    )
    .order_by(messages.c.completed_at, messages.c.id)
    .limit(bindparam("rows"))
    .with_for_update(of=messages, skip_locked=True, key_share=True)
)
_DELETE_CHUNKS = delete(chunks).where(
    chunks.c.message_id == bindparam("key_message_id"),
    chunks.c.sequence > bindparam("after"),
    chunks.c.sequence <= bindparam("until"),
)
_SET_COMPACTED = (
    update(messages)
    .where(messages.c.id == bindparam("key_id"), messages.c.compacted_sequence == bindparam("key_sequence"))
    .values(compacted_sequence=bindparam("new_sequence"))
)


def lock_compactable(until_ms: int, after: Place, limit: int) -> Bound:
    """Messages with enough to merge that ended by ``until_ms``, those that ended first first, from a place on; locked.

    Those that another node has locked are left out. Partial index of messages to be compacted.
    """
    return _LOCK_COMPACTABLE, {"until": until_ms, "after_at": after[0], "after_id": after[1], "rows": limit}


def delete_chunks(message_id: str, after: int, until: int) -> Bound:
    """Deletes ``after < sequence <= until`` of a message: a range of the primary key."""
    return _DELETE_CHUNKS, {"key_message_id": message_id, "after": after, "until": until}


def set_compacted(message_id: str, expected: int, sequence: int) -> Bound:
    """Moves the end of a message's segments on from where it is expected, by primary key."""
    return _SET_COMPACTED, {"key_id": message_id, "key_sequence": expected, "new_sequence": sequence}


# Retention

_LOCK_INACTIVE = (
    select(contexts.c.id, contexts.c.owner, contexts.c.version)
    .where(_WITHOUT_RUN, contexts.c.updated_at < bindparam("moment"), contexts.c.owner != NOBODY)
    .order_by(contexts.c.updated_at, contexts.c.id)
    .limit(bindparam("rows"))
    .with_for_update(skip_locked=True)
)
_DISOWN = (
    update(contexts)
    .where(contexts.c.id.in_(bindparam("key_ids", expanding=True)))
    .values(owner=NOBODY, version=contexts.c.version + 1)
)
_HAS_MESSAGES = exists(select(messages.c.id).where(messages.c.context_id == contexts.c.id))
_HAS_MESSAGES_OF_ITS_OWN = exists(select(messages.c.id).where(messages.c.context_id == contexts.c.id, ~IS_SHARED))
_SELECT_HAS_MESSAGES = select(messages.c.id).where(messages.c.context_id == bindparam("key_context_id")).limit(1)
_LOCK_NOBODYS = (
    select(contexts.c.id)
    .where(contexts.c.owner == NOBODY, or_(~_HAS_MESSAGES, _HAS_MESSAGES_OF_ITS_OWN))
    .order_by(contexts.c.updated_at, contexts.c.id)
    .limit(1)
    .with_for_update(skip_locked=True)
)
_LOCK_MESSAGES = (
    select(messages.c.id)
    .where(messages.c.context_id == bindparam("key_context_id"), ~IS_SHARED)
    .order_by(messages.c.position)
    .limit(bindparam("rows"))
    .with_for_update()
)


def _delete_first(table: Table, place: Column[int]) -> Delete:
    """Deletes the leading rows of a message, by the place of each in it."""
    ours = table.c.message_id == bindparam("key_message_id")
    first = select(place).where(ours).order_by(place).limit(bindparam("rows")).scalar_subquery()
    return delete(table).where(ours, place.in_(first))


_DELETE_FIRST_CHUNKS = _delete_first(chunks, chunks.c.sequence)
_DELETE_FIRST_SEGMENTS = _delete_first(segments, segments.c.last_sequence)
_DELETE_MESSAGES = delete(messages).where(messages.c.id.in_(bindparam("key_ids", expanding=True)))


def lock_inactive(moment_ms: int, limit: int) -> Bound:
    """Contexts without a run that nothing has happened in since a moment, the oldest first; locked.

    Those that another transaction has locked are left out. Partial index of contexts without a run.
    """
    return _LOCK_INACTIVE, {"moment": moment_ms, "rows": limit}


def disown(context_ids: Sequence[str]) -> Bound:
    """Takes contexts from their owners, one version on, by primary key: from now on no request finds them."""
    return _DISOWN, {"key_ids": list(context_ids)}


def lock_nobodys() -> Bound:
    """One context that was taken from its owner, and that no other node is clearing; index owner, updated_at.

    One of whose messages only those are left whose text forks share is passed over, until the forks are gone.
    """
    return _LOCK_NOBODYS, {}


def lock_messages(context_id: str, limit: int) -> Bound:
    """The first messages of a context whose text no fork shares, locked; unique index context, position."""
    return _LOCK_MESSAGES, {"key_context_id": context_id, "rows": limit}


def select_has_messages(context_id: str) -> Bound:
    """A message of a context, if it has any; unique index context, position."""
    return _SELECT_HAS_MESSAGES, {"key_context_id": context_id}


def delete_first_chunks(message_id: str, limit: int) -> Bound:
    """Deletes the leading chunks of a message; a range of the primary key."""
    return _DELETE_FIRST_CHUNKS, {"key_message_id": message_id, "rows": limit}


def delete_first_segments(message_id: str, limit: int) -> Bound:
    """Deletes the leading segments of a message; a range of the primary key."""
    return _DELETE_FIRST_SEGMENTS, {"key_message_id": message_id, "rows": limit}


def delete_messages(message_ids: Sequence[str]) -> Bound:
    """Deletes messages, by primary key; what they have left follows by foreign key."""
    return _DELETE_MESSAGES, {"key_ids": list(message_ids)}

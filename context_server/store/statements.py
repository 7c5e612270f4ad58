"""Every SQL statement, named: what it reads or writes, and the index that serves it.

Each function gives a statement and its parameters: ``connection.execute(*statements.select_context(owner, id))``. The
statements are built once, because building one costs as much as running it. The two of the append are in
``dialects/``: they differ most between databases. What a client's
request reaches is scoped by owner, by the statement itself or by one before it in the same transaction.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import BigInteger, Executable, Integer, bindparam, cast, delete, func, insert, select, tuple_, update

from context_server.records import Role, RunStatus
from context_server.store.clock import database_now_ms
from context_server.store.tables import chunks, contexts, idempotency_keys, messages, runs, server_facts

Bound = tuple[Executable, dict[str, Any] | list[dict[str, Any]]]
"""A statement and what it is run with."""

# Written out in the statement and not bound, and the same as in the index: SQLite takes a partial index only where it
# can see that the statement asks for nothing outside of it.
IS_ACTIVE = runs.c.status.in_(
    bindparam(
        "active", (RunStatus.QUEUED, RunStatus.RUNNING, RunStatus.SUSPENDED), expanding=True, literal_execute=True
    )
)

# Facts

_SELECT_FACT = select(server_facts.c.value).where(server_facts.c.name == bindparam("key_name"))
_INSERT_FACT = insert(server_facts)
_UPDATE_FACT = update(server_facts).where(server_facts.c.name == bindparam("key_name"))


def select_fact(name: str) -> Bound:
    """One fact of the database, by primary key."""
    return _SELECT_FACT, {"key_name": name}


def insert_fact(name: str, value: str) -> Bound:
    """A fact that the database does not have yet."""
    return _INSERT_FACT, {"name": name, "value": value}


def update_fact(name: str, value: str) -> Bound:
    """Another value of a fact."""
    return _UPDATE_FACT, {"key_name": name, "value": value}


# Contexts

_CONTEXTS_WITH_RUNS = select(
    contexts,
    runs.c.message_id.label("run_message_id"),
    runs.c.status.label("run_status"),
    runs.c.attempt.label("run_attempt"),
    runs.c.tool.label("run_tool"),
).outerjoin(runs, runs.c.id == contexts.c.active_run_id)
_NEWEST_FIRST = (contexts.c.updated_at.desc(), contexts.c.id.desc())

_INSERT_CONTEXT = insert(contexts)
_SELECT_CONTEXT = _CONTEXTS_WITH_RUNS.where(
    contexts.c.id == bindparam("key_id"), contexts.c.owner == bindparam("key_owner")
)
_SELECT_CONTEXTS = (
    _CONTEXTS_WITH_RUNS.where(contexts.c.owner == bindparam("key_owner"))
    .order_by(*_NEWEST_FIRST)
    .limit(bindparam("rows"))
)
_SELECT_CONTEXTS_BEFORE = _SELECT_CONTEXTS.where(
    tuple_(contexts.c.updated_at, contexts.c.id) < tuple_(bindparam("before_at"), bindparam("before_id"))
)
_SELECT_NEWEST_IDS = (
    select(contexts.c.id)
    .where(contexts.c.owner == bindparam("key_owner"))
    .order_by(*_NEWEST_FIRST)
    .limit(bindparam("rows"))
)
_SELECT_BUSY_IDS = (
    select(contexts.c.id)
    .join(runs, runs.c.context_id == contexts.c.id)
    .where(IS_ACTIVE, contexts.c.owner == bindparam("key_owner"))
    .limit(bindparam("rows"))
)
_LOCK_STATES = (
    select(contexts.c.id, contexts.c.state, contexts.c.version)
    .where(contexts.c.id.in_(bindparam("key_ids", expanding=True)))
    .order_by(contexts.c.id)
    .with_for_update()
)
_UPDATE_CONTEXT = update(contexts).where(
    contexts.c.id == bindparam("key_id"), contexts.c.version == bindparam("key_version")
)
_DELETE_CONTEXT = delete(contexts).where(contexts.c.id == bindparam("key_id"))


def insert_context(values: Mapping[str, Any]) -> Bound:
    """A new context."""
    return _INSERT_CONTEXT, dict(values)


def select_context(owner: str, context_id: str) -> Bound:
    """One context of an owner with its active run, by primary keys."""
    return _SELECT_CONTEXT, {"key_id": context_id, "key_owner": owner}


def select_contexts(owner: str, before: tuple[int, str] | None, limit: int) -> Bound:
    """An owner's contexts, most recently active first, after ``before = (updated_at, id)``; index owner, updated_at."""
    parameters = {"key_owner": owner, "rows": limit}
    if before is None:
        return _SELECT_CONTEXTS, parameters
    return _SELECT_CONTEXTS_BEFORE, {**parameters, "before_at": before[0], "before_id": before[1]}


def select_newest_ids(owner: str, limit: int) -> Bound:
    """Ids of an owner's most recently active contexts; index owner, updated_at."""
    return _SELECT_NEWEST_IDS, {"key_owner": owner, "rows": limit}


def select_busy_ids(owner: str, limit: int) -> Bound:
    """Ids of an owner's contexts that have an active run; partial index of active runs."""
    return _SELECT_BUSY_IDS, {"key_owner": owner, "rows": limit}


def lock_states(context_ids: Iterable[str]) -> Bound:
    """State and version of contexts that runs are about to move, by primary key; locked, in one order for everybody."""
    return _LOCK_STATES, {"key_ids": list(context_ids)}


def update_context(context_id: str, version: int, values: Mapping[str, Any]) -> Bound:
    """Changes a context that is still at ``version``."""
    return _UPDATE_CONTEXT, {"key_id": context_id, "key_version": version, **values}


def delete_context(context_id: str) -> Bound:
    """Deletes a context; messages, chunks and runs follow by foreign key."""
    return _DELETE_CONTEXT, {"key_id": context_id}


_COUNT_CHUNKS = select(func.coalesce(func.sum(messages.c.sequence), 0)).where(
    messages.c.context_id == bindparam("key_context_id")
)


def count_chunks(context_id: str) -> Bound:
    """How many chunks the messages of a context have, compacted or not; unique index context, position."""
    return _COUNT_CHUNKS, {"key_context_id": context_id}


_SELECT_NOW_MS = select(database_now_ms())


def select_now_ms() -> Bound:
    """What time it is for the database, in milliseconds since the Unix epoch."""
    return _SELECT_NOW_MS, {}


# Messages

_INSERT_MESSAGES = insert(messages)
_SELECT_MESSAGE = (
    select(messages)
    .join(contexts, contexts.c.id == messages.c.context_id)
    .where(
        messages.c.id == bindparam("key_id"),
        messages.c.context_id == bindparam("key_context_id"),
        contexts.c.owner == bindparam("key_owner"),
    )
)
_SELECT_ENDED_SINCE = (
    select(messages)
    .where(
        messages.c.context_id == bindparam("key_context_id"),
        messages.c.ended_version >= bindparam("since"),
        messages.c.role == Role.ASSISTANT,
    )
    .order_by(messages.c.ended_version)
    .limit(bindparam("rows"))
)
_UPDATE_MESSAGE = update(messages).where(messages.c.id == bindparam("key_id"))


def insert_messages(rows: Sequence[Mapping[str, Any]]) -> Bound:
    """New messages of one context."""
    return _INSERT_MESSAGES, [dict(row) for row in rows]


def select_message(owner: str, context_id: str, message_id: str) -> Bound:
    """One message of an owner's context, by primary keys."""
    return _SELECT_MESSAGE, {"key_id": message_id, "key_context_id": context_id, "key_owner": owner}


def select_ended_since(context_id: str, version: int, limit: int) -> Bound:
    """Replies of a context that ended at a version or later, oldest first; index context, ended_version.

    At it too: a client may have been told of the state at that version and not yet of the ending.
    """
    return _SELECT_ENDED_SINCE, {"key_context_id": context_id, "since": version, "rows": limit}


_LOCK_MESSAGE = select(messages.c.id).where(messages.c.id == bindparam("key_id")).with_for_update()


def lock_message(message_id: str) -> Bound:
    """Locks a message, by primary key: what is read of it afterwards is the newest."""
    return _LOCK_MESSAGE, {"key_id": message_id}


_ADD_CONTENT_BYTES = (
    update(messages)
    .where(messages.c.id == bindparam("key_id"))
    .values(content_bytes=messages.c.content_bytes + bindparam("more", type_=BigInteger))
)


def add_content_bytes(message_id: str, more: int) -> Bound:
    """Makes the size of a message so many bytes larger, by primary key."""
    return _ADD_CONTENT_BYTES, {"key_id": message_id, "more": more}


def update_message(message_id: str, values: Mapping[str, Any]) -> Bound:
    """Changes a message, by primary key."""
    return _UPDATE_MESSAGE, {"key_id": message_id, **values}


_USED = [
    func.coalesce(func.sum(messages.c.usage[name].as_integer()), 0).label(name)
    for name in ("input_tokens", "output_tokens", "requests", "tool_calls")
]
_SUM_USAGE = (
    select(
        func.count(messages.c.usage).label("replies"),
        *_USED,
        func.coalesce(func.max(cast(messages.c.usage["estimated"].as_boolean(), Integer)), 0).label("estimated"),
    )
    .select_from(contexts)
    .join(messages, messages.c.context_id == contexts.c.id)
    .where(contexts.c.owner == bindparam("key_owner"), messages.c.role == Role.ASSISTANT)
)
_SUM_USAGE_OF_CONTEXT = _SUM_USAGE.where(contexts.c.id == bindparam("key_context_id"))


def sum_usage(owner: str, context_id: str | None) -> Bound:
    """What the replies of an owner, or of one context, have used; index owner, and context, position."""
    if context_id is None:
        return _SUM_USAGE, {"key_owner": owner}
    return _SUM_USAGE_OF_CONTEXT, {"key_owner": owner, "key_context_id": context_id}


# Chunks

_SELECT_CHUNKS = (
    select(chunks.c.sequence, chunks.c.kind, chunks.c.text, chunks.c.data)
    .where(
        chunks.c.message_id == bindparam("key_message_id"),
        chunks.c.sequence > bindparam("after"),
        chunks.c.sequence <= bindparam("until"),
    )
    .order_by(chunks.c.sequence)
    .limit(bindparam("rows"))
)


def select_chunks(message_id: str, after: int, until: int, limit: int) -> Bound:
    """Chunks ``after < sequence <= until`` of a message: a range of the primary key, in order, bounded in rows."""
    return _SELECT_CHUNKS, {"key_message_id": message_id, "after": after, "until": until, "rows": limit}


# Idempotency keys

_KEY = (idempotency_keys.c.owner == bindparam("key_owner"), idempotency_keys.c.key == bindparam("key_key"))
_SELECT_IDEMPOTENCY_KEY = select(idempotency_keys).where(*_KEY)
_INSERT_IDEMPOTENCY_KEY = insert(idempotency_keys)
_DELETE_IDEMPOTENCY_KEY = delete(idempotency_keys).where(*_KEY)
_DELETE_OLD_IDEMPOTENCY_KEYS = delete(idempotency_keys).where(
    tuple_(idempotency_keys.c.owner, idempotency_keys.c.key).in_(
        select(idempotency_keys.c.owner, idempotency_keys.c.key)
        .where(idempotency_keys.c.created_at < bindparam("moment"))
        .order_by(idempotency_keys.c.created_at)
        .limit(bindparam("rows"))
    )
)


def select_idempotency_key(owner: str, key: str) -> Bound:
    """What a key was used for, by primary key."""
    return _SELECT_IDEMPOTENCY_KEY, {"key_owner": owner, "key_key": key}


def insert_idempotency_key(values: Mapping[str, Any]) -> Bound:
    """A key with the answer that it got, in the transaction of what it did."""
    return _INSERT_IDEMPOTENCY_KEY, dict(values)


def delete_idempotency_key(owner: str, key: str) -> Bound:
    """Forgets one key that is too old to count."""
    return _DELETE_IDEMPOTENCY_KEY, {"key_owner": owner, "key_key": key}


def delete_idempotency_keys_before(moment: int, limit: int) -> Bound:
    """Forgets up to ``limit`` keys made before ``moment``; index created_at."""
    return _DELETE_OLD_IDEMPOTENCY_KEYS, {"moment": moment, "rows": limit}

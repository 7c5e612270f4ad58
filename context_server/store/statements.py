"""Every SQL statement, named: what it reads or writes, and the index that serves it.

Each function gives a statement and its parameters: ``connection.execute(*statements.select_context(owner, id))``. The
statements are built once, because building one costs as much as running it. The two of the append are in
``dialects/``: they differ most between databases. What a client's
request reaches is scoped by owner, by the statement itself or by one before it in the same transaction.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import BigInteger, Executable, and_, bindparam, delete, func, insert, or_, select, tuple_, update

from context_server.records import Role, RunStatus
from context_server.store.clock import database_now_ms
from context_server.store.tables import chunks, contexts, idempotency_keys, messages, runs, server_facts

Bound = tuple[Executable, dict[str, Any] | list[dict[str, Any]]]
"""A statement and what it is run with."""

# Written out in the statement and not bound, and the same as in the index: SQLite takes a partial index only where it
# can see that the statement asks for nothing outside of it.
_IS_ACTIVE = runs.c.status.in_(
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
    .where(_IS_ACTIVE, contexts.c.owner == bindparam("key_owner"))
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
_SELECT_MESSAGES = (
    select(messages)
    .where(messages.c.context_id == bindparam("key_context_id"), messages.c.position > bindparam("after"))
    .order_by(messages.c.position)
    .limit(bindparam("rows"))
)
_REPLY_POSITION = select(messages.c.position).where(messages.c.id == bindparam("key_id")).scalar_subquery()
_SELECT_HISTORY = (
    select(messages)
    .where(messages.c.context_id == bindparam("key_context_id"), messages.c.position < _REPLY_POSITION)
    .order_by(messages.c.position.desc())
    .limit(bindparam("rows"))
)
_SELECT_NEWEST_REPLIES = (
    select(messages)
    .join(contexts, contexts.c.head_message_id == messages.c.id)
    .where(contexts.c.id.in_(bindparam("key_ids", expanding=True)))
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


def select_messages(context_id: str, after: int, limit: int) -> Bound:
    """Messages of a context after a position, oldest first; unique index context, position."""
    return _SELECT_MESSAGES, {"key_context_id": context_id, "after": after, "rows": limit}


def select_history(context_id: str, before_message_id: str, limit: int) -> Bound:
    """Messages before a reply, newest first; unique index context, position."""
    return _SELECT_HISTORY, {"key_context_id": context_id, "key_id": before_message_id, "rows": limit}


def select_newest_replies(context_ids: Iterable[str]) -> Bound:
    """The head message of each context, by primary keys."""
    return _SELECT_NEWEST_REPLIES, {"key_ids": list(context_ids)}


def select_ended_since(context_id: str, version: int, limit: int) -> Bound:
    """Replies of a context that ended at a version or later, oldest first; index context, ended_version.

    At it too: a client may have been told of the state at that version and not yet of the ending.
    """
    return _SELECT_ENDED_SINCE, {"key_context_id": context_id, "since": version, "rows": limit}


_LOCK_MESSAGE = select(messages.c.id).where(messages.c.id == bindparam("key_id")).with_for_update()


def lock_message(message_id: str) -> Bound:
    """Locks a message, by primary key: what is read of it afterwards is the newest."""
    return _LOCK_MESSAGE, {"key_id": message_id}


def update_message(message_id: str, values: Mapping[str, Any]) -> Bound:
    """Changes a message, by primary key."""
    return _UPDATE_MESSAGE, {"key_id": message_id, **values}


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


# Runs

_INSERT_RUN = insert(runs)
_SELECT_RUNS = select(
    runs,
    contexts.c.owner,
    contexts.c.state,
    contexts.c.version,
    contexts.c.mode,
    contexts.c.metadata.label("context_metadata"),
).join(contexts, contexts.c.id == runs.c.context_id)
_SELECT_QUEUED_RUNS = (
    _SELECT_RUNS.where(_IS_ACTIVE, runs.c.status == RunStatus.QUEUED)
    .order_by(runs.c.created_at, runs.c.id)
    .limit(bindparam("rows"))
)
_CLAIM_RUNS = _SELECT_QUEUED_RUNS.with_for_update(of=(runs, contexts), skip_locked=True)
_IS_LEASED = runs.c.lease_expires_at > database_now_ms()
_HAS_EXPIRED = and_(
    _IS_ACTIVE,
    runs.c.status == RunStatus.RUNNING,
    or_(runs.c.lease_expires_at.is_(None), runs.c.lease_expires_at <= database_now_ms()),
)
_SELECT_EXPIRED_RUNS = (
    select(runs.c.id, runs.c.context_id, runs.c.message_id, runs.c.attempt, contexts.c.owner)
    .join(contexts, contexts.c.id == runs.c.context_id)
    .where(_HAS_EXPIRED)
    .order_by(runs.c.created_at, runs.c.id)
    .limit(bindparam("rows"))
)
_LOCK_EXPIRED_RUN = (
    select(contexts.c.state, contexts.c.version)
    .select_from(runs)
    .join(contexts, contexts.c.id == runs.c.context_id)
    .join(messages, messages.c.id == runs.c.message_id)
    .where(_HAS_EXPIRED, runs.c.id == bindparam("key_id"), runs.c.attempt == bindparam("key_attempt"))
    .with_for_update(of=(runs, contexts, messages), skip_locked=True)
)
_LEASE = {"node_id": bindparam("node"), "lease_expires_at": database_now_ms() + bindparam("lease_ms", type_=BigInteger)}
_TAKE_LEASES = update(runs).where(runs.c.id.in_(bindparam("key_ids", expanding=True))).values(_LEASE)
_RENEW_LEASES = (
    update(runs)
    .where(runs.c.id.in_(bindparam("key_ids", expanding=True)), runs.c.node_id == bindparam("key_node"), _IS_LEASED)
    .values(lease_expires_at=_LEASE["lease_expires_at"])
    .returning(runs.c.id)
)
_SELECT_STANDINGS = (
    select(
        messages.c.id,
        messages.c.attempt,
        messages.c.sequence,
        messages.c.final_sequence,
        messages.c.status,
        messages.c.digest,
        or_(runs.c.lease_expires_at.is_(None), _IS_LEASED).label("is_held"),
        contexts.c.state,
        contexts.c.version,
    )
    .join(runs, runs.c.id == messages.c.run_id)
    .join(contexts, contexts.c.id == messages.c.context_id)
    .where(messages.c.id.in_(bindparam("key_ids", expanding=True)))
)
_SELECT_RUNNING_STATES = (
    select(runs.c.id, contexts.c.state)
    .join(contexts, contexts.c.id == runs.c.context_id)
    .where(
        runs.c.id.in_(bindparam("key_ids", expanding=True)),
        runs.c.status == RunStatus.RUNNING,
        runs.c.node_id.is_not_distinct_from(bindparam("key_node")),
    )
)
_SELECT_CLAIMED_RUNS = _SELECT_RUNS.join(messages, messages.c.id == runs.c.message_id).where(
    _IS_ACTIVE,
    runs.c.status == RunStatus.RUNNING,
    runs.c.node_id == bindparam("key_node"),
    _IS_LEASED,
    messages.c.sequence == 0,
)
_UPDATE_RUN = update(runs).where(runs.c.id == bindparam("key_id"))
_COUNT_ACTIVE_RUNS = select(runs.c.status, func.count().label("runs")).where(_IS_ACTIVE).group_by(runs.c.status)


def insert_run(values: Mapping[str, Any]) -> Bound:
    """A new run; the partial unique index refuses a second active one of the context."""
    return _INSERT_RUN, dict(values)


def select_queued_runs(limit: int) -> Bound:
    """Queued runs with what their agent needs, oldest first; partial index of active runs."""
    return _SELECT_QUEUED_RUNS, {"rows": limit}


def claim_runs(limit: int) -> Bound:
    """The same, locked with their contexts; those that somebody else has locked are left out."""
    return _CLAIM_RUNS, {"rows": limit}


def select_expired_runs(limit: int) -> Bound:
    """Runs marked as running whose lease is over, or who have none; partial index of active runs."""
    return _SELECT_EXPIRED_RUNS, {"rows": limit}


def lock_expired_run(run_id: str, attempt: int) -> Bound:
    """State and version of the context of a run that nobody holds, all of its rows locked; nothing where one is."""
    return _LOCK_EXPIRED_RUN, {"key_id": run_id, "key_attempt": attempt}


def take_leases(run_ids: Iterable[str], node_id: str, lease_ms: int) -> Bound:
    """Leases runs that this transaction has locked to a node, by primary key."""
    return _TAKE_LEASES, {"key_ids": list(run_ids), "node": node_id, "lease_ms": lease_ms}


def renew_leases(run_ids: Iterable[str], node_id: str, lease_ms: int) -> Bound:
    """Renews the leases that the node still has, by primary key; gives the ids of those runs."""
    return _RENEW_LEASES, {"key_ids": list(run_ids), "key_node": node_id, "lease_ms": lease_ms}


def select_standings(message_ids: Iterable[str]) -> Bound:
    """Where the replies of runs stand: message, lease and context, by primary keys."""
    return _SELECT_STANDINGS, {"key_ids": list(message_ids)}


def select_running_states(run_ids: Iterable[str], node_id: str | None) -> Bound:
    """The context's state of those runs that are marked as running on a node, by primary key."""
    return _SELECT_RUNNING_STATES, {"key_ids": list(run_ids), "key_node": node_id}


def select_claimed_runs(node_id: str) -> Bound:
    """Runs leased to a node whose replies hold nothing; partial index of active runs."""
    return _SELECT_CLAIMED_RUNS, {"key_node": node_id}


def update_run(run_id: str, values: Mapping[str, Any]) -> Bound:
    """Changes a run, by primary key."""
    return _UPDATE_RUN, {"key_id": run_id, **values}


def count_active_runs() -> Bound:
    """How many runs there are in each active status; partial index of active runs."""
    return _COUNT_ACTIVE_RUNS, {}


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

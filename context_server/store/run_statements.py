"""The statements of runs and their leases, named as those of ``statements``."""

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import BigInteger, and_, bindparam, func, insert, or_, select, update

from context_server.records import RunStatus
from context_server.store.clock import database_now_ms
from context_server.store.statements import IS_ACTIVE, Bound
from context_server.store.tables import contexts, messages, runs

_INSERT_RUN = insert(runs)
_SELECT_RUNS = (
    select(
        runs,
        contexts.c.owner,
        contexts.c.state,
        contexts.c.version,
        contexts.c.mode,
        contexts.c.model,
        contexts.c.metadata.label("context_metadata"),
        messages.c.sequence,
        messages.c.content_bytes,
    )
    .join(contexts, contexts.c.id == runs.c.context_id)
    .join(messages, messages.c.id == runs.c.message_id)
)
_SELECT_QUEUED_RUNS = (
    _SELECT_RUNS.where(IS_ACTIVE, runs.c.status == RunStatus.QUEUED)
    .order_by(runs.c.created_at, runs.c.id)
    .limit(bindparam("rows"))
)
_SELECT_UNCLAIMED_RUNS = (
    _SELECT_RUNS.where(IS_ACTIVE, runs.c.status != RunStatus.RUNNING)
    .order_by(runs.c.created_at, runs.c.id)
    .limit(bindparam("rows"))
)
_CLAIM_RUNS = _SELECT_QUEUED_RUNS.with_for_update(of=(runs, contexts), skip_locked=True)
_IS_LEASED = runs.c.lease_expires_at > database_now_ms()
_HAS_EXPIRED = and_(
    IS_ACTIVE,
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
_LOCK_HELD_RUN = (
    select(runs.c.id)
    .where(
        runs.c.id == bindparam("key_id"),
        runs.c.attempt == bindparam("key_attempt"),
        runs.c.status == RunStatus.RUNNING,
        or_(runs.c.lease_expires_at.is_(None), _IS_LEASED),
    )
    .with_for_update()
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
_SELECT_CLAIMED_RUNS = _SELECT_RUNS.where(
    IS_ACTIVE,
    runs.c.status == RunStatus.RUNNING,
    runs.c.node_id == bindparam("key_node"),
    _IS_LEASED,
    messages.c.sequence == runs.c.start_sequence,
)
_UPDATE_RUN = update(runs).where(runs.c.id == bindparam("key_id"))
_COUNT_ACTIVE_RUNS = select(runs.c.status, func.count().label("runs")).where(IS_ACTIVE).group_by(runs.c.status)


def insert_run(values: Mapping[str, Any]) -> Bound:
    """A new run; the partial unique index refuses a second active one of the context."""
    return _INSERT_RUN, dict(values)


def select_unclaimed_runs(limit: int) -> Bound:
    """Queued and suspended runs, oldest first; partial index of active runs."""
    return _SELECT_UNCLAIMED_RUNS, {"rows": limit}


def claim_runs(limit: int) -> Bound:
    """Queued runs with what their agent needs, oldest first, locked with their contexts; partial index of active runs.

    Those that somebody else has locked are left out.
    """
    return _CLAIM_RUNS, {"rows": limit}


def select_expired_runs(limit: int) -> Bound:
    """Runs marked as running whose lease is over, or who have none; partial index of active runs."""
    return _SELECT_EXPIRED_RUNS, {"rows": limit}


def lock_expired_run(run_id: str, attempt: int) -> Bound:
    """State and version of the context of a run that nobody holds, all of its rows locked; nothing where one is."""
    return _LOCK_EXPIRED_RUN, {"key_id": run_id, "key_attempt": attempt}


def lock_held_run(run_id: str, attempt: int) -> Bound:
    """A run that this attempt still holds, by primary key, locked; nothing where it does not."""
    return _LOCK_HELD_RUN, {"key_id": run_id, "key_attempt": attempt}


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

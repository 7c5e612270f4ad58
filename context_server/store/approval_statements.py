"""The statements of approvals, named as those of ``statements``."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import bindparam, insert, select, update

from context_server.records import ApprovalStatus
from context_server.store.clock import database_now_ms
from context_server.store.statements import Bound
from context_server.store.tables import approvals, contexts

_INSERT_APPROVALS = insert(approvals)
_SELECT_APPROVAL = select(approvals).where(
    approvals.c.id == bindparam("key_id"), approvals.c.context_id == bindparam("key_context_id")
)
_SELECT_APPROVALS = (
    select(approvals)
    .where(approvals.c.context_id == bindparam("key_context_id"))
    .order_by(approvals.c.created_at, approvals.c.id)
)
_SELECT_PENDING = _SELECT_APPROVALS.where(approvals.c.status == ApprovalStatus.PENDING)
_SELECT_OF_RUN = (
    select(approvals)
    .where(approvals.c.run_id == bindparam("key_run_id"))
    .order_by(approvals.c.created_at, approvals.c.id)
)
_SELECT_EXPIRED = (
    select(approvals.c.context_id, contexts.c.owner)
    .join(contexts, contexts.c.id == approvals.c.context_id)
    .where(approvals.c.status == ApprovalStatus.PENDING, approvals.c.expires_at <= database_now_ms())
    .order_by(approvals.c.expires_at, approvals.c.id)
    .limit(bindparam("rows"))
)
_DECIDE = update(approvals).where(approvals.c.id == bindparam("key_id"), approvals.c.status == ApprovalStatus.PENDING)
_CLOSE_PENDING = update(approvals).where(
    approvals.c.run_id == bindparam("key_run_id"), approvals.c.status == ApprovalStatus.PENDING
)


def insert_approvals(rows: Sequence[Mapping[str, Any]]) -> Bound:
    """New requests."""
    return _INSERT_APPROVALS, [dict(row) for row in rows]


def select_approval(context_id: str, approval_id: str) -> Bound:
    """One approval of a context, by primary key."""
    return _SELECT_APPROVAL, {"key_id": approval_id, "key_context_id": context_id}


def select_approvals(context_id: str, *, only_pending: bool) -> Bound:
    """The approvals of a context, oldest first; index context, created_at."""
    return _SELECT_PENDING if only_pending else _SELECT_APPROVALS, {"key_context_id": context_id}


def select_of_run(run_id: str) -> Bound:
    """The approvals of a run, oldest first; index run."""
    return _SELECT_OF_RUN, {"key_run_id": run_id}


def select_expired(limit: int) -> Bound:
    """The contexts of pending approvals whose time is over, by the database's clock; partial index of pending ones."""
    return _SELECT_EXPIRED, {"rows": limit}


def decide(approval_id: str, values: Mapping[str, Any]) -> Bound:
    """Decides on an approval that is pending, by primary key: a compare-and-set."""
    return _DECIDE, {"key_id": approval_id, **values}


def close_pending(run_id: str, values: Mapping[str, Any]) -> Bound:
    """Decides on all pending approvals of a run; index run."""
    return _CLOSE_PENDING, {"key_run_id": run_id, **values}

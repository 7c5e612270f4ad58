"""Approvals: the calls that a suspended run waits for a person to decide on.

Each function runs inside one transaction of ``Store``. A decision is single use: a compare-and-set from ``pending``, in
the transaction that moves the context, so that a decision which was recorded and a run that goes on are one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row

from context_server.errors import ApprovalDecided, ApprovalNotFound, ArgumentsNotEditable
from context_server.machine import Event, advance
from context_server.records import Approval, ApprovalStatus, Failure, RunStatus, State, Transition, arguments_digest
from context_server.store import approval_statements, run_statements
from context_server.store.moves import move_context
from context_server.store.rows import to_approval

EXPIRED = Failure(code="approval-expired", detail="Nobody decided in time on a call that needed approval.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What a person says to a request: ``arguments`` are those to call the tool with instead, where it is approved."""

    status: ApprovalStatus
    note: str | None = None
    arguments: Mapping[str, Any] | None = None


def request(connection: Connection, requests: Sequence[Approval]) -> None:
    """Stores what a run asks for as it is suspended."""
    rows = [
        {
            "id": approval.id,
            "context_id": approval.context_id,
            "message_id": approval.message_id,
            "run_id": approval.run_id,
            "call_id": approval.call_id,
            "tool": approval.tool,
            "arguments": dict(approval.arguments),
            "arguments_sha256": approval.arguments_sha256,
            "editable": approval.editable,
            "status": approval.status,
            "created_at": _to_ms(approval.created_at),
            "expires_at": _to_ms(approval.expires_at),
        }
        for approval in requests
    ]
    connection.execute(*approval_statements.insert_approvals(rows))


def _to_ms(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)


def approvals(connection: Connection, context_id: str, *, only_pending: bool) -> list[Approval]:
    """The approvals of a context that the caller may see, oldest first."""
    rows = connection.execute(*approval_statements.select_approvals(context_id, only_pending=only_pending))
    return [to_approval(row) for row in rows]


def of_run(connection: Connection, run_id: str) -> list[Approval]:
    """Everything that a run has asked for, oldest first."""
    return [to_approval(row) for row in connection.execute(*approval_statements.select_of_run(run_id))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """An approval as it stands, and what a decision on it did.

    ``transition`` is None where the run does not go on yet, and ``version``, the context's new one, where nothing new
    was decided.
    """

    approval: Approval
    version: int | None = None
    transition: Transition | None = None


def decide(connection: Connection, context: Row[Any], approval_id: str, decision: Decision, now_ms: int) -> Decided:
    """The approval as it stands after a decision; once nothing of the run is pending, it is queued again.

    ``context`` is the row, locked. The same decision again changes nothing.

    Raises:
        ApprovalNotFound: the context has none with this id.
        ApprovalDecided: another decision stands; or its time was over, and it counts as expired.
        ArgumentsNotEditable: the decision has arguments, and the tool allows no others than were asked for.
    """
    row = connection.execute(*approval_statements.select_approval(context.id, approval_id)).one_or_none()
    if row is None:
        raise ApprovalNotFound(approval_id)
    approval = to_approval(row)
    if approval.status is not ApprovalStatus.PENDING:
        if _is_same(approval, decision):
            return Decided(approval=approval)
        raise ApprovalDecided(approval.status, approval)
    if row.expires_at <= now_ms:
        overdue = replace(approval, status=ApprovalStatus.EXPIRED)
        raise ApprovalDecided(overdue.status, overdue)
    if decision.arguments is not None and not approval.editable:
        raise ArgumentsNotEditable(approval.tool)
    is_edited = decision.arguments is not None and not _are_same(decision.arguments, approval.arguments)
    values = {
        "status": decision.status,
        "note": decision.note,
        "edited_arguments": dict(decision.arguments) if is_edited and decision.arguments is not None else None,
        "decided_at": now_ms,
    }
    connection.execute(*approval_statements.decide(approval_id, values))
    decided = connection.execute(*approval_statements.select_approval(context.id, approval_id)).one()
    transition = _go_on(connection, context, now_ms)
    return Decided(approval=to_approval(decided), version=context.version + 1, transition=transition)


def _is_same(approval: Approval, decision: Decision) -> bool:
    arguments = approval.arguments if decision.arguments is None else decision.arguments
    return approval.status is decision.status and _are_same(arguments, approval.final_arguments)


def _are_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two are the same JSON; to Python 1 and true are."""
    return arguments_digest(one) == arguments_digest(other)


def _go_on(connection: Connection, context: Row[Any], now_ms: int) -> Transition | None:
    """Queues the run once nothing is pending; else says, by a version, that the approvals have changed."""
    version = context.version + 1
    if connection.execute(*approval_statements.select_approvals(context.id, only_pending=True)).first() is not None:
        move_context(connection, context.id, context.version, {"version": version, "updated_at": now_ms})
        return None
    state = State(context.state)
    queued = advance(state, Event.APPROVAL_DECIDED)
    connection.execute(*run_statements.update_run(context.active_run_id, {"status": RunStatus.QUEUED}))
    values = {"state": queued, "version": version, "updated_at": now_ms}
    move_context(connection, context.id, context.version, values)
    return Transition(
        context_id=context.id,
        run_id=context.active_run_id,
        previous_state=state,
        previous_version=context.version,
        state=queued,
        version=version,
    )


def close(connection: Connection, run_id: str, status: ApprovalStatus, now_ms: int) -> None:
    """Decides on whatever of a run is pending, since the run ends: ``cancelled`` or ``expired``."""
    connection.execute(*approval_statements.close_pending(run_id, {"status": status, "decided_at": now_ms}))


def expired(connection: Connection, *, limit: int) -> list[tuple[str, str]]:
    """``(owner, context_id)`` of contexts whose pending approvals are overdue, those first that are so for longest."""
    rows = connection.execute(*approval_statements.select_expired(limit)).all()
    return list(dict.fromkeys((row.owner, row.context_id) for row in rows))

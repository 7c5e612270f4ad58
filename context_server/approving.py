"""Requests for approval on their way into the log: what an agent asks for becomes a record, and a tool call."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from context_server.records import Approval, ApprovalRequest, ApprovalStatus, Run, arguments_digest, new_id, now
from context_server.storable import clean_data, clean_text

MAX_NAME = 200
"""Characters of a tool's name, and of a call's id, that are kept outside of the log: as many as the columns hold."""


def approvals_of(run: Run, requests: Sequence[ApprovalRequest], lifetime: float) -> list[Approval]:
    """The pending approvals of requests, which expire ``lifetime`` seconds from now; their ids are in their order."""
    ids = sorted(new_id() for _ in requests)
    at = now()
    return [_approval_of(run, request, each, at, lifetime) for each, request in zip(ids, requests, strict=True)]


def _approval_of(run: Run, request: ApprovalRequest, approval_id: str, at: datetime, lifetime: float) -> Approval:
    arguments = clean_data(request.arguments)
    return Approval(
        id=approval_id,
        context_id=run.context_id,
        message_id=run.message_id,
        run_id=run.id,
        call_id=clean_text(request.call_id)[:MAX_NAME],
        tool=clean_text(request.tool)[:MAX_NAME],
        arguments=arguments,
        arguments_sha256=arguments_digest(arguments),
        editable=request.editable,
        status=ApprovalStatus.PENDING,
        edited_arguments=None,
        note=None,
        created_at=at,
        expires_at=at + timedelta(seconds=lifetime),
        decided_at=None,
    )


def call_to_approve(approval: Approval) -> dict[str, Any]:
    """The data of the ``tool_call`` chunk of a call that waits for a person."""
    return {
        "id": approval.call_id,
        "name": approval.tool,
        "arguments": approval.arguments,
        "approval": {
            "id": approval.id,
            "editable": approval.editable,
            "expires_at": approval.expires_at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        },
    }

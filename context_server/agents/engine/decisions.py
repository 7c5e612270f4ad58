"""Approvals: what a person is asked, and what becomes of a call once it was decided on."""

from collections.abc import Collection, Mapping

from pydantic_ai.tools import DeferredToolRequests, DeferredToolResults, ToolApproved, ToolDenied

from context_server.agents.engine.steps import LoggedCall
from context_server.agents.protocol import AgentFailed
from context_server.records import Approval, ApprovalRequest, ApprovalStatus, Suspend, arguments_digest

_OTHER_ARGUMENTS = "Denied: the arguments in the log are not those that were approved."
_REFUSED = {
    ApprovalStatus.DENIED: "The call was denied; the tool was not run.",
    ApprovalStatus.EXPIRED: "Nobody decided on the call in time; the tool was not run.",
    ApprovalStatus.CANCELLED: "The call was cancelled; the tool was not run.",
    ApprovalStatus.PENDING: "Nobody has decided on the call; the tool was not run.",
}


def requests_of(deferred: DeferredToolRequests, editable_tools: Collection[str]) -> Suspend:
    """What to ask a person.

    Raises:
        AgentFailed: a tool is to be run by somebody else, which nobody here does.
    """
    if deferred.calls:
        raise AgentFailed("tool-not-supported", f"The tool {deferred.calls[0].tool_name} is not run by this server.")
    return Suspend(
        tuple(
            ApprovalRequest(
                call_id=call.tool_call_id,
                tool=call.tool_name,
                arguments=call.args_as_dict(),
                editable=call.tool_name in editable_tools,
            )
            for call in deferred.approvals
        )
    )


def decided(open_calls: Mapping[str, LoggedCall], approvals: Mapping[str, Approval]) -> DeferredToolResults:
    """The decisions on these calls, as the library takes them."""
    return DeferredToolResults(
        approvals={call_id: _decision(call, approvals[call.id]) for call_id, call in open_calls.items()}
    )


def _decision(call: LoggedCall, approval: Approval) -> ToolApproved | ToolDenied:
    if approval.status is not ApprovalStatus.APPROVED:
        reason = _REFUSED[approval.status]
        return ToolDenied(f"{reason} The person says: {approval.note}" if approval.note else reason)
    if arguments_digest(call.arguments) != approval.arguments_sha256:
        return ToolDenied(_OTHER_ARGUMENTS)
    edited = approval.edited_arguments
    return ToolApproved(override_args=None if edited is None else dict(edited))

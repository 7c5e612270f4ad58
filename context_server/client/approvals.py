"""Approvals: what runs ask for, and what a person decides."""

from collections.abc import Mapping
from typing import Any

from context_server.client.caller import Caller, path_of
from context_server.client.parsing import parse, parse_items
from context_server.client.records import ApprovalInfo


class ApprovalCalls(Caller):
    """The calls that a context's runs may make only when a person says so.

    The same decision twice is one decision, so that a decision whose answer was lost is sent again without harm.
    """

    async def approvals(self, context_id: str, *, include_decided: bool = False) -> list[ApprovalInfo]:
        """The calls that wait for a decision, oldest first; with ``include_decided`` all that ever did."""
        params = {"status": "all" if include_decided else "pending"}
        answer = await self._request("GET", path_of("contexts", context_id, "approvals"), params=params)
        return parse_items(ApprovalInfo, answer)

    async def approve(
        self,
        context_id: str,
        approval_id: str,
        *,
        note: str | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> ApprovalInfo:
        """Has the call made, with other ``arguments`` where it is editable and they are given.

        Raises:
            ApprovalDecidedError: another decision stands.
            NotEditableError: the arguments of this tool cannot be changed.
        """
        return await self._decide(
            context_id, approval_id, {"decision": "approve", "note": note, "arguments": arguments}
        )

    async def deny(self, context_id: str, approval_id: str, *, note: str | None = None) -> ApprovalInfo:
        """Has the call not made; the agent is told so, and the ``note``.

        Raises:
            ApprovalDecidedError: another decision stands.
        """
        return await self._decide(context_id, approval_id, {"decision": "deny", "note": note})

    async def _decide(self, context_id: str, approval_id: str, decision: Mapping[str, Any]) -> ApprovalInfo:
        body = {name: value for name, value in decision.items() if value is not None}
        path = path_of("contexts", context_id, "approvals", approval_id)
        return parse(ApprovalInfo, await self._request("POST", path, body=body))

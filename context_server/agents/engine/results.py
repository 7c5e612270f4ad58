"""What came back from a tool, as the log has it."""

from collections.abc import Mapping
from typing import Any

from pydantic_ai.messages import BinaryContent, ToolReturnPart
from pydantic_core import to_jsonable_python

from context_server.records import Approval, ApprovalStatus, ChunkKind, Delta

_STATUSES: Mapping[str, str] = {"success": "ok", "failed": "error", "retried": "error", "denied": "denied"}
"""By the library's outcome."""


def data_of(part: ToolReturnPart[Any], seconds: float, approval: Approval | None) -> dict[str, Any]:
    """``{"id", "status", "result", "seconds"}``, and ``arguments`` where a person has changed them."""
    status = _STATUSES.get(part.outcome, "interrupted")
    if status == "denied" and approval is not None and approval.status is ApprovalStatus.EXPIRED:
        status = "expired"
    data = {
        "id": part.tool_call_id,
        "status": status,
        "result": to_jsonable_python(_without_files(part.content), serialize_unknown=True, bytes_mode="base64"),
        "seconds": round(seconds, 3),
    }
    if status in ("ok", "error") and approval is not None and approval.edited_arguments is not None:
        data["arguments"] = dict(approval.edited_arguments)
    return data


def interrupted(call_id: str, seconds: float) -> Delta:
    """The end of a call whose tool raised, or was stopped because another one did."""
    data = {"id": call_id, "status": "interrupted", "result": None, "seconds": round(seconds, 3)}
    return Delta(ChunkKind.TOOL_RESULT, data=data)


def _without_files(content: Any) -> Any:
    """The content with a note in the place of each file: the log keeps text."""
    if isinstance(content, BinaryContent):
        return f"[a file of the type {content.media_type}]"
    if isinstance(content, list | tuple):
        return [_without_files(each) for each in content]
    return content

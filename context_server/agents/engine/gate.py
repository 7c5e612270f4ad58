"""What stands between the library and its model in each step: which tools are offered, and how calls are called."""

from dataclasses import dataclass, field, replace
from typing import Any

from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.messages import ModelResponse, ToolCallPart
from pydantic_ai.models import ModelRequestContext
from pydantic_ai.tools import RunContext, ToolDefinition

from context_server.records import Mode

PLANNING = (
    "The conversation is in plan mode: only tools that change nothing are offered. "
    "Look into things and say what you would do; do not claim to have done it."
)
_MAX_ID = 64
"""Characters of a call's id; some servers make them long, and an approval keeps no more than 200."""


@dataclass
class Gate(AbstractCapability[Any]):
    """Takes part in one attempt at a reply. ``call_ids`` are those that the conversation has already."""

    call_ids: set[str] = field(default_factory=set)
    mode: Mode | None = None
    """That of the step; None before the first, where what a person has approved runs in either mode."""

    approved_tools: set[str] = field(default_factory=set)
    """The names of tools that need an approval."""
    editable_tools: set[str] = field(default_factory=set)
    """The names of tools whose arguments a person may change before approving."""

    def instructions(self, _context: RunContext[Any]) -> str | None:
        """What the agent is told besides its own instructions."""
        return PLANNING if self.mode is Mode.PLAN else None

    async def prepare_tools(self, ctx: RunContext[Any], tool_defs: list[ToolDefinition]) -> list[ToolDefinition]:
        """In plan mode only the tools that are marked as changing nothing; no other can be called then."""
        self.approved_tools.update(tool.name for tool in tool_defs if tool.kind == "unapproved")
        self.editable_tools.update(tool.name for tool in tool_defs if (tool.metadata or {}).get("editable_arguments"))
        return [tool for tool in tool_defs if is_read_only(tool)] if self.mode is Mode.PLAN else tool_defs

    async def after_model_request(
        self, ctx: RunContext[Any], *, request_context: ModelRequestContext, response: ModelResponse
    ) -> ModelResponse:
        """The response with ids that no other call of the conversation has: local servers begin at ``call_0`` anew."""
        if not any(isinstance(part, ToolCallPart) for part in response.parts):
            return response
        parts = [self._named_apart(part) if isinstance(part, ToolCallPart) else part for part in response.parts]
        return replace(response, parts=parts)

    def _named_apart(self, call: ToolCallPart) -> ToolCallPart:
        base = call.tool_call_id[:_MAX_ID]
        found, number = base, 2
        while found in self.call_ids:
            found, number = f"{base}-{number}", number + 1
        self.call_ids.add(found)
        return call if found == call.tool_call_id else replace(call, tool_call_id=found)


def is_read_only(tool: ToolDefinition) -> bool:
    """Whether a tool says of itself that it changes nothing: its metadata, or the annotations of an MCP server."""
    metadata = tool.metadata or {}
    annotations = metadata.get("annotations")
    hinted = isinstance(annotations, dict) and annotations.get("readOnlyHint") is True
    return metadata.get("read_only") is True or hinted

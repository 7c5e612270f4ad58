"""Plays a workflow without a server: calls it as the server does, with a log, and decides on what it asks for."""

import asyncio
import json
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from context_server.agents import Workflows
from context_server.records import (
    Approval,
    ApprovalStatus,
    Chunk,
    ChunkKind,
    Delta,
    MessageStatus,
    Role,
    Suspend,
    Turn,
    Usage,
    WorkflowCall,
    arguments_digest,
    now,
)
from tests.unit.agents.asking import RUN

CHUNK_CHARACTERS = 6
MAX_ATTEMPTS = 6
PATIENCE_SECONDS = 60
"""So that a defect fails the test, and does not hang it."""


def message(text: str = "", **fields: Any) -> Turn:
    chunks = (Chunk(1, ChunkKind.TEXT, text),) if text else ()
    return Turn(Role.USER, MessageStatus.COMPLETED, "message-1", chunks, **fields)


def starting(name: str, **given: Any) -> Turn:
    return message(workflow=WorkflowCall(name=name, input=given))


@dataclass
class Play:
    """Calls a workflow as the server does: again with the log and the decisions, each time that it has suspended."""

    workflows: Workflows
    asked: Turn
    later: Sequence[Turn] = ()
    chunks: list[Chunk] = field(default_factory=list)
    approvals: dict[str, Approval] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)

    async def attempt(self) -> Suspend | None:
        run = RUN
        if self.chunks:
            reply = Turn(Role.ASSISTANT, MessageStatus.STREAMING, RUN.message_id, tuple(self.chunks))
            run = replace(RUN, reply=reply, approvals=self.approvals)
        self.usage = Usage()
        async with aclosing(self.workflows([self.asked, *self.later], run)) as values:
            async for value in values:
                if isinstance(value, Suspend):
                    return value
                if isinstance(value, Usage):
                    self.usage = value
                else:
                    self._log(value)
        return None

    async def to_the_end(self, status: ApprovalStatus = ApprovalStatus.APPROVED) -> None:
        for _ in range(MAX_ATTEMPTS):
            async with asyncio.timeout(PATIENCE_SECONDS):
                suspend = await self.attempt()
            if suspend is None:
                return
            for request in suspend.requests:
                data = {"id": request.call_id, "name": request.tool, "arguments": dict(request.arguments)}
                self._log(Delta(ChunkKind.TOOL_CALL, data={**data, "approval": {}}))
                self.approvals[request.call_id] = approval(request.call_id, request.arguments, status)
        raise AssertionError(f"it asks for ever: {self.outcomes}")

    def _log(self, delta: Delta) -> None:
        """As the server does: adjacent text of one kind is merged, and cut into chunks, which are short here."""
        if not delta.kind.is_textual:
            data = json.loads(json.dumps(delta.data))
            self.chunks.append(Chunk(len(self.chunks) + 1, delta.kind, None, data))
            return
        for character in delta.text or "":
            last = self.chunks[-1] if self.chunks else None
            if last is not None and last.kind is delta.kind and len(last.text or "") < CHUNK_CHARACTERS:
                self.chunks[-1] = replace(last, text=(last.text or "") + character)
            else:
                self.chunks.append(Chunk(len(self.chunks) + 1, delta.kind, character))

    @property
    def text(self) -> str:
        return "".join(chunk.text or "" for chunk in self.chunks if chunk.kind is ChunkKind.TEXT)

    @property
    def reasoning(self) -> str:
        return "".join(chunk.text or "" for chunk in self.chunks if chunk.kind is ChunkKind.REASONING)

    @property
    def endings(self) -> list[dict[str, Any]]:
        """What the log says of the steps that are over."""
        found = [dict(chunk.data or {}) for chunk in self.chunks if chunk.kind is ChunkKind.STEP]
        return [data for data in found if "workflow" in data and data["status"] == "finished"]

    @property
    def outcomes(self) -> list[tuple[str, str]]:
        return [(data["name"], data["outcome"]) for data in self.endings]


def approval(call_id: str, arguments: Any, status: ApprovalStatus, note: str | None = "no") -> Approval:
    return Approval(
        id=call_id,
        context_id=RUN.context_id,
        message_id=RUN.message_id,
        run_id=RUN.run_id,
        call_id=call_id,
        tool="tool",
        arguments=arguments,
        arguments_sha256=arguments_digest(arguments),
        editable=False,
        status=status,
        edited_arguments=None,
        note=note,
        created_at=now(),
        expires_at=now(),
        decided_at=now(),
    )


async def echo(history, run):
    yield history[-1].text


async def agree() -> str:
    return "agreed"


async def play(function: Any, agent: Any = echo, **given: Any) -> Play:
    """The workflow, taken to its end; what it asks for is approved."""
    workflows = Workflows(agent)
    workflows.workflow(function)
    played = Play(workflows, starting(function.__name__, **given))
    await played.to_the_end()
    return played

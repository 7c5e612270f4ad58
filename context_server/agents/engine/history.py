"""A conversation as the library takes it, rebuilt from the log, which is the only truth.

Whatever the log holds, and wherever it was cut, what comes out is sound: it begins with a request, no message is empty,
and each call has exactly one result, in the request after it. Only the calls that a person has decided on stay open.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic_ai.messages import (
    ModelMessage,
    ModelRequest,
    ModelRequestPart,
    ModelResponse,
    ModelResponsePart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)

from context_server.agents.engine.contents import prompt_of
from context_server.agents.engine.keepsakes import parts_of
from context_server.agents.engine.steps import LoggedCall, LoggedStep, steps_of
from context_server.agents.protocol import AgentRun
from context_server.records import Role, Turn

LEFT_OUT = "[earlier messages of this conversation are left out]"

_OUTCOMES: Mapping[str, Literal["success", "failed", "denied", "interrupted"]] = {
    "ok": "success",
    "error": "failed",
    "denied": "denied",
}
"""How the library calls the status of a result; any other is ``interrupted``."""
_NOTES = {
    "ok": "",
    "error": "The tool failed.",
    "denied": "The call was denied; the tool was not run.",
    "expired": "Nobody decided on the call in time; the tool was not run.",
    "cancelled": "The call was cancelled; whether it took effect is not known.",
}
_UNKNOWN = "The call was interrupted; whether it took effect is not known."


@dataclass(frozen=True, slots=True)
class Conversation:
    """What the library is given: the messages, and the calls at their end that go on, by id."""

    messages: list[ModelMessage] = field(default_factory=list)
    open_calls: dict[str, LoggedCall] = field(default_factory=dict)
    call_ids: set[str] = field(default_factory=set)


async def rebuild(history: Sequence[Turn], run: AgentRun, provider: str | None) -> Conversation:
    """The conversation up to where ``run`` goes on; ``provider`` gets back what it kept in the log."""
    rebuilding = _Rebuilding(history, run, provider)
    await rebuilding.go()
    return rebuilding.conversation


class _Rebuilding:
    def __init__(self, history: Sequence[Turn], run: AgentRun, provider: str | None) -> None:
        self.conversation = Conversation()
        self._run = run
        self._provider = provider
        self._history = [turn for turn in history if turn.message_id != run.message_id]
        replies = [turn for turn in self._history if turn.role is Role.ASSISTANT]
        self._steps = {turn.message_id: steps_of(turn.chunks) for turn in replies}
        self._own = steps_of(run.reply.chunks) if run.reply is not None else []
        every = [step for steps in (*self._steps.values(), self._own) for step in steps]
        taken = {message_id for step in every for message_id in step.messages}
        self._steering = {turn.message_id: turn for turn in history if turn.message_id in taken}
        self._reserved = {call.id for step in self._own for call in step.calls}

    async def go(self) -> None:
        for turn in self._history:
            if turn.role is Role.ASSISTANT:
                for step in self._steps[turn.message_id]:
                    await self._add(step, is_own=False)
            elif turn.message_id not in self._steering and not self._is_yet_to_come(turn):
                self._ask([await prompt_of(turn, self._run.read_file)])
        for step in self._own:
            await self._add(step, is_own=True)

    def _is_yet_to_come(self, turn: Turn) -> bool:
        """Whether it steers this very reply, which has not taken it yet: its next look gives it."""
        if not turn.steers or self._run.reply is None:
            return False
        answered = [each.message_id for each in self._history if each.role is Role.USER and not each.steers]
        places = [each.message_id for each in self._history]
        return not answered or places.index(turn.message_id) > places.index(answered[-1])

    async def _add(self, step: LoggedStep, *, is_own: bool) -> None:
        for message_id in step.messages:
            if (turn := self._steering.get(message_id)) is not None:
                self._ask([await prompt_of(turn, self._run.read_file)])
        calls = [self._call(call, is_own=is_own) for call in step.calls]
        self._answer(parts_of(step, calls, self._provider, is_own=is_own))
        returns: list[ModelRequestPart] = []
        for call, logged in zip(calls, step.calls, strict=True):
            if is_own and logged.result is None and logged.id in self._run.approvals and step is self._own[-1]:
                self.conversation.open_calls[call.tool_call_id] = logged
            else:
                returns.append(_return_of(call, logged.result))
        if returns:
            self._ask(returns)

    def _call(self, call: LoggedCall, *, is_own: bool) -> ToolCallPart:
        edited = (call.result or {}).get("arguments")
        arguments = edited if isinstance(edited, Mapping) else call.arguments
        return ToolCallPart(call.name, dict(arguments), self._unique(call.id, is_own=is_own))

    def _unique(self, call_id: str, *, is_own: bool) -> str:
        """An id that no other call of the conversation has; those of the reply being written stay as they are."""
        taken = self.conversation.call_ids
        if not is_own:
            taken = taken | self._reserved if call_id in self._reserved else taken
        found, number = call_id, 2
        while found in taken:
            found, number = f"{call_id}-{number}", number + 1
        self.conversation.call_ids.add(found)
        return found

    def _ask(self, parts: list[ModelRequestPart]) -> None:
        messages = self.conversation.messages
        if messages and isinstance(messages[-1], ModelRequest):
            messages[-1].parts = [*messages[-1].parts, *parts]
        else:
            messages.append(ModelRequest(parts=parts))

    def _answer(self, parts: list[ModelResponsePart]) -> None:
        messages = self.conversation.messages
        if not parts:
            return
        if not messages:
            self._ask([UserPromptPart(LEFT_OUT)])
        if isinstance(messages[-1], ModelResponse):
            messages[-1].parts = [*messages[-1].parts, *parts]
        else:
            messages.append(ModelResponse(parts=parts))


def _return_of(call: ToolCallPart, result: Mapping[str, Any] | None) -> ToolReturnPart[Any]:
    """The result of a call as it was logged; where there is none, what is known instead."""
    status = "interrupted" if result is None else result.get("status")
    content = None if result is None else result.get("result")
    if content is None:
        content = _NOTES.get(str(status), _UNKNOWN)
    outcome = _OUTCOMES.get(str(status), "interrupted")
    return ToolReturnPart(call.tool_name, content, call.tool_call_id, outcome=outcome)

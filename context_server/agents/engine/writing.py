"""One reply in the writing: drives the library step by step, and says what happens as it happens.

A step is one request to the model and the tools that its response calls. Numbered deviations from how the library runs
by itself:

1. Before each step the context is looked at: its mode says which tools are offered, and what people have posted for
   the running reply is added to the request.
2. A call that needs an approval is not announced: it is added to the log with the request for it. When it was decided
   on, its result alone is.
3. What the model has used is estimated once a second while it answers, since nothing can be said after a
   cancellation. The provider's count takes the estimate's place when the answer is whole.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from pydantic_ai import UsageLimits
from pydantic_ai.agent import AbstractAgent, CallToolsNode, ModelRequestNode
from pydantic_ai.capabilities import ReinjectSystemPrompt
from pydantic_ai.exceptions import UserError
from pydantic_ai.messages import (
    AgentStreamEvent,
    FunctionToolCallEvent,
    FunctionToolResultEvent,
    ModelResponse,
    OutputToolCallEvent,
    PartDeltaEvent,
    PartStartEvent,
    TextPart,
    TextPartDelta,
    ThinkingPart,
    ThinkingPartDelta,
    ToolCallPart,
    ToolCallPartDelta,
    ToolReturnPart,
)
from pydantic_ai.models import Model
from pydantic_ai.run import AgentRun as LibraryRun
from pydantic_ai.settings import ModelSettings
from pydantic_ai.tools import DeferredToolRequests, DeferredToolResults
from pydantic_ai.toolsets import AbstractToolset
from pydantic_core import to_json
from pydantic_graph import End

from context_server.agents.engine.contents import contents_of
from context_server.agents.engine.decisions import decided, requests_of
from context_server.agents.engine.failures import cut_short, failure_of
from context_server.agents.engine.gate import Gate
from context_server.agents.engine.history import Conversation
from context_server.agents.engine.keepsakes import keepsake_of
from context_server.agents.engine.results import data_of, interrupted
from context_server.agents.engine.spending import Spending
from context_server.agents.engine.steps import FINISHED, STARTED, last_number
from context_server.agents.protocol import AgentFailed, AgentRun, Look, Yielded
from context_server.records import ChunkKind, Delta

ESTIMATE_SECONDS = 1.0
"""Between two estimates of what the model has used."""

Library = LibraryRun[Any, Any]
Pieces = AsyncGenerator[Yielded]


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What a reply is written with; ``model`` takes the place of the agent's own."""

    agent: AbstractAgent[Any, Any]
    model: Model | None = None
    toolsets: Sequence[AbstractToolset[Any]] = ()


@dataclass(slots=True)
class _Attempt:
    """What belongs to one run of the library."""

    library: Library
    gate: Gate
    spending: Spending = field(default_factory=Spending)


class Writing:
    """Writes one reply, in one attempt or several: until ``begun`` a failed one leaves nothing behind."""

    def __init__(self, means: Means, run: AgentRun, deps: Any) -> None:
        self._means = means
        self._run = run
        self._deps = deps
        earlier = run.reply.chunks if run.reply is not None else ()
        self._number = last_number(earlier)
        self.begun = any(chunk.kind is not ChunkKind.STEP for chunk in earlier)
        """Whether the reply holds anything that the model said or did."""
        self._look: Look | None = None
        self._clock = asyncio.get_running_loop().time
        self._open: dict[str, float] = {}  # Calls that the log has without a result, and since when they run.
        self._is_output_a_call = False

    async def attempt(self, conversation: Conversation) -> Pieces:
        """Everything from here to the reply's end, or to where it waits for approvals.

        Raises:
            ModelFailed: the model did.
            AgentFailed: a server of tools cannot be reached, or a tool is to be run elsewhere.
            Whatever else a tool or the agent raises.
        """
        self._open = dict.fromkeys(conversation.open_calls, self._clock())
        results = decided(conversation.open_calls, self._run.approvals) if conversation.open_calls else None
        gate = Gate(conversation.call_ids)
        async with AsyncExitStack() as stack:
            try:
                library = await stack.enter_async_context(self._begin(conversation, results, gate))
            except UserError:
                raise
            except Exception as error:
                if not self._means.toolsets:
                    raise
                raise AgentFailed("tools-unavailable", "A server of tools cannot be reached.") from error
            attempt = _Attempt(library, gate)
            node = library.next_node
            while not isinstance(node, End):
                if isinstance(node, ModelRequestNode):
                    async with aclosing(self._ask(attempt, node)) as pieces:
                        async for piece in pieces:
                            yield piece
                elif isinstance(node, CallToolsNode):
                    async with aclosing(self._call(attempt, node)) as pieces:
                        async for piece in pieces:
                            yield piece
                node = await library.next(node)
            usage = attempt.spending.so_far(library.usage)
        yield usage
        for piece in self._conclude(node.data.output, gate):
            yield piece

    def _begin(self, conversation: Conversation, results: DeferredToolResults | None, gate: Gate) -> Any:
        means = self._means
        return means.agent.iter(
            message_history=conversation.messages,
            deferred_tool_results=results,
            output_type=_output_type(means.agent),
            model=means.model,
            # Ours begin before the first word only; those of the SDK would multiply them.
            model_settings=None if means.model is None else ModelSettings(max_retries=0),
            instructions=gate.instructions,
            deps=self._deps,
            usage_limits=UsageLimits(request_limit=None),  # The server's own limits end a run.
            toolsets=means.toolsets or None,
            # The log holds no system prompts: they are the agent's, as it is now.
            capabilities=[gate, ReinjectSystemPrompt()],
            infer_name=False,
        )

    # A request to the model

    async def _ask(self, attempt: _Attempt, node: ModelRequestNode[Any, Any]) -> Pieces:
        if self._look is None:
            self._look = await self._run.look()
            self._number += 1
            yield Delta(ChunkKind.STEP, data=_started(self._number, self._look))
        attempt.gate.mode = self._look.mode
        for turn in self._look.steering:
            attempt.library.enqueue(*await contents_of(turn, self._run.read_file))
        counted = copy(attempt.library.usage)
        has_said = False
        # From here on something is used, also where nothing comes back, or the run is cancelled before it does.
        attempt.spending.ask([*attempt.library.all_messages(), node.request])
        yield attempt.spending.under_way(counted)
        try:
            async with aclosing(self._listen(attempt, node)) as pieces:
                async for piece in pieces:
                    self.begun = has_said = True
                    yield piece
            following = await attempt.library.next(node)
        except Exception as error:
            failure = failure_of(error, begun=has_said)
            if failure is None:
                raise
            yield attempt.spending.under_way(counted) if has_said else attempt.spending.turned_down(counted)
            raise failure from error
        if not isinstance(following, CallToolsNode):
            return  # A hook of the agent's own has turned the answer down.
        response = following.model_response
        yield attempt.spending.answered(attempt.library.usage, response)
        failure = cut_short(response, assumes_stop=_assumes_stop(attempt.library))
        if failure is not None:
            raise failure
        self._look = None
        yield Delta(ChunkKind.STEP, data=_finished(self._number, response))

    async def _listen(self, attempt: _Attempt, node: ModelRequestNode[Any, Any]) -> Pieces:
        """What the model says, as it arrives; calls are left to the next node, when they are whole."""
        spending, library, clock = attempt.spending, attempt.library, self._clock
        counted = copy(library.usage)
        due = clock()
        async with node.stream(library.ctx) as events:
            spending.ask(library.all_messages())
            async for event in events:
                kind, text = _heard(event)
                spending.answered_characters += len(text)
                if kind is None or not text:
                    continue
                yield Delta(kind, text)
                if clock() >= due:
                    due = clock() + ESTIMATE_SECONDS
                    yield spending.under_way(counted)

    # The tools that it calls

    async def _call(self, attempt: _Attempt, node: CallToolsNode[Any, Any]) -> Pieces:
        held: dict[str, ToolCallPart] = {}  # Calls that need an approval.
        try:
            async with node.stream(attempt.library.ctx) as events:
                async for event in events:
                    for delta in self._told(event, held, attempt.gate):
                        yield delta
        except Exception as error:
            for call_id, since in self._open.items():
                yield interrupted(call_id, self._clock() - since)
            self._open.clear()
            yield attempt.spending.so_far(attempt.library.usage)
            failure = failure_of(error, begun=True) if _is_of_the_model(error) else None
            if failure is None:
                raise
            raise failure from error

    def _told(self, event: AgentStreamEvent, held: dict[str, ToolCallPart], gate: Gate) -> Sequence[Delta]:
        match event:
            case FunctionToolCallEvent(part=call):
                if call.tool_call_id in self._open:  # It was decided on, and is in the log.
                    self._open[call.tool_call_id] = self._clock()
                elif event.args_valid and call.tool_name in gate.approved_tools:
                    held[call.tool_call_id] = call
                else:
                    return [self._announce(call)]
            case FunctionToolResultEvent(part=result):
                told = [self._announce(held.pop(result.tool_call_id))] if result.tool_call_id in held else []
                return [*told, self._result(result)]
            case OutputToolCallEvent():
                self._is_output_a_call = True
        return []

    def _announce(self, call: ToolCallPart) -> Delta:
        self.begun = True
        self._open[call.tool_call_id] = self._clock()
        data = {"id": call.tool_call_id, "name": call.tool_name, "arguments": call.args_as_dict()}
        return Delta(ChunkKind.TOOL_CALL, data=data)

    def _result(self, result: ToolReturnPart[Any]) -> Delta:
        now = self._clock()
        seconds = now - self._open.pop(result.tool_call_id, now)
        approval = self._run.approvals.get(result.tool_call_id)
        return Delta(ChunkKind.TOOL_RESULT, data=data_of(result, seconds, approval))

    # The end

    def _conclude(self, output: Any, gate: Gate) -> Sequence[Yielded]:
        if isinstance(output, DeferredToolRequests):
            return [requests_of(output, gate.editable_tools)]
        if self._is_output_a_call and not isinstance(output, str):
            return [Delta(ChunkKind.TEXT, to_json(output, serialize_unknown=True).decode())]
        if self._is_output_a_call and output:
            return [Delta(ChunkKind.TEXT, output)]
        return []


def _started(number: int, look: Look) -> Mapping[str, Any]:
    data: dict[str, Any] = {"number": number, "status": STARTED, "mode": look.mode.value}
    if look.steering:
        data["messages"] = [turn.message_id for turn in look.steering]
    return data


def _finished(number: int, response: ModelResponse) -> Mapping[str, Any]:
    data: dict[str, Any] = {"number": number, "status": FINISHED}
    if response.finish_reason not in (None, "stop", "tool_call"):
        data["reason"] = response.finish_reason
    if (kept := keepsake_of(response)) is not None:
        data["provider"] = kept
    return data


def _heard(event: AgentStreamEvent) -> tuple[ChunkKind | None, str]:
    """What the model has just said: text, reasoning, or the arguments of a call, which are told when they are whole."""
    if isinstance(event, PartDeltaEvent):
        match event.delta:
            case TextPartDelta(content_delta=text):
                return ChunkKind.TEXT, text
            case ThinkingPartDelta(content_delta=text):
                return ChunkKind.REASONING, text or ""
            case ToolCallPartDelta(args_delta=str(text)):
                return None, text
    elif isinstance(event, PartStartEvent):
        match event.part:
            case TextPart(content=text):
                return ChunkKind.TEXT, text
            case ThinkingPart(content=text):
                return ChunkKind.REASONING, text
    return None, ""


def _output_type(agent: AbstractAgent[Any, Any]) -> Any:
    """The agent's own, and requests for approval; None where the agent has them or takes no other type."""
    own = agent.output_type
    types = list(own) if isinstance(own, Sequence) else [own]
    if DeferredToolRequests in types or getattr(agent, "_output_validators", None):
        return None  # With validators the library refuses another type: the agent lists the requests itself.
    return [*types, DeferredToolRequests]


def _is_of_the_model(error: Exception) -> bool:
    """Whether it came of what the model answered; a tool may raise such errors too, which are the tool's own."""
    return type(error).__module__ == "pydantic_ai.exceptions" and type(error).__name__ in (
        "UnexpectedModelBehavior",
        "ContentFilterError",
        "OutputTokenLimitExceeded",
        "IncompleteToolCall",
    )


def _assumes_stop(library: Library) -> bool:
    """Whether the library takes a missing reason for the end of an answer for ``stop``, as of OpenAI's chat API."""
    chat = sys.modules.get("pydantic_ai.models.openai")
    model: Any = library.ctx.deps.model
    while (inner := getattr(model, "wrapped", None)) is not None:
        model = inner
    return chat is not None and isinstance(model, chat.OpenAIChatModel)

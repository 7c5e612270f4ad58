"""How the tests of the engine talk to it: turns by hand, a model that is a function, and what it was asked."""

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic_ai import Agent as LibraryAgent
from pydantic_ai.messages import ModelMessage, ModelRequest, ModelResponse, ToolCallPart, ToolReturnPart, UserPromptPart
from pydantic_ai.models.function import AgentInfo, DeltaThinkingPart, DeltaToolCall, FunctionModel

from context_server.agents import AgentRun
from context_server.agents.engine import EngineAgent
from context_server.agents.protocol import Yielded
from context_server.records import (
    Approval,
    ApprovalStatus,
    Chunk,
    ChunkKind,
    Delta,
    MessageStatus,
    Mode,
    Role,
    Suspend,
    Turn,
    Usage,
    arguments_digest,
    now,
)

RUN = AgentRun(run_id="run-1", context_id="context-1", message_id="reply-1", attempt=1, mode=Mode.ACT, metadata={})


def said(text: str, message_id: str = "message-1", **fields: Any) -> Turn:
    """A message of a person's."""
    chunks = (Chunk(1, ChunkKind.TEXT, text),) if text else ()
    return Turn(Role.USER, MessageStatus.COMPLETED, message_id, chunks, **fields)


def chunks_of(deltas: list[Delta]) -> tuple[Chunk, ...]:
    """As the log holds them."""
    return tuple(Chunk(number, each.kind, each.text, each.data) for number, each in enumerate(deltas, 1))


def replied(*deltas: Delta, message_id: str = "reply-0", status: MessageStatus = MessageStatus.COMPLETED) -> Turn:
    return Turn(Role.ASSISTANT, status, message_id, chunks_of(list(deltas)))


def text(content: str) -> Delta:
    return Delta(ChunkKind.TEXT, content)


def reasoning(content: str) -> Delta:
    return Delta(ChunkKind.REASONING, content)


def call(call_id: str, name: str = "look", **arguments: Any) -> Delta:
    return Delta(ChunkKind.TOOL_CALL, data={"id": call_id, "name": name, "arguments": arguments})


def result(call_id: str, content: Any = "seen", status: str = "ok") -> Delta:
    return Delta(ChunkKind.TOOL_RESULT, data={"id": call_id, "status": status, "result": content, "seconds": 0.1})


def started(number: int, *messages: str) -> Delta:
    return Delta(ChunkKind.STEP, data={"number": number, "status": "started", "messages": list(messages)})


def finished(number: int, **data: Any) -> Delta:
    return Delta(ChunkKind.STEP, data={"number": number, "status": "finished", **data})


def calling(name: str, arguments: str = "{}", call_id: str = "call_0", index: int = 1) -> dict[int, DeltaToolCall]:
    """What a model's function yields to call a tool."""
    return {index: DeltaToolCall(name=name, json_args=arguments, tool_call_id=call_id)}


def thinking(content: str, signature: str | None = None) -> dict[int, DeltaThinkingPart]:
    return {0: DeltaThinkingPart(content=content, signature=signature)}


Piece = str | dict[int, Any] | Exception


@dataclass
class Script:
    """A model that answers its requests by these pieces in turn, and keeps what it was asked."""

    answers: list[list[Piece]]
    asked: list[list[ModelMessage]] = field(default_factory=list)
    infos: list[AgentInfo] = field(default_factory=list)

    async def stream(self, messages: list[ModelMessage], info: AgentInfo) -> AsyncIterator[Any]:
        self.asked.append(list(messages))
        self.infos.append(info)
        for piece in self.answers[len(self.asked) - 1]:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    @property
    def model(self) -> FunctionModel:
        return FunctionModel(stream_function=self.stream)

    @property
    def offered(self) -> list[set[str]]:
        """The names of the tools that each request offered."""
        return [{tool.name for tool in info.function_tools} for info in self.infos]


def agent_of(script: Script, **options: Any) -> LibraryAgent[Any, Any]:
    return LibraryAgent(script.model, **options)


@dataclass
class Written:
    """What an agent has yielded, sorted."""

    everything: list[Yielded] = field(default_factory=list)

    @property
    def deltas(self) -> list[Delta]:
        return [each for each in self.everything if isinstance(each, Delta)]

    @property
    def text(self) -> str:
        return "".join(each.text or "" for each in self.deltas if each.kind is ChunkKind.TEXT)

    @property
    def usage(self) -> Usage:
        return [each for each in self.everything if isinstance(each, Usage)][-1]

    @property
    def usages(self) -> list[Usage]:
        return [each for each in self.everything if isinstance(each, Usage)]

    @property
    def suspend(self) -> Suspend:
        last = self.everything[-1]
        assert isinstance(last, Suspend)
        return last

    def data(self, kind: ChunkKind) -> list[Mapping[str, Any]]:
        return [each.data or {} for each in self.deltas if each.kind is kind]

    @property
    def shape(self) -> list[str]:
        """The kinds in their order, adjacent ones once; steps with their status."""
        names = [
            f"{each.kind} {each.data['status']}" if each.kind is ChunkKind.STEP and each.data else str(each.kind)
            for each in self.deltas
        ]
        return [name for place, name in enumerate(names) if place == 0 or names[place - 1] != name]


async def write(
    agent: LibraryAgent[Any, Any] | EngineAgent,
    *history: Turn,
    run: AgentRun = RUN,
    written: Written | None = None,
) -> Written:
    """Has the agent write a reply; what it yields before it raises is in ``written``."""
    engine = agent if isinstance(agent, EngineAgent) else EngineAgent(agent)
    written = written or Written()
    async for each in engine(history or (said("hello"),), run):
        written.everything.append(each)
    return written


def suspended(written: Written) -> Turn:
    """The reply as the log holds it after a suspension: the calls are added by the ledger."""
    asked = [
        Delta(ChunkKind.TOOL_CALL, data={"id": each.call_id, "name": each.tool, "arguments": each.arguments})
        for each in written.suspend.requests
    ]
    return Turn(Role.ASSISTANT, MessageStatus.STREAMING, RUN.message_id, chunks_of([*written.deltas, *asked]))


def decide(
    written: Written, decision: Callable[[str], ApprovalStatus] = lambda _: ApprovalStatus.APPROVED, **fields: Any
) -> AgentRun:
    """The run that goes on once all requests are decided on."""
    approvals = {
        each.call_id: Approval(
            **{
                "id": f"approval of {each.call_id}",
                "context_id": RUN.context_id,
                "message_id": RUN.message_id,
                "run_id": RUN.run_id,
                "call_id": each.call_id,
                "tool": each.tool,
                "arguments": each.arguments,
                "arguments_sha256": arguments_digest(each.arguments),
                "editable": each.editable,
                "status": decision(each.call_id),
                "edited_arguments": None,
                "note": None,
                "created_at": now(),
                "expires_at": now(),
                "decided_at": now(),
                **fields,
            }
        )
        for each in written.suspend.requests
    }
    return replace(RUN, attempt=2, reply=suspended(written), approvals=approvals)


def faults_of(messages: list[ModelMessage], open_calls: frozenset[str] = frozenset()) -> list[str]:
    """What a provider would refuse in a history: calls without one result after them, and the like."""
    faults = []
    if not messages or not isinstance(messages[0], ModelRequest):
        faults.append("it does not begin with a request")
    seen: set[str] = set()
    for place, message in enumerate(messages):
        if not message.parts:
            faults.append(f"message {place} is empty")
        if place and type(message) is type(messages[place - 1]):
            faults.append(f"messages {place - 1} and {place} are of one kind")
        if any(isinstance(part, UserPromptPart) and not part.content for part in message.parts):
            faults.append(f"message {place} has an empty prompt")
        if isinstance(message, ModelResponse):
            calls = [part.tool_call_id for part in message.parts if isinstance(part, ToolCallPart)]
            after = messages[place + 1].parts if place + 1 < len(messages) else ()
            results = [part.tool_call_id for part in after if isinstance(part, ToolReturnPart)]
            if sorted({*calls} - open_calls) != sorted(results):
                faults.append(f"message {place} calls {calls}, and {results} came back")
            if len({*calls}) != len(calls) or seen & {*calls}:
                faults.append(f"message {place} uses an id again")
            seen.update(calls)
        elif any(isinstance(part, ToolReturnPart) for part in message.parts) and place == 0:
            faults.append("it begins with a result")
    return faults

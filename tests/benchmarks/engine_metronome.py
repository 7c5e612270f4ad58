"""The metronome as a model of Pydantic AI: the same words on the same schedule, by the library's function model."""

from collections.abc import AsyncIterator, Sequence

from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessage, ModelRequest, UserPromptPart
from pydantic_ai.models.function import AgentInfo, FunctionModel

from context_server.agents import AgentRun
from context_server.agents.metronome import metronome
from context_server.records import Chunk, ChunkKind, MessageStatus, Mode, Role, Turn

_RUN = AgentRun(run_id="", context_id="", message_id="", attempt=1, mode=Mode.ACT, metadata={})


def _asked(messages: Sequence[ModelMessage]) -> str:
    requests = [message for message in messages if isinstance(message, ModelRequest)]
    prompts = [part for part in requests[-1].parts if isinstance(part, UserPromptPart)]
    return str(prompts[-1].content)


async def _words(messages: list[ModelMessage], _info: AgentInfo) -> AsyncIterator[str]:
    turn = Turn(Role.USER, MessageStatus.COMPLETED, "", (Chunk(1, ChunkKind.TEXT, _asked(messages)),))
    async for delta in metronome([turn], _RUN):
        yield delta.text or ""


agent = Agent(FunctionModel(stream_function=_words))

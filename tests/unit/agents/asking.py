"""How the tests talk to an agent without a server, and a clock that jumps, so that nothing waits for real time."""

import asyncio
import selectors
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from context_server.agents import Agent, AgentRun
from context_server.records import Chunk, ChunkKind, Delta, MessageStatus, Mode, Role, Turn

T = TypeVar("T")
RUN = AgentRun(run_id="run-1", context_id="context-1", message_id="reply-1", attempt=1, mode=Mode.ACT, metadata={})


class JumpingSelector(selectors.DefaultSelector):
    """Time passes only while every task sleeps, and then at once: to the moment when the next one is due."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(timeout if timeout is None else 0)
        if not ready and timeout:
            self.seconds += timeout
        return ready


class JumpingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.clock = JumpingSelector()
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.seconds

    def stall(self, seconds: float) -> None:
        """As if the process had not been scheduled for this long."""
        self.clock.seconds += seconds


def on_a_jumping_clock(scenario: Callable[[JumpingLoop], Coroutine[Any, Any, T]]) -> T:
    loop = JumpingLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(scenario(loop))


def ask(agent: Agent, text: str) -> AsyncIterator[Delta | str]:
    chunk = Chunk(1, ChunkKind.TEXT, text)
    return agent([Turn(Role.USER, MessageStatus.COMPLETED, "message-1", (chunk,))], RUN)


async def write(agent: Agent, text: str, written: list[Delta]) -> None:
    async for delta in ask(agent, text):
        assert isinstance(delta, Delta)
        written.append(delta)


async def reply(agent: Agent, text: str) -> list[Delta]:
    written: list[Delta] = []
    await write(agent, text, written)
    return written


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text or "" for delta in deltas if delta.kind is ChunkKind.TEXT)


def data_of(deltas: list[Delta], kind: ChunkKind) -> Any:
    (delta,) = (delta for delta in deltas if delta.kind is kind)
    return delta.data

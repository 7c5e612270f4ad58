"""How quickly the demo agent writes, and that it can be stopped at any moment."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from context_server.agents.demo import DemoAgent
from context_server.records import ChunkKind, Delta
from tests.unit.agents.asking import JumpingLoop, ask, data_of, on_a_jumping_clock, reply, text_of


def test_the_demo_agent_is_readable_and_a_long_answer_is_quicker(docs):
    async def seconds_and_words(loop: JumpingLoop, text: str) -> tuple[float, int]:
        begun = loop.time()
        deltas = await reply(DemoAgent(docs=docs), text)
        return loop.time() - begun, sum(delta.kind is ChunkKind.TEXT for delta in deltas)

    seconds, words = on_a_jumping_clock(lambda loop: seconds_and_words(loop, "How does the pull work?"))
    assert seconds == pytest.approx(0.4 + (words - 1) / 40, abs=0.01)
    seconds, words = on_a_jumping_clock(lambda loop: seconds_and_words(loop, "a long answer about the pull"))
    assert seconds == pytest.approx(0.4 + (words - 1) / 150, abs=0.01)


def test_between_the_tool_call_and_its_result_is_time_to_see_it(docs):
    async def scenario(loop: JumpingLoop) -> tuple[float, Any]:
        at: dict[ChunkKind, float] = {}
        deltas = []
        async for delta in ask(DemoAgent(docs=docs), "pull"):
            assert isinstance(delta, Delta)
            deltas.append(delta)
            at.setdefault(delta.kind, loop.time())
        return at[ChunkKind.TOOL_RESULT] - at[ChunkKind.TOOL_CALL], data_of(deltas, ChunkKind.TOOL_RESULT)

    seconds, result = on_a_jumping_clock(scenario)
    assert seconds == pytest.approx(0.4, abs=0.01)
    assert result["seconds"] == pytest.approx(seconds, abs=0.01)


@pytest.mark.parametrize("kind", [ChunkKind.REASONING, ChunkKind.TOOL_CALL, ChunkKind.TOOL_RESULT, ChunkKind.TEXT])
async def test_the_demo_agent_can_be_cancelled_after_any_kind_of_delta(docs, kind):
    agent = DemoAgent(tool_seconds=3600 if kind is ChunkKind.TOOL_CALL else 0, words_per_second=0.001, docs=docs)
    reached = asyncio.Event()

    async def consume() -> None:
        async for delta in ask(agent, "pull"):
            assert isinstance(delta, Delta)
            if delta.kind is kind:
                reached.set()

    task = asyncio.create_task(consume())
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    quick = DemoAgent(tool_seconds=0, words_per_second=1e6, docs=docs)
    assert text_of(await reply(quick, "pull")).startswith("**The pull**")


async def test_the_demo_agent_can_be_closed_in_mid_reply(quick):
    replies = ask(quick, "pull")
    async with aclosing(replies):  # type: ignore[type-var]  # Agents promise an iterator; ours are generators.
        assert await anext(replies) is not None
    with pytest.raises(StopAsyncIteration):
        await anext(replies)

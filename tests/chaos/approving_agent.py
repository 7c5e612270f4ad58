"""The agent of the approvals trial: reasoning, two tools, one of which needs a person, and 2,000 words.

What its tools do, and what is wrong with a history that its model is sent, it writes to ``journal.jsonl`` in the
working directory, line by line and unbuffered. The variable ``CONTEXT_SERVER_TRIAL_DEFECT`` takes a protection away,
for the negative controls: ``unasked`` (the tool asks nobody), ``twice`` (it runs twice), ``dangling`` (calls that never
ended have no result in the history).
"""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from typing import Any

from pydantic_ai import Agent, RunContext
from pydantic_ai.messages import ModelMessage, ModelRequest, ModelResponse, ToolCallPart, ToolReturnPart
from pydantic_ai.models.function import AgentInfo, DeltaThinkingPart, DeltaToolCall, FunctionModel

from context_server.agents import AgentRun

WORDS = 2000
JOURNAL = "journal.jsonl"
DEFECT = os.environ.get("CONTEXT_SERVER_TRIAL_DEFECT", "")
_WORDS_PER_SECOND = 1000


def _note(**fields: Any) -> None:
    line = json.dumps({**fields, "at_ms": time.time_ns() // 1_000_000}) + "\n"
    journal = os.open(JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(journal, line.encode())
    finally:
        os.close(journal)


def dangling(messages: list[ModelMessage]) -> list[str]:
    """The ids of calls that have not exactly one result in the request after them."""
    wrong = []
    for place, message in enumerate(messages):
        if not isinstance(message, ModelResponse):
            continue
        following = messages[place + 1] if place + 1 < len(messages) else ModelRequest(parts=[])
        answered = [part.tool_call_id for part in following.parts if isinstance(part, ToolReturnPart)]
        calls = [part.tool_call_id for part in message.parts if isinstance(part, ToolCallPart)]
        wrong += [call_id for call_id in calls if answered.count(call_id) != 1]
    return wrong


def _without_interrupted(messages: list[ModelMessage]) -> list[ModelMessage]:
    """The defect ``dangling``: as if nobody closed the calls that were cut short."""
    return [
        ModelRequest(
            parts=[
                part
                for part in message.parts
                if not (isinstance(part, ToolReturnPart) and part.outcome == "interrupted")
            ]
        )
        if isinstance(message, ModelRequest)
        else message
        for message in messages
    ]


async def _model(messages: list[ModelMessage], _info: AgentInfo) -> AsyncIterator[Any]:
    if DEFECT == "dangling":
        messages = _without_interrupted(messages)
    for call_id in dangling(messages):
        _note(what="dangling", call_id=call_id)
    last = messages[-1]
    results = [part.tool_name for part in last.parts if isinstance(part, ToolReturnPart)]
    if "send" in results:
        begun = time.monotonic()
        for number in range(WORDS):
            yield f"{number} "
            await asyncio.sleep(max(0.0, begun + number / _WORDS_PER_SECOND - time.monotonic()))
    elif "look_up" in results:
        yield {0: DeltaThinkingPart(content="It is to be sent. ")}
        await asyncio.sleep(0.02)
        yield {1: DeltaToolCall(name="send", json_args='{"text": "Hi"}', tool_call_id=f"send-{time.time_ns()}")}
    else:
        for word in ("I ", "look ", "that ", "up. "):
            yield {0: DeltaThinkingPart(content=word)}
            await asyncio.sleep(0.02)
        yield "Wait. "
        yield {1: DeltaToolCall(name="look_up", json_args='{"what": "ann"}', tool_call_id=f"look-{time.time_ns()}")}


agent = Agent(FunctionModel(stream_function=_model), deps_type=AgentRun)


@agent.tool
async def look_up(_ctx: RunContext[AgentRun], what: str) -> str:
    """Looks somebody up."""
    await asyncio.sleep(0.1)
    return f"{what}@example.org"


@agent.tool(requires_approval=DEFECT != "unasked")
async def send(ctx: RunContext[AgentRun], text: str) -> str:
    """Sends a message."""
    for _ in range(2 if DEFECT == "twice" else 1):
        _note(what="sent", context_id=ctx.deps.context_id, run_id=ctx.deps.run_id, call_id=ctx.tool_call_id)
        await asyncio.sleep(0.2)
    return "sent"

"""Replies by agents of Pydantic AI: what they do is told as it happens, step by step."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent as LibraryAgent
from pydantic_ai import ModelRetry, RunContext
from pydantic_ai.messages import BinaryContent, ModelRequest, SystemPromptPart, UserPromptPart
from pydantic_ai.models.test import TestModel
from pydantic_ai.toolsets import FunctionToolset

from context_server.agents import AgentFailed, AgentRun, Look
from context_server.agents.engine import EngineAgent
from context_server.agents.engine.gate import PLANNING
from context_server.records import ChunkKind, Delta, Mode, Usage
from tests.unit.agents.conversing import (
    RUN,
    Script,
    Written,
    agent_of,
    calling,
    faults_of,
    reasoning,
    replied,
    said,
    text,
    thinking,
    write,
)


def look(city: str = "Oslo") -> dict[str, Any]:
    return {"city": city, "celsius": 4}


def send(to: str) -> str:
    return f"sent to {to}"


@pytest.mark.scenario("agents", "An agent of the library")
async def test_text_reasoning_calls_and_results_are_told_in_their_order():
    script = Script([[thinking("hm"), "Let me ", "look.", calling("look", '{"city": "Rome"}', index=2)], ["Mild."]])
    agent = agent_of(script)
    agent.tool_plain(look)
    written = await write(agent)
    assert written.shape == [
        "step started",
        "reasoning",
        "text",
        "step finished",
        "tool_call",
        "tool_result",
        "step started",
        "text",
        "step finished",
    ]
    assert written.text == "Let me look.Mild."
    assert written.data(ChunkKind.TOOL_CALL) == [{"id": "call_0", "name": "look", "arguments": {"city": "Rome"}}]
    (result,) = written.data(ChunkKind.TOOL_RESULT)
    assert (result["id"], result["status"], result["result"]) == ("call_0", "ok", {"city": "Rome", "celsius": 4})
    assert 0 <= result["seconds"] < 60
    assert [each["number"] for each in written.data(ChunkKind.STEP)] == [1, 1, 2, 2]
    assert [each.get("mode") for each in written.data(ChunkKind.STEP)] == ["act", None, "act", None]


async def test_text_is_told_while_the_model_still_speaks():
    go_on = asyncio.Event()

    async def stream(_messages, _info):
        yield "first "
        await go_on.wait()
        yield "second"

    from pydantic_ai.models.function import FunctionModel

    written: list[Any] = []
    async for each in EngineAgent(LibraryAgent(FunctionModel(stream_function=stream)))([said("hello")], RUN):
        written.append(each)
        go_on.set() if text("first ") in written else None
    assert [each.text for each in written if isinstance(each, Delta) and each.text] == ["first ", "second"]


async def test_a_call_is_told_when_it_is_made_and_its_result_when_it_is_there():
    go_on = asyncio.Event()
    script = Script([[calling("wait")], ["ok"]])
    agent = agent_of(script)

    @agent.tool_plain
    async def wait() -> str:
        await go_on.wait()
        return "waited"

    kinds = []
    async for each in EngineAgent(agent)([said("hello")], RUN):
        if isinstance(each, Delta):
            kinds.append(each.kind)
            if each.kind is ChunkKind.TOOL_CALL:
                go_on.set()
    assert kinds.index(ChunkKind.TOOL_CALL) < kinds.index(ChunkKind.TOOL_RESULT)


async def test_ids_that_a_model_uses_again_are_told_apart():
    script = Script([[{1: calling("look")[1], 2: calling("look")[1]}], [calling("look")], ["ok"]])
    agent = agent_of(script)
    agent.tool_plain(look)
    written = await write(agent)
    ids = [each["id"] for each in written.data(ChunkKind.TOOL_CALL)]
    assert ids == ["call_0", "call_0-2", "call_0-3"]
    assert sorted(each["id"] for each in written.data(ChunkKind.TOOL_RESULT)) == ids
    assert faults_of(script.asked[-1]) == []


async def test_ids_of_earlier_replies_are_not_used_again():
    script = Script([[calling("look")], ["ok"], [calling("look")], ["ok"]])
    agent = agent_of(script)
    agent.tool_plain(look)
    first = await write(agent)
    second = await write(agent, said("hello"), replied(*first.deltas), said("again", "message-2"))
    assert second.data(ChunkKind.TOOL_CALL)[0]["id"] == "call_0-2"
    assert faults_of(script.asked[-1]) == []


@pytest.mark.parametrize(
    ("arguments", "status"), [('{"city": "Oslo"}', "ok"), ('{"city": 7}', "error"), ("rubbish", "error")]
)
async def test_a_result_says_whether_the_tool_could_be_run(arguments, status):
    script = Script([[calling("look", arguments)], ["ok"]])
    agent = agent_of(script)
    agent.tool_plain(look)
    written = await write(agent)
    assert written.data(ChunkKind.TOOL_RESULT)[0]["status"] == status
    assert written.text == "ok"


async def test_a_tool_that_asks_for_another_try_has_failed_in_the_log():
    script = Script([[calling("fussy")], ["ok"]])
    agent = agent_of(script)

    @agent.tool_plain
    def fussy() -> str:
        raise ModelRetry("not like this")

    (result,) = (await write(agent)).data(ChunkKind.TOOL_RESULT)
    assert (result["status"], result["result"]) == ("error", "not like this")


async def test_a_tool_that_raises_ends_the_reply_with_its_own_error_and_no_open_call():
    script = Script([[{1: calling("broken")[1], 2: calling("slow", call_id="call_1")[1]}]])
    agent = agent_of(script)

    @agent.tool_plain
    def broken() -> str:
        raise ZeroDivisionError

    @agent.tool_plain
    async def slow() -> str:
        await asyncio.Event().wait()
        return ""

    written = Written()
    with pytest.raises(ZeroDivisionError):
        await write(agent, written=written)
    results = written.data(ChunkKind.TOOL_RESULT)
    assert {each["id"]: each["status"] for each in results} == {"call_0": "interrupted", "call_1": "interrupted"}


async def test_files_that_a_tool_gives_are_named_in_the_log():
    script = Script([[calling("draw")], ["ok"]])
    agent = agent_of(script)

    @agent.tool_plain
    def draw() -> list[Any]:
        return ["here", BinaryContent(b"\x89PNG", media_type="image/png")]

    (result,) = (await write(agent)).data(ChunkKind.TOOL_RESULT)
    assert result["result"] == ["here", "[a file of the type image/png]"]


async def test_an_output_that_is_no_text_is_told_as_json():
    class Weather(BaseModel):
        city: str
        celsius: int

    script = Script([[calling("final_result", '{"city": "Oslo", "celsius": 4}')]])
    assert (await write(agent_of(script, output_type=Weather))).text == '{"city":"Oslo","celsius":4}'


async def test_the_librarys_own_test_model_replies():
    agent = LibraryAgent(TestModel(custom_output_text="All fine."))
    agent.tool_plain(look)
    written = await write(agent)
    assert written.text == "All fine."
    assert written.data(ChunkKind.TOOL_CALL)[0]["name"] == "look"


async def test_the_agents_own_prompts_are_given_in_each_turn():
    script = Script([["ok"], ["ok"]])
    agent = agent_of(script, system_prompt="Be brief.", instructions="Be kind.")
    await write(agent)
    await write(agent, said("hello"), replied(text("hi")), said("again", "message-2"))
    for asked, info in zip(script.asked, script.infos, strict=True):
        assert isinstance(asked[0], ModelRequest)
        assert [part.content for part in asked[0].parts if isinstance(part, SystemPromptPart)] == ["Be brief."]
        assert info.instructions == "Be kind."


async def test_tools_find_the_run_or_what_is_made_of_it():
    script = Script([[calling("where")], ["ok"], [calling("where")], ["ok"]])
    agent = agent_of(script)

    @agent.tool
    def where(ctx: RunContext[Any]) -> str:
        return ctx.deps.context_id if isinstance(ctx.deps, AgentRun) else ctx.deps

    assert (await write(agent)).data(ChunkKind.TOOL_RESULT)[0]["result"] == "context-1"
    made = EngineAgent(agent, deps=lambda run: f"made for {run.run_id}")
    assert (await write(made)).data(ChunkKind.TOOL_RESULT)[0]["result"] == "made for run-1"


# Signed reasoning


async def test_what_a_provider_wants_back_is_kept_with_the_step():
    script = Script([[thinking("hm", "SIGNED"), "ok"]])
    written = await write(agent_of(script))
    kept = written.data(ChunkKind.STEP)[1]["provider"]
    assert kept["parts"][0] == {"kind": "thinking", "characters": 2, "signature": "SIGNED"}
    assert reasoning("hm") in written.deltas


# Modes and steering


@pytest.mark.scenario("agents", "Plan mode")
async def test_in_plan_mode_only_tools_that_change_nothing_are_offered():
    script = Script([[calling("send", '{"to": "me"}')], ["I would send it."]])
    agent = agent_of(script)
    agent.tool_plain(metadata={"read_only": True})(look)
    sent: list[str] = []
    agent.tool_plain(name="send")(lambda to: sent.append(to))
    written = await write(agent, run=replace(RUN, mode=Mode.PLAN))
    assert script.offered == [{"look"}, {"look"}]
    assert script.infos[0].instructions == PLANNING
    assert sent == []
    assert written.data(ChunkKind.TOOL_RESULT)[0]["status"] == "error"
    assert written.data(ChunkKind.STEP)[0]["mode"] == "plan"


async def test_tools_of_mcp_servers_are_offered_by_their_hint():
    from pydantic_ai.tools import ToolDefinition

    from context_server.agents.engine.gate import is_read_only

    assert is_read_only(ToolDefinition(name="a", metadata={"annotations": {"readOnlyHint": True}}))
    assert not is_read_only(ToolDefinition(name="b", metadata={"annotations": {"readOnlyHint": None}}))
    assert not is_read_only(ToolDefinition(name="c", metadata={"annotations": None}))
    assert not is_read_only(ToolDefinition(name="d"))


@pytest.mark.scenario("agents", "Steering and a mode that changes")
async def test_a_changed_mode_and_posted_messages_apply_to_the_next_step():
    looks = iter([Look(mode=Mode.ACT), Look(mode=Mode.PLAN, steering=[said("in French", "s1")])])

    async def look_up() -> Look:
        return next(looks)

    script = Script([[calling("look")], ["Oui."]])
    agent = agent_of(script)
    agent.tool_plain(metadata={"read_only": True})(look)
    agent.tool_plain(send)
    written = await write(agent, run=replace(RUN, look_up=look_up))
    assert script.offered == [{"look", "send"}, {"look"}]
    prompts = [part.content for each in script.asked[1] for part in each.parts if isinstance(part, UserPromptPart)]
    assert prompts == ["hello", "in French"]
    begun = [each for each in written.data(ChunkKind.STEP) if each["status"] == "started"]
    assert [(each["mode"], each.get("messages")) for each in begun] == [("act", None), ("plan", ["s1"])]


# Usage


@pytest.mark.scenario("agents", "Usage")
async def test_usage_counts_requests_tokens_and_calls():
    script = Script([[calling("look")], ["one two three"]])
    agent = agent_of(script)
    agent.tool_plain(look)
    written = await write(agent)
    assert (written.usage.requests, written.usage.tool_calls, written.usage.estimated) == (2, 1, False)
    assert written.usage.input_tokens > 0
    assert written.usage.output_tokens > 0


async def test_usage_is_estimated_while_the_model_speaks_so_that_a_cancellation_finds_some():
    script = Script([["word " * 100, asyncio.CancelledError()]])  # type: ignore[list-item]
    engine = EngineAgent(agent_of(script))
    written = Written()
    pieces = engine([said("x" * 400)], RUN)
    async for each in pieces:
        written.everything.append(each)
        if len(written.usages) == 2:  # One as it is asked, one as it speaks.
            break
    await pieces.aclose()
    assert written.usages[0] == Usage(input_tokens=100, output_tokens=0, requests=1, tool_calls=0, estimated=True)
    assert written.usage == Usage(input_tokens=100, output_tokens=125, requests=1, tool_calls=0, estimated=True)


# Cancelling


@pytest.mark.scenario("agents", "Cancelling")
@pytest.mark.parametrize("where", ["model", "tool"])
async def test_a_cancelled_reply_stops_the_model_or_the_tool(where):
    stopped, waiting = asyncio.Event(), asyncio.Event()

    async def wait() -> str:
        waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
        return ""

    async def stream(_messages, _info):
        if where == "tool":
            yield calling("wait")
        else:
            yield "begun "
            yield await wait()

    from pydantic_ai.models.function import FunctionModel

    agent = LibraryAgent(FunctionModel(stream_function=stream))
    agent.tool_plain(wait)
    task = asyncio.create_task(write(agent))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stopped.is_set()


# What goes wrong


async def test_a_model_that_calls_a_tool_wrongly_again_and_again_is_of_no_use():
    script = Script([[calling("look", "rubbish")]] * 3)
    agent = agent_of(script)
    agent.tool_plain(look)
    written = Written()
    with pytest.raises(AgentFailed) as failure:
        await write(agent, written=written)
    assert failure.value.code == "model-malformed"
    calls = [each["id"] for each in written.data(ChunkKind.TOOL_CALL)]
    assert [each["id"] for each in written.data(ChunkKind.TOOL_RESULT)] == calls


async def test_an_agent_that_checks_its_output_has_it_checked():
    script = Script([["short"], ["long enough"]])
    agent = agent_of(script)

    @agent.output_validator
    def check(output: str) -> str:
        if len(output) < 8:
            raise ModelRetry("longer, please")
        return output

    written = await write(agent)
    assert written.text == "shortlong enough"
    assert len(script.asked) == 2


async def test_servers_of_tools_that_cannot_be_reached_are_said_to_be_away():
    class Away(FunctionToolset[Any]):
        async def __aenter__(self) -> Any:
            raise ConnectionRefusedError

    with pytest.raises(AgentFailed) as failure:
        await write(EngineAgent(agent_of(Script([])), toolsets=[Away()]))
    assert failure.value.code == "tools-unavailable"


async def test_an_error_of_the_agents_own_code_stays_what_it_is():
    script = Script([])
    agent = agent_of(script)

    @agent.instructions
    def broken() -> str:
        raise KeyError("mine")

    with pytest.raises(KeyError):
        await write(agent)

"""The bounds of a run: each ends it as failed with a code of its own, and what it wrote is kept."""

import asyncio

import pytest

from context_server.agents import AgentFailed
from context_server.records import (
    ApprovalRequest,
    ApprovalStatus,
    ChunkKind,
    Delta,
    MessageStatus,
    Outcome,
    Suspend,
    Usage,
)
from context_server.store.approvals import Decision
from tests.unit.rooms import OWNER, open_rooms, run_limits, until

FOREVER = 3600


def step(number: int, **more) -> Delta:
    return Delta(ChunkKind.STEP, data={"number": number, **more})


async def failed(rooms, receipt) -> tuple[str, str]:
    """The code and the text of a reply, which must have failed."""
    message = await rooms.ended(receipt)
    assert message.status is MessageStatus.FAILED
    await rooms.quiet()
    assert rooms.metric("runs_ended_total", outcome=Outcome.FAILED, code=message.error.code) >= 1
    return message.error.code, message.content


async def test_a_run_that_takes_too_long_fails(tmp_path):
    async def agent(_history, _run):
        yield "one"
        while True:
            await asyncio.sleep(0.01)
            yield "."

    async with open_rooms(tmp_path, agent, run=run_limits(max_seconds=0.3)) as rooms:
        code, content = await failed(rooms, await rooms.post())
        assert (code, content[:4]) == ("run-too-long", "one.")


async def test_a_silent_agent_fails(tmp_path):
    async def agent(_history, _run):
        yield "one"
        await asyncio.sleep(FOREVER)

    async with open_rooms(tmp_path, agent, run=run_limits(max_silence=0.1)) as rooms:
        assert await failed(rooms, await rooms.post()) == ("model-silent", "one")


async def test_an_agent_that_never_begins_to_speak_is_silent_too(tmp_path):
    async def agent(_history, _run):
        await asyncio.sleep(FOREVER)
        yield "one"

    async with open_rooms(tmp_path, agent, run=run_limits(max_silence=0.1)) as rooms:
        assert await failed(rooms, await rooms.post()) == ("model-silent", "")


async def test_while_a_tool_runs_the_silence_is_not_the_models(tmp_path):
    """The tool takes several times the bound; the model's own silence afterwards ends the run."""

    async def agent(_history, _run):
        yield Delta(ChunkKind.TOOL_CALL, data={"id": "1", "name": "slow", "arguments": {}})
        await asyncio.sleep(0.5)
        yield Delta(ChunkKind.TOOL_RESULT, data={"id": "1", "status": "ok", "result": 7})
        yield "after"
        await asyncio.sleep(FOREVER)

    async with open_rooms(tmp_path, agent, run=run_limits(max_silence=0.1)) as rooms:
        assert await failed(rooms, await rooms.post()) == ("model-silent", "after")


async def test_an_agent_that_speaks_often_enough_may_go_on(tmp_path):
    async def agent(_history, _run):
        for _ in range(20):
            await asyncio.sleep(0.02)
            yield "."

    async with open_rooms(tmp_path, agent, run=run_limits(max_silence=5, max_seconds=60)) as rooms:
        message = await rooms.ended(await rooms.post())
        assert (message.status, message.content) == (MessageStatus.COMPLETED, "." * 20)


async def test_a_call_that_is_open_when_a_bound_ends_the_run_gets_a_result(tmp_path):
    async def agent(_history, _run):
        yield "one"
        yield Delta(ChunkKind.TOOL_CALL, data={"id": "1", "name": "slow", "arguments": {}})
        await asyncio.sleep(FOREVER)

    async with open_rooms(tmp_path, agent, run=run_limits(max_seconds=0.1)) as rooms:
        receipt = await rooms.post()
        assert await failed(rooms, receipt) == ("run-too-long", "one")
        page = await rooms.store.page(OWNER, receipt.context_id, receipt.reply_message_id)
        last = page.chunks[-1]
        assert (last.kind, last.data["id"], last.data["status"]) == (ChunkKind.TOOL_RESULT, "1", "interrupted")


async def test_a_step_too_many_fails_the_run_and_is_not_written(tmp_path):
    async def agent(_history, _run):
        for number in range(1, 10):
            yield step(number)
            yield f"{number} "
            yield step(number, status="finished")

    async with open_rooms(tmp_path, agent, run=run_limits(max_steps=3)) as rooms:
        assert await failed(rooms, await rooms.post()) == ("too-many-steps", "1 2 3 ")


async def test_steps_before_a_suspension_count(tmp_path):
    async def agent(_history, run):
        if run.attempt == 1:
            yield step(1)
            yield step(2)
            yield Suspend((ApprovalRequest(call_id="c", tool="pay", arguments={}),))
        yield step(3)
        yield "three "
        yield step(4)

    async with open_rooms(tmp_path, agent, run=run_limits(max_steps=3)) as rooms:
        receipt = await rooms.post()

        async def asks() -> bool:
            return bool(await rooms.store.suspension.approvals(OWNER, receipt.context_id, only_pending=True))

        await until(asks)
        (approval,) = await rooms.store.suspension.approvals(OWNER, receipt.context_id, only_pending=True)
        decision = Decision(status=ApprovalStatus.APPROVED)
        await rooms.commands.decide(OWNER, receipt.context_id, approval.id, decision, if_match=None)
        assert await failed(rooms, receipt) == ("too-many-steps", "three ")


@pytest.mark.parametrize("used", [Usage(input_tokens=101), Usage(output_tokens=60, input_tokens=41)])
async def test_tokens_too_many_fail_the_run_and_are_recorded(tmp_path, used):
    async def agent(_history, _run):
        yield Usage(input_tokens=100)
        yield "one"
        yield used
        yield "two"

    async with open_rooms(tmp_path, agent, run=run_limits(max_tokens=100)) as rooms:
        receipt = await rooms.post()
        assert await failed(rooms, receipt) == ("too-many-tokens", "one")
        usage = (await rooms.message(receipt)).usage
        assert usage["input_tokens"] + usage["output_tokens"] == 101


async def test_without_bounds_a_run_takes_what_it_needs(tmp_path):
    async def agent(_history, _run):
        for number in range(200):
            yield step(number)
        yield Usage(input_tokens=10**9)
        yield "done"

    async with open_rooms(tmp_path, agent) as rooms:
        assert (await rooms.ended(await rooms.post())).content == "done"


async def test_an_agent_names_its_own_failure(tmp_path):
    async def agent(_history, _run):
        yield "half"
        yield Usage(output_tokens=3, estimated=True)
        raise AgentFailed("model-overloaded", "The model's server is overloaded.")

    async with open_rooms(tmp_path, agent) as rooms:
        receipt = await rooms.post()
        assert await failed(rooms, receipt) == ("model-overloaded", "half")
        message = await rooms.message(receipt)
        assert message.error.detail == "The model's server is overloaded."
        assert message.usage["output_tokens"] == 3


async def test_a_timeout_of_the_agents_own_is_no_bound(tmp_path):
    async def agent(_history, _run):
        yield "half"
        raise TimeoutError

    async with open_rooms(tmp_path, agent, run=run_limits(max_seconds=FOREVER, max_silence=FOREVER)) as rooms:
        assert await failed(rooms, await rooms.post()) == ("agent-error", "half")


async def test_usage_of_a_cancelled_run_is_recorded(tmp_path):
    used, never = asyncio.Event(), asyncio.Event()

    async def agent(_history, _run):
        yield Usage(input_tokens=7, requests=1)
        yield "one"
        used.set()
        await never.wait()

    async with open_rooms(tmp_path, agent) as rooms:
        receipt = await rooms.post()
        await used.wait()
        await rooms.commands.cancel(OWNER, receipt.context_id, if_match=None, once=None)
        message = await rooms.ended(receipt)
        assert (message.status, message.usage["input_tokens"]) == (MessageStatus.CANCELLED, 7)


async def test_usage_alone_is_stored_before_the_end(tmp_path):
    never = asyncio.Event()

    async def agent(_history, _run):
        yield Usage(input_tokens=7)
        await never.wait()

    async with open_rooms(tmp_path, agent) as rooms:
        receipt = await rooms.post()

        async def is_stored() -> bool:
            return (await rooms.message(receipt)).usage is not None

        await until(is_stored)
        assert (await rooms.message(receipt)).usage["input_tokens"] == 7

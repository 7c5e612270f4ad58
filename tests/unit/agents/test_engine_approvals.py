"""Calls that need an approval: what a person is asked, and what becomes of the call once it was decided on."""

from dataclasses import replace
from typing import Any

import pytest
from pydantic_ai import Agent as LibraryAgent
from pydantic_ai import RunContext
from pydantic_ai.exceptions import ApprovalRequired, CallDeferred

from context_server.agents import AgentFailed
from context_server.records import ApprovalStatus, ChunkKind, Delta, Mode
from tests.unit.agents.conversing import Script, agent_of, calling, decide, faults_of, replied, said, write


def look() -> str:
    return "seen"


def send(to: str) -> str:
    return f"sent to {to}"


def approving_agent(script: Script, **metadata: Any) -> LibraryAgent[Any, Any]:
    agent = agent_of(script)
    agent.tool_plain(look)
    agent.tool_plain(requires_approval=True, metadata=metadata)(send)
    return agent


ASKING = [{1: calling("look")[1], 2: calling("send", '{"to": "me"}', "call_1")[1]}]


@pytest.mark.scenario("agents", "A tool that needs an approval")
async def test_a_call_that_needs_an_approval_suspends_the_run_untold():
    written = await write(approving_agent(Script([ASKING]), editable_arguments=True))
    assert [each["name"] for each in written.data(ChunkKind.TOOL_CALL)] == ["look"]
    (request,) = written.suspend.requests
    assert (request.call_id, request.tool, request.arguments, request.editable) == (
        "call_1",
        "send",
        {"to": "me"},
        True,
    )


@pytest.mark.scenario("agents", "An approved call")
async def test_an_approved_call_runs_once_and_only_its_result_is_told():
    script = Script([ASKING, ["Sent."]])
    agent = approving_agent(script)
    first = await write(agent)
    second = await write(agent, said("hello"), run=decide(first))
    assert second.shape == ["tool_result", "step started", "text", "step finished"]
    (result,) = second.data(ChunkKind.TOOL_RESULT)
    assert (result["id"], result["status"], result["result"]) == ("call_1", "ok", "sent to me")
    assert second.data(ChunkKind.STEP)[0]["number"] == 2
    assert faults_of(script.asked[1]) == []


@pytest.mark.scenario("agents", "A denied call")
@pytest.mark.parametrize(
    ("status", "told"),
    [
        (ApprovalStatus.DENIED, "denied"),
        (ApprovalStatus.EXPIRED, "expired"),
        (ApprovalStatus.CANCELLED, "denied"),
    ],
)
async def test_a_call_that_was_not_approved_is_not_run_and_the_model_is_told_why(status, told):
    script = Script([ASKING, ["Then not."]])
    agent = approving_agent(script)
    first = await write(agent)
    second = await write(agent, run=decide(first, lambda _: status, note="too early"))
    (result,) = second.data(ChunkKind.TOOL_RESULT)
    assert (result["id"], result["status"]) == ("call_1", told)
    assert result["result"].endswith("The person says: too early")
    assert second.text == "Then not."


async def test_one_call_is_approved_and_another_denied():
    both = [
        {1: calling("send", '{"to": "a"}', "call_1")[1], 2: calling("send", '{"to": "b"}', "call_2")[1]},
    ]
    script = Script([both, ["Done."]])
    agent = approving_agent(script)
    first = await write(agent)
    decisions = {"call_1": ApprovalStatus.DENIED, "call_2": ApprovalStatus.APPROVED}
    second = await write(agent, run=decide(first, decisions.__getitem__))
    results = {each["id"]: each["status"] for each in second.data(ChunkKind.TOOL_RESULT)}
    assert results == {"call_1": "denied", "call_2": "ok"}


@pytest.mark.scenario("agents", "Edited arguments")
async def test_edited_arguments_are_what_the_tool_gets_and_what_the_history_shows():
    script = Script([ASKING, ["Sent."], ["ok"]])
    agent = approving_agent(script)
    first = await write(agent)
    run = decide(first, edited_arguments={"to": "her"})
    second = await write(agent, run=run)
    (result,) = second.data(ChunkKind.TOOL_RESULT)
    assert (result["result"], result["arguments"]) == ("sent to her", {"to": "her"})
    assert run.reply is not None
    whole = replied(*[Delta(each.kind, each.text, each.data) for each in run.reply.chunks], *second.deltas)
    await write(agent, said("hello"), whole, said("more", "message-2"))
    (call,) = [part for each in script.asked[2] for part in each.parts if getattr(part, "args", None) == {"to": "her"}]
    assert call.tool_name == "send"


async def test_a_log_with_other_arguments_than_those_approved_runs_nothing():
    script = Script([ASKING, ["ok"]])
    agent = approving_agent(script)
    first = await write(agent)
    second = await write(agent, run=decide(first, arguments_sha256="0" * 64))
    (result,) = second.data(ChunkKind.TOOL_RESULT)
    assert result["status"] == "denied"
    assert "not those that were approved" in result["result"]


async def test_an_approved_call_runs_although_the_mode_has_changed_to_plan():
    script = Script([ASKING, ["Sent."]])
    agent = approving_agent(script)
    first = await write(agent)
    second = await write(agent, run=replace(decide(first), mode=Mode.PLAN))
    assert second.data(ChunkKind.TOOL_RESULT)[0]["status"] == "ok"
    assert script.offered[1] == set()


async def test_a_tool_that_finds_out_by_itself_that_it_needs_an_approval():
    script = Script([[calling("pay", '{"euros": 500}')], ["Paid."]])
    agent = agent_of(script)

    @agent.tool
    def pay(ctx: RunContext[Any], euros: int) -> str:
        if euros > 100 and not ctx.tool_call_approved:
            raise ApprovalRequired
        return "paid"

    first = await write(agent)
    assert [each.call_id for each in first.suspend.requests] == ["call_0"]
    second = await write(agent, run=decide(first))
    assert [each["result"] for each in second.data(ChunkKind.TOOL_RESULT)] == ["paid"]
    assert faults_of(script.asked[1]) == []


async def test_approvals_follow_one_another():
    script = Script([ASKING, [calling("send", '{"to": "you"}', "call_1")], ["Done."]])
    agent = approving_agent(script)
    first = await write(agent)
    run = decide(first)
    second = await write(agent, run=run)
    (request,) = second.suspend.requests
    assert request.call_id == "call_1-2"
    assert second.data(ChunkKind.STEP)[-1]["number"] == 2


async def test_arguments_that_do_not_fit_are_not_asked_about():
    script = Script([[calling("send", '{"to": 7}')], ["ok"]])
    written = await write(approving_agent(script))
    assert written.shape[2:4] == ["tool_call", "tool_result"]
    assert written.data(ChunkKind.TOOL_RESULT)[0]["status"] == "error"
    assert written.text == "ok"


async def test_a_tool_that_somebody_else_should_run_is_refused():
    script = Script([[calling("elsewhere")]])
    agent = agent_of(script)

    @agent.tool_plain
    def elsewhere() -> str:
        raise CallDeferred

    with pytest.raises(AgentFailed) as failure:
        await write(agent)
    assert failure.value.code == "tool-not-supported"

"""What a workflow's function sees when it is called again, and what the log holds of its steps."""

import asyncio
import json
import threading
from itertools import groupby
from typing import Any

import pytest

from context_server.agents import AgentFailed, CallFailed, Denied, Flow, Workflows
from context_server.agents.driving import AgentExited
from context_server.records import ApprovalRequest, ApprovalStatus, ChunkKind, Delta, Suspend, Usage
from tests.unit.agents.playing import Play, agree, echo, message, play, starting

FEW = Usage(input_tokens=1, output_tokens=10, requests=1)


# Steps that fail


@pytest.mark.parametrize("needs_approval", [True, False])
@pytest.mark.scenario("workflows", "A step that fails is over")
async def test_a_call_that_failed_is_not_made_again(needs_approval: bool) -> None:
    booms, causes = [], []

    async def boom() -> None:
        booms.append(1)
        raise ZeroDivisionError

    async def work(flow: Flow) -> None:
        try:
            await flow.call(boom, needs_approval=needs_approval)
        except CallFailed as error:
            causes.append((error.name, type(error.__cause__)))
        await flow.call(agree, needs_approval=True)
        await flow.say("done")

    played = await play(work)
    assert booms == [1]
    assert causes == [("boom", ZeroDivisionError), ("boom", type(None))]
    assert played.outcomes == [("boom", "error"), ("agree", "ok"), ("say", "ok")]
    assert played.text == "done"


@pytest.mark.parametrize("raised", [AgentFailed("model-cut", "The answer was cut."), ValueError("secret")])
@pytest.mark.scenario("workflows", "A prompt that fails is over")
async def test_a_prompt_that_failed_is_not_asked_again(raised: Exception) -> None:
    asked, caught = [], []

    async def failing(history, run):
        asked.append(history[-1].text)
        yield FEW
        yield "begun"
        yield Delta(ChunkKind.TOOL_CALL, data={"id": "left", "name": "look", "arguments": {}})
        raise raised

    async def work(flow: Flow) -> None:
        try:
            await flow.prompt("go")
        except AgentFailed as error:
            caught.append((error.code, error.detail))
        except CallFailed as error:
            caught.append(error.name)
        await flow.call(agree, needs_approval=True)

    played = await play(work, failing)
    assert asked == ["go"]
    assert len(caught) == 2
    assert caught[0] == caught[1]
    assert played.outcomes == [("prompt", "error"), ("agree", "ok")]
    assert "secret" not in json.dumps([chunk.data for chunk in played.chunks])
    results = {chunk.data["id"]: chunk.data["status"] for chunk in played.chunks if chunk.kind is ChunkKind.TOOL_RESULT}
    assert results == {"left": "interrupted", "step-2": "ok"}


async def test_a_denied_step_is_denied_again() -> None:
    notes = []

    async def work(flow: Flow) -> None:
        try:
            await flow.call(agree, needs_approval=True)
        except Denied as denied:
            notes.append(denied.note)
        await flow.prompt("what now?")
        try:
            await flow.call(agree, needs_approval=True, name="again")
        except Denied as denied:
            notes.append(denied.note)

    workflows = Workflows(echo)
    workflows.workflow(work)
    played = Play(workflows, starting("work"))
    await played.to_the_end(ApprovalStatus.DENIED)
    assert notes == ["no", "no", "no"]
    assert played.endings[0] == {
        "number": 1,
        "status": "finished",
        "name": "agree",
        "workflow": "work",
        "outcome": "denied",
        "note": "no",
    }


async def test_a_result_may_look_like_a_denial_or_a_failure() -> None:
    found = []

    async def look_up() -> dict[str, str]:
        return {"denied": "the visa", "outcome": "error", "code": "x"}

    async def work(flow: Flow) -> None:
        found.append(await flow.call(look_up))
        await flow.call(agree, needs_approval=True)

    await play(work)
    assert found == [{"denied": "the visa", "outcome": "error", "code": "x"}] * 2


async def test_a_result_is_the_same_before_and_after_a_suspension() -> None:
    found = []

    async def pair() -> dict[int, Any]:
        return {1: (2, float("nan"))}

    async def work(flow: Flow) -> None:
        found.append(await flow.call(pair))
        await flow.call(agree, needs_approval=True)

    await play(work)
    assert found == [{"1": [2, None]}] * 2


async def test_a_result_that_is_no_json_is_a_failure_of_the_call() -> None:
    async def thing() -> object:
        return object()

    async def work(flow: Flow) -> None:
        with pytest.raises(CallFailed):
            await flow.call(thing)
        await flow.say("went on")

    assert (await play(work)).outcomes == [("thing", "error"), ("say", "ok")]


async def test_a_failure_that_nobody_caught_is_what_it_was() -> None:
    async def boom() -> None:
        raise ZeroDivisionError

    async def coded() -> None:
        raise AgentFailed("out-of-paper", "Fill in paper.")

    async def work(flow: Flow, is_coded: bool) -> None:
        await flow.call(coded if is_coded else boom)

    with pytest.raises(ZeroDivisionError):
        await play(work, is_coded=False)
    with pytest.raises(AgentFailed, match="Fill in paper"):
        await play(work, is_coded=True)


@pytest.mark.parametrize("where", ["in the function", "in a call", "in a thread"])
async def test_a_workflow_does_not_end_the_process(where: str) -> None:
    async def leave() -> None:
        raise SystemExit

    def leave_plainly() -> None:
        raise SystemExit

    async def work(flow: Flow) -> None:
        match where:
            case "in a call":
                await flow.call(leave)
            case "in a thread":
                await flow.call(leave_plainly)
        raise SystemExit

    with pytest.raises(AgentExited):
        await play(work)


# One step at a time


async def test_steps_at_once_are_refused_and_the_reply_fails() -> None:
    made, stopped = [], []

    async def wait(number: int) -> None:
        made.append(number)
        try:
            await asyncio.Event().wait()
        finally:
            stopped.append(number)

    async def work(flow: Flow) -> None:
        await asyncio.gather(flow.call(wait, number=1), flow.call(wait, number=2))

    with pytest.raises(RuntimeError, match="one step at a time"):
        await play(work)
    assert made == stopped == [1]


async def test_steps_at_once_are_refused_also_where_the_function_hides_it() -> None:
    async def work(flow: Flow) -> None:
        await asyncio.gather(flow.call(agree), flow.say("too"), return_exceptions=True)

    with pytest.raises(RuntimeError, match="one step at a time"):
        await play(work)


async def test_a_step_that_was_cut_off_is_the_last() -> None:
    async def work(flow: Flow) -> None:
        begun = asyncio.Event()

        async def hang() -> None:
            begun.set()
            await asyncio.Event().wait()

        step = asyncio.ensure_future(flow.call(hang))
        await begun.wait()
        step.cancel()
        await asyncio.gather(step, return_exceptions=True)
        await flow.call(agree, needs_approval=True)

    with pytest.raises(RuntimeError, match="one step at a time"):
        await play(work)


async def test_a_step_that_nobody_awaits_fails_the_reply() -> None:
    steps: list[asyncio.Future[Any]] = []

    async def work(flow: Flow) -> None:
        begun = asyncio.Event()

        async def hang() -> None:
            begun.set()
            await asyncio.Event().wait()

        steps.append(asyncio.ensure_future(flow.call(hang)))
        await begun.wait()

    with pytest.raises(RuntimeError, match="await each"):
        await play(work)
    assert steps[0].cancelled()


async def test_other_steps_than_before_end_the_reply_whatever_the_function_catches() -> None:
    names = ["first", "other"]

    async def work(flow: Flow) -> None:
        try:
            await flow.call(agree, name=names.pop(0))
        except Exception:
            await flow.say("caught")
        await flow.call(agree, needs_approval=True)

    with pytest.raises(AgentFailed) as failed:
        await play(work)
    assert failed.value.code == "workflow-changed"


# Functions


async def test_a_plain_function_may_block() -> None:
    threads = []

    def block(turn: threading.Event) -> bool:
        threads.append(threading.current_thread())
        return turn.wait(10)

    async def work(flow: Flow) -> None:
        turn = threading.Event()
        asyncio.get_running_loop().call_later(0.01, turn.set)  # Which the loop does only while it is not blocked.
        assert await flow.call(lambda: block(turn), name="block")

    await play(work)
    assert threads != [threading.main_thread()]


async def test_a_plain_function_may_return_what_is_awaited_and_raise_anything() -> None:
    def stop() -> None:
        raise StopIteration

    async def work(flow: Flow) -> None:
        assert await flow.call(lambda: agree(), name="later") == "agreed"
        with pytest.raises(CallFailed):
            await flow.call(stop)

    assert (await play(work)).outcomes == [("later", "ok"), ("stop", "error")]


# Prompts


async def pondering(history, run):
    """Reasons, answers, asks, and goes on by what it has said itself."""
    if run.reply is None:
        yield Delta(ChunkKind.REASONING, "hmm ")
        yield "let me "
        yield "see: "
        yield Delta(ChunkKind.REASONING, "aha ")
        yield FEW
        yield Suspend((request("ask-1"),))
        return
    textual = [chunk for chunk in run.reply.chunks if chunk.kind.is_textual]
    told = [(kind.value, "".join(c.text for c in chunks)) for kind, chunks in groupby(textual, lambda each: each.kind)]
    yield Delta(ChunkKind.TOOL_RESULT, data={"id": open_call(run), "status": "ok", "result": None, "seconds": 0})
    if len(told) < 4:
        yield Delta(ChunkKind.REASONING, "so ")
        yield "nearly "
        yield Suspend((request("ask-2"),))
        return
    yield json.dumps(told)


def request(call_id: str) -> ApprovalRequest:
    return ApprovalRequest(call_id=call_id, tool="ask", arguments={})


def open_call(run: Any) -> str:
    ids = [chunk.data["id"] for chunk in run.reply.chunks if chunk.kind is ChunkKind.TOOL_CALL]
    return ids[-1]


@pytest.mark.parametrize("is_shown", [True, False])
@pytest.mark.scenario("workflows", "An answer that is not shown")
async def test_an_answer_is_told_from_reasoning_also_after_suspensions(is_shown: bool) -> None:
    answers = []

    async def work(flow: Flow) -> None:
        answers.append(await flow.prompt("ponder", is_shown=is_shown))
        await flow.call(agree, needs_approval=True)

    played = await play(work, pondering)
    assert answers[0] == answers[1]
    assert answers[0].startswith("let me see: nearly [")
    said = json.loads(answers[0].removeprefix("let me see: nearly "))
    assert said == [
        ["reasoning", "hmm "],
        ["text", "let me see: "],
        ["reasoning", "aha so "],
        ["text", "nearly "],
    ]
    assert played.text == (answers[0] if is_shown else "")
    assert is_shown or played.reasoning.startswith("hmm let me see: aha so nearly ")
    assert played.endings[0]["result"] == answers[0]


async def test_the_usage_of_a_failed_prompt_counts() -> None:
    async def failing_once(history, run):
        yield FEW
        if history[-1].text == "fail":
            raise AgentFailed("model-cut", "The answer was cut.")
        yield "fine"

    async def work(flow: Flow) -> None:
        with pytest.raises(AgentFailed):
            await flow.prompt("fail")
        await flow.prompt("go")

    played = await play(work, failing_once)
    assert played.usage == Usage(input_tokens=2, output_tokens=20, requests=2)


async def test_an_agent_may_be_any_async_iterator() -> None:
    class Once:
        def __init__(self) -> None:
            self._left = ["one ", "two"]

        def __aiter__(self):
            return self

        async def __anext__(self):
            if not self._left:
                raise StopAsyncIteration
            return self._left.pop(0)

    async def work(flow: Flow) -> None:
        assert await flow.prompt("count") == "one two"

    agent = lambda history, run: Once()  # noqa: E731
    assert (await play(work, agent)).text == "one two"
    played = Play(Workflows(agent), message("hello"))
    await played.to_the_end()
    assert played.text == "one two"

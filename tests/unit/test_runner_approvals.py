"""Runs that stop for a person's decision: suspended, gone on with, stopped meanwhile, and steered."""

import asyncio
import hashlib
from datetime import timedelta

import pytest

from context_server import runner as runner_module
from context_server.agents import Look
from context_server.records import (
    ApprovalRequest,
    ApprovalStatus,
    ChunkKind,
    Delta,
    IfBusy,
    MessageStatus,
    Mode,
    State,
    StateChanged,
    Suspend,
    Usage,
)
from context_server.store.approvals import EXPIRED, Decision
from context_server.store.exchanges import Post
from tests.databases import run_beside
from tests.unit.rooms import OWNER, ledger_limits, open_rooms, until

APPROVE = Decision(status=ApprovalStatus.APPROVED)


def ask(number: int = 1, **options) -> ApprovalRequest:
    return ApprovalRequest(call_id=f"call-{number}", tool="pay", arguments={"amount": number}, **options)


def result(number: int = 1) -> Delta:
    data = {"id": f"call-{number}", "status": "ok", "result": None, "seconds": 0.0}
    return Delta(ChunkKind.TOOL_RESULT, data=data)


class Asking:
    """An agent that asks for approval of as many calls, and goes on by what was decided; it knows what it was given."""

    def __init__(self, *requests: ApprovalRequest, times: int = 1) -> None:
        self.requests = requests or (ask(),)
        self.times = times
        self.runs = []
        self.closed = 0

    async def __call__(self, history, run):
        self.runs.append(run)
        try:
            yield f"Part {run.attempt}, é. "
            yield Usage(input_tokens=10, output_tokens=1, requests=1, estimated=run.attempt == 1)
            for call_id, approval in run.approvals.items():
                if run.reply is not None and approval.call_id not in self._results(run):
                    yield Delta(ChunkKind.TOOL_RESULT, data={"id": call_id, "status": str(approval.status)})
            if run.attempt <= self.times:
                yield Suspend(tuple(self.requests))
                yield "never"
        finally:
            self.closed += 1

    def _results(self, run):
        return {chunk.data["id"] for chunk in run.reply.chunks if chunk.kind is ChunkKind.TOOL_RESULT}


async def pending(rooms, context_id):
    return await rooms.store.suspension.approvals(OWNER, context_id, only_pending=True)


async def state_of(rooms, context_id) -> State:
    return (await rooms.store.context(OWNER, context_id)).state


async def asked(rooms, context_id):
    """The approvals that wait, once the run is suspended."""

    async def waits() -> bool:
        return await state_of(rooms, context_id) is State.AWAITING_APPROVAL

    await until(waits)
    return await pending(rooms, context_id)


async def decide(rooms, approval, decision=APPROVE):
    return await rooms.commands.decide(OWNER, approval.context_id, approval.id, decision, if_match=None)


@pytest.mark.scenario("approvals", "Text keeps its digest")
async def test_a_suspended_run_goes_on_in_one_log_with_one_digest_and_all_usage(tmp_path):
    agent = Asking()
    async with open_rooms(tmp_path, agent) as rooms:
        receipt = await rooms.post()
        (approval,) = await asked(rooms, receipt.context_id)
        await rooms.quiet()
        assert rooms.ledger._held == {}  # Nothing of it is left in memory.
        assert agent.closed == 1
        assert (approval.call_id, approval.arguments) == ("call-1", {"amount": 1})
        assert rooms.hub.heads(OWNER, [receipt.context_id]) == [(receipt.context_id, receipt.reply_message_id, 2)]

        await decide(rooms, approval)

        message = await rooms.ended(receipt)
        text = "Part 1, é. Part 2, é. "
        assert (message.status, message.content) == (MessageStatus.COMPLETED, text)
        assert message.digest == hashlib.sha256(text.encode()).hexdigest()
        assert message.usage == {
            "input_tokens": 20, "output_tokens": 2, "requests": 2, "tool_calls": 0, "estimated": True,
        }  # fmt: skip
        first, second = agent.runs
        assert (first.reply, first.approvals, first.run_id) == (None, {}, second.run_id)
        assert second.reply.text == "Part 1, é. "
        assert second.approvals["call-1"].status is ApprovalStatus.APPROVED
        page = await rooms.store.page(OWNER, receipt.context_id, receipt.reply_message_id)
        assert [chunk.sequence for chunk in page.chunks] == [1, 2, 3, 4]
        assert [chunk.kind for chunk in page.chunks] == [
            ChunkKind.TEXT, ChunkKind.TOOL_CALL, ChunkKind.TEXT, ChunkKind.TOOL_RESULT,
        ]  # fmt: skip


async def test_what_an_agent_would_yield_after_a_suspension_is_never_asked_for(tmp_path):
    agent = Asking()
    async with open_rooms(tmp_path, agent) as rooms:
        receipt = await rooms.post()
        await asked(rooms, receipt.context_id)
        assert "never" not in (await rooms.message(receipt)).content
        assert agent.closed == 1


async def test_a_run_is_suspended_as_often_as_it_asks(tmp_path):
    agent = Asking(times=3)
    async with open_rooms(tmp_path, agent) as rooms:
        receipt = await rooms.post()
        for number in (1, 2, 3):
            agent.requests = (ask(number + 1),)
            (approval,) = await asked(rooms, receipt.context_id)
            await decide(rooms, approval)
        message = await rooms.ended(receipt)
        assert message.content == "".join(f"Part {number}, é. " for number in (1, 2, 3, 4))
        assert message.usage["requests"] == 4
        assert len(agent.runs[-1].approvals) == 3


@pytest.mark.scenario("approvals", "A subscriber is told")
async def test_subscribers_are_told_of_the_states_of_a_suspension(tmp_path):
    async with open_rooms(tmp_path, Asking()) as rooms:
        context = await rooms.store.create_context(OWNER)
        with rooms.hub.subscribe(OWNER, [context.id]) as mailbox:
            seen = []

            async def until_state(state: State) -> None:
                while state not in seen:
                    await mailbox.wait(None)
                    seen.extend(each.new_state for each in mailbox.take()[0] if isinstance(each, StateChanged))

            async with asyncio.timeout(60):
                receipt = await rooms.post(context_id=context.id)
                await until_state(State.AWAITING_APPROVAL)
                (approval,) = await pending(rooms, context.id)
                await decide(rooms, approval)
                await until_state(State.IDLE)
        assert (await rooms.message(receipt)).status is MessageStatus.COMPLETED


@pytest.mark.scenario("approvals", "A restart changes nothing")
async def test_the_next_process_goes_on_with_a_suspended_run(tmp_path):
    async with open_rooms(tmp_path, Asking()) as rooms:
        receipt = await rooms.post()
        (approval,) = await asked(rooms, receipt.context_id)
    async with open_rooms(tmp_path, Asking()) as rooms:
        assert rooms.hub.heads(OWNER, [receipt.context_id]) == [(receipt.context_id, receipt.reply_message_id, 2)]
        await decide(rooms, approval)
        assert (await rooms.ended(receipt)).content == "Part 1, é. Part 2, é. "


async def test_a_run_that_is_told_to_stop_as_it_asks_is_cancelled_and_leaves_no_open_call(tmp_path):
    """The cancel is committed before the suspension: the run is still its own, and ends."""
    reached, go = asyncio.Event(), asyncio.Event()

    async def agent(_history, _run):
        yield "one "
        reached.set()
        await go.wait()
        yield Suspend((ask(), ask(2)))

    async with open_rooms(tmp_path, agent) as rooms:
        receipt = await rooms.post()
        await reached.wait()
        await rooms.store.request_cancel(OWNER, receipt.context_id)  # Beside the commands: the runner is not told.
        go.set()
        message = await rooms.ended(receipt)
        await rooms.quiet()
        assert (message.status, message.content) == (MessageStatus.CANCELLED, "one ")
        assert await state_of(rooms, receipt.context_id) is State.IDLE
        assert await rooms.store.suspension.approvals(OWNER, receipt.context_id, only_pending=False) == []
        page = await rooms.store.page(OWNER, receipt.context_id, receipt.reply_message_id)
        data = [(chunk.kind, chunk.data["id"]) for chunk in page.chunks if chunk.data]
        calls = [call_id for kind, call_id in data if kind is ChunkKind.TOOL_CALL]
        assert [call_id for kind, call_id in data if kind is ChunkKind.TOOL_RESULT] == calls
        assert {chunk.data["status"] for chunk in page.chunks if chunk.kind is ChunkKind.TOOL_RESULT} <= {"cancelled"}


async def test_a_run_that_was_cancelled_while_it_waited_is_over(tmp_path):
    agent = Asking()
    async with open_rooms(tmp_path, agent) as rooms:
        receipt = await rooms.post()
        await asked(rooms, receipt.context_id)
        await rooms.commands.cancel(OWNER, receipt.context_id, if_match=None, once=None)
        message = await rooms.message(receipt)
        assert (message.status, message.usage["requests"]) == (MessageStatus.CANCELLED, 1)
        assert rooms.hub.heads(OWNER, [receipt.context_id]) == []
        following = await rooms.post(context_id=receipt.context_id)
        await asked(rooms, following.context_id)
        assert len(agent.runs) == 2


@pytest.mark.scenario("approvals", "Nobody decides in time")
async def test_the_sweep_ends_what_nobody_decided_on_and_what_waits_has_its_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(runner_module, "_SWEEP_SECONDS", 0.02)
    async with open_rooms(tmp_path, Asking(), ledger=ledger_limits(approval_lifetime=0.0)) as rooms:
        context = await rooms.store.create_context(OWNER)
        receipt = await rooms.post(context_id=context.id)
        message = await rooms.ended(receipt)
        assert (message.status, message.error) == (MessageStatus.CANCELLED, EXPIRED)
        assert rooms.metric("runs_ended_total", outcome="stopped", code="approval-expired") == 1


async def test_a_hundred_runs_wait_a_day_without_a_task(tmp_path):
    async with open_rooms(tmp_path, Asking()) as rooms:
        before = len(asyncio.all_tasks())
        receipts = [await rooms.post() for _ in range(100)]
        approvals = [(await asked(rooms, receipt.context_id))[0] for receipt in receipts]
        await rooms.quiet()
        assert len(asyncio.all_tasks()) <= before
        assert rooms.ledger._held == {}
        day_ms = int(timedelta(days=1).total_seconds() * 1000)
        run_beside(
            f"sqlite:///{tmp_path / 'context-server.db'}",
            f"UPDATE approvals SET created_at = created_at - {day_ms}, expires_at = expires_at - {day_ms}",
        )
        await rooms.runner._expire_approvals()
        for approval in approvals:
            await decide(rooms, approval)
        for receipt in receipts:
            assert (await rooms.ended(receipt)).status is MessageStatus.COMPLETED


@pytest.mark.parametrize(
    "suspend",
    [
        Suspend(()),
        Suspend((ask(), ask())),
        Suspend(("pay",)),
        Suspend((ApprovalRequest(call_id="c", tool="t", arguments=[1]),)),
        Suspend((ApprovalRequest(call_id="c", tool="t", arguments={"when": object()}),)),
    ],
    ids=["of nothing", "of one id twice", "of no request", "no object", "no JSON"],
)
async def test_a_suspension_that_nobody_could_decide_on_fails_the_run(tmp_path, suspend):
    async def agent(_history, _run):
        yield "one"
        yield suspend

    async with open_rooms(tmp_path, agent) as rooms:
        message = await rooms.ended(await rooms.post())
        assert (message.error.code, message.content) == ("agent-error", "one")


async def test_the_state_of_a_run_that_goes_on_says_which_tool_is_called(tmp_path):
    went_on, go = asyncio.Event(), asyncio.Event()

    async def agent(_history, run):
        if run.attempt == 1:
            yield Suspend((ask(),))
        went_on.set()
        await go.wait()
        yield result()

    async with open_rooms(tmp_path, agent) as rooms:
        receipt = await rooms.post()
        (approval,) = await asked(rooms, receipt.context_id)
        await decide(rooms, approval)
        await went_on.wait()

        async def calls() -> bool:
            return await state_of(rooms, receipt.context_id) is State.CALLING_TOOL

        await until(calls)
        assert (await rooms.store.context(OWNER, receipt.context_id)).active_run.tool == "pay"
        go.set()
        await rooms.ended(receipt)


# What is said to a run meanwhile


@pytest.mark.scenario("when-busy", "Steered")
async def test_an_agent_looks_at_what_was_posted_for_it_and_at_the_mode(tmp_path):
    reached, go = asyncio.Event(), asyncio.Event()
    looks: list[Look] = []

    async def agent(_history, run):
        yield "one"
        reached.set()
        await go.wait()
        looks.extend([await run.look(), await run.look()])

    async with open_rooms(tmp_path, agent) as rooms:
        receipt = await rooms.post()
        await reached.wait()
        post = Post(text="left", if_busy=IfBusy.STEER)
        steered = await rooms.commands.post_message(OWNER, receipt.context_id, post, if_match=None, once=None)
        await rooms.commands.change_context(OWNER, receipt.context_id, {"mode": Mode.PLAN}, if_match=None)
        go.set()
        await rooms.ended(receipt)
    first, second = looks
    assert (first.mode, [turn.message_id for turn in first.steering]) == (Mode.PLAN, [steered.message_id])
    assert (second.mode, second.steering) == (Mode.PLAN, ())


@pytest.mark.scenario("when-busy", "Steered too late")
async def test_what_came_too_late_is_run_without_a_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(runner_module, "_SWEEP_SECONDS", 3600)
    reached, go = asyncio.Event(), asyncio.Event()

    async def agent(history, _run):
        reached.set()
        await go.wait()
        yield f"to {history[-1].text}"

    async with open_rooms(tmp_path, agent) as rooms:
        receipt = await rooms.post()
        await reached.wait()
        for text, if_busy in (("later", IfBusy.QUEUE), ("left", IfBusy.STEER)):
            post = Post(text=text, if_busy=if_busy)
            await rooms.commands.post_message(OWNER, receipt.context_id, post, if_match=None, once=None)
        go.set()

        async def is_idle() -> bool:
            return await state_of(rooms, receipt.context_id) is State.IDLE

        await until(is_idle)
        found, _ = await rooms.store.messages(OWNER, receipt.context_id, include_content=True)
        assert [each.content for each in found] == ["Hello", "to Hello", "left", "to left", "later", "to later"]


async def test_a_message_that_is_taken_back_is_in_no_heartbeat_any_more(tmp_path):
    go = asyncio.Event()

    async def agent(_history, _run):
        await go.wait()
        yield "one"

    async with open_rooms(tmp_path, agent) as rooms:
        receipt = await rooms.post()
        post = Post(text="And?", if_busy=IfBusy.QUEUE)
        waits = await rooms.commands.post_message(OWNER, receipt.context_id, post, if_match=None, once=None)
        open_ids = {message_id for _, message_id, _ in rooms.hub.heads(OWNER, [receipt.context_id])}
        assert open_ids == {receipt.reply_message_id, waits.reply_message_id}
        await rooms.commands.remove_waiting(OWNER, receipt.context_id, waits.message_id, if_match=None)
        open_ids = {message_id for _, message_id, _ in rooms.hub.heads(OWNER, [receipt.context_id])}
        assert open_ids == {receipt.reply_message_id}
        go.set()
        await rooms.ended(receipt)


async def test_an_agent_without_files_is_told_that_there_are_none(tmp_path):
    async def agent(_history, run):
        try:
            await run.read_file("x")
        except FileNotFoundError:
            yield "none"

    async with open_rooms(tmp_path, agent) as rooms:
        assert (await rooms.ended(await rooms.post())).content == "none"

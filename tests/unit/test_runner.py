"""The runner: runs and their states, cancelling, deleting, and how many are on at once."""

import asyncio

import pytest

from context_server import runner as runner_module
from context_server.records import (
    ChunkKind,
    ContextChanged,
    ContextDeleted,
    Delta,
    MessageCompleted,
    MessageStatus,
    Role,
    State,
    StateChanged,
)
from tests.unit.gate import gate_rooms
from tests.unit.rooms import OWNER, ledger_limits, open_rooms, runner_limits

FOREVER = 3600


async def state_of(rooms, receipt) -> State:
    return (await rooms.store.context(OWNER, receipt.context_id)).state


@pytest.mark.scenario("runs", "Agent of one's own")
async def test_an_agent_is_given_the_history_and_its_reply_is_written(tmp_path):
    async def count(history, run):
        assert history[-1].role is Role.USER
        yield f"{len(history)}: "
        yield Delta(ChunkKind.TEXT, history[-1].text)

    async with open_rooms(tmp_path, count) as rooms:
        first = await rooms.post("one")
        assert (await rooms.ended(first)).content == "1: one"
        second = await rooms.post("two", context_id=first.context_id)
        assert (await rooms.ended(second)).content == "3: two"
        await rooms.quiet()
        assert rooms.metric("runs_ended_total", outcome="succeeded", code="") == 2


async def test_an_agent_may_be_an_iterator_that_cannot_be_closed(tmp_path):
    class Words:
        def __init__(self) -> None:
            self.words = iter(["a", "b"])

        def __aiter__(self):
            return self

        async def __anext__(self):
            word = next(self.words, None)
            if word is None:
                raise StopAsyncIteration
            return word

    async with open_rooms(tmp_path, lambda _history, _run: Words()) as rooms:
        assert (await rooms.ended(await rooms.post())).content == "ab"


@pytest.mark.scenario("runs", "States of a reply")
async def test_subscribers_are_told_of_each_state(tmp_path):
    gate = asyncio.Event()

    async def with_tool(_history, _run):
        for step in (Delta(ChunkKind.TOOL_CALL, data={"id": "1"}), Delta(ChunkKind.TOOL_RESULT, data={"id": "1"}), "a"):
            await gate.wait()
            gate.clear()
            yield step

    async with open_rooms(tmp_path, with_tool) as rooms:
        context = await rooms.store.create_context(OWNER)
        seen = []
        with rooms.hub.subscribe(OWNER, [context.id]) as mailbox:
            await rooms.post(context_id=context.id)
            while not seen or seen[-1].new_state is not State.IDLE:
                await mailbox.wait(None)
                states = [signal for signal in mailbox.take()[0] if isinstance(signal, StateChanged)]
                seen += states
                # The next step only once this state was seen: an unsent state is replaced by a newer one.
                if states and seen[-1].new_state is not State.QUEUED:
                    gate.set()
        assert [signal.new_state for signal in seen] in (
            ["queued", "thinking", "calling_tool", "thinking", "streaming", "idle"],
            ["thinking", "calling_tool", "thinking", "streaming", "idle"],
        )
        assert [signal.version for signal in seen] == [*range(8 - len(seen), 8)]


async def test_as_many_runs_are_on_as_are_allowed(tmp_path):
    async with gate_rooms(tmp_path, runner=runner_limits(max_active_runs=2)) as (rooms, gate):
        receipts = [await rooms.post() for _ in range(4)]
        await gate.has_begun(2)
        assert await rooms.store.active_runs() == {"queued": 2, "running": 2}
        assert rooms.metric("active_runs") == 2
        gate.open.set()
        for receipt in receipts:
            assert (await rooms.ended(receipt)).content == "word end"


async def test_more_runs_than_one_claim_takes_are_all_claimed(tmp_path, monkeypatch):
    monkeypatch.setattr(runner_module, "_CLAIM_LIMIT", 3)
    monkeypatch.setattr(runner_module, "_SWEEP_SECONDS", FOREVER)
    async with open_rooms(tmp_path) as rooms:
        for _ in range(10):
            await rooms.post()
    async with gate_rooms(tmp_path) as (_, gate):
        await gate.has_begun(10)


# Cancel, delete, change


@pytest.mark.scenario("runs", "Cancel a running reply")
async def test_a_cancelled_reply_keeps_what_it_has(tmp_path):
    async with gate_rooms(tmp_path) as (rooms, gate):
        receipt = await rooms.post()
        await gate.has_begun()
        context = await rooms.commands.cancel(OWNER, receipt.context_id, if_match=None, once=None)
        assert context.state is State.CANCELLING
        message = await rooms.ended(receipt)
        assert message.status is MessageStatus.CANCELLED
        assert message.content in ("", "word ")
        assert gate.stopped == [receipt.run_id]
        assert await state_of(rooms, receipt) is State.IDLE
        await rooms.quiet()
        assert rooms.metric("runs_ended_total", outcome="stopped", code="") == 1


@pytest.mark.scenario("runs", "Cancel a queued run")
async def test_a_queued_run_is_cancelled_before_it_begins(tmp_path):
    async with gate_rooms(tmp_path, runner=runner_limits(max_active_runs=1)) as (rooms, gate):
        running, queued = await rooms.post(), await rooms.post()
        await gate.has_begun()
        with rooms.hub.subscribe(OWNER, [queued.context_id]) as mailbox:
            context = await rooms.commands.cancel(OWNER, queued.context_id, if_match=None, once=None)
            completed, changed = mailbox.take()[0]
        assert context.state is State.IDLE
        assert isinstance(completed, MessageCompleted)
        assert (completed.message_id, completed.final_sequence, completed.status) == (
            queued.reply_message_id,
            0,
            MessageStatus.CANCELLED,
        )
        assert (changed.new_state, changed.version) == (State.IDLE, context.version)
        again = await rooms.commands.cancel(OWNER, queued.context_id, if_match=None, once=None)
        assert again == context
        gate.open.set()
        assert (await rooms.ended(running)).status is MessageStatus.COMPLETED
        assert gate.begun == [running.run_id]


@pytest.mark.scenario("runs", "Delete in mid-reply")
async def test_deleting_a_context_stops_its_agent(tmp_path):
    async with gate_rooms(tmp_path) as (rooms, gate):
        receipt, idle = await rooms.post(), await rooms.store.create_context(OWNER)
        await gate.has_begun()
        with rooms.hub.subscribe(OWNER, [receipt.context_id]) as mailbox:
            await rooms.commands.delete_context(OWNER, receipt.context_id, if_match=None)
            (deleted,) = mailbox.take()[0]
        assert isinstance(deleted, ContextDeleted)
        await rooms.quiet()
        assert gate.stopped == [receipt.run_id]
        assert rooms.hub.heads(OWNER, None) == []
        await rooms.commands.delete_context(OWNER, idle.id, if_match=None)


@pytest.mark.scenario("signals", "Signal of a change")
async def test_a_change_is_told_of_and_none_is_not(tmp_path):
    async with gate_rooms(tmp_path) as (rooms, _):
        context = await rooms.store.create_context(OWNER)
        with rooms.hub.subscribe(OWNER, [context.id]) as mailbox:
            await rooms.commands.change_context(OWNER, context.id, {}, if_match=None)
            assert mailbox.take()[0] == []
            changed = await rooms.commands.change_context(OWNER, context.id, {"title": "New"}, if_match=1)
            assert mailbox.take()[0] == [ContextChanged(context_id=context.id, version=2, timestamp=changed.updated_at)]


@pytest.mark.scenario("content-log", "Sequences without gaps")
async def test_many_runs_at_once_leave_gapless_logs(tmp_path):
    async def writes(history, _run):
        number = int(history[-1].text)
        for word in range(60):
            yield f"{number}:{word} "
            if word % 7 == 0:
                yield Delta(ChunkKind.STEP, data={"number": word})
            if word % 5 == number % 5:
                await asyncio.sleep(0)
        if number % 5 == 1:
            raise RuntimeError
        if number % 5 == 2:
            await asyncio.Event().wait()

    async with open_rooms(tmp_path, writes, ledger=ledger_limits(max_pending_bytes=1024)) as rooms:
        receipts = [await rooms.post(str(number)) for number in range(40)]
        for receipt in receipts[2::5]:
            await rooms.commands.cancel(OWNER, receipt.context_id, if_match=None, once=None)
        for number, receipt in enumerate(receipts):
            message = await rooms.ended(receipt)
            page = await rooms.store.page(OWNER, receipt.context_id, receipt.reply_message_id)
            assert [chunk.sequence for chunk in page.chunks] == [*range(1, message.final_sequence + 1)]
            whole = "".join(f"{number}:{word} " for word in range(60))
            expected = {1: MessageStatus.FAILED, 2: MessageStatus.CANCELLED}.get(number % 5, MessageStatus.COMPLETED)
            assert message.status is expected
            assert whole.startswith(message.content)
            assert message.content == whole or number % 5 == 2

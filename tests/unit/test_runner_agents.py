"""Agents that raise, yield nonsense, write without end or do not stop: what the runner makes of their runs."""

import asyncio
import hashlib

import pytest

from context_server.records import ChunkKind, Delta, MessageStatus, State
from tests.unit.rooms import OWNER, ledger_limits, open_rooms, runner_limits, until


async def state_of(rooms, receipt) -> State:
    return (await rooms.store.context(OWNER, receipt.context_id)).state


@pytest.mark.scenario("runs", "Agent that raises")
async def test_an_agent_that_raises_fails_with_what_it_wrote(tmp_path, capsys):
    async def breaks(_history, _run):
        yield "half"
        raise ValueError("xylophone")

    async with open_rooms(tmp_path, breaks) as rooms:
        receipt = await rooms.post()
        message = await rooms.ended(receipt)
        assert (message.status, message.content) == (MessageStatus.FAILED, "half")
        assert message.error.code == "agent-error"
        assert message.digest == hashlib.sha256(b"half").hexdigest()
        assert await state_of(rooms, receipt) is State.FAILED
        await rooms.quiet()
        assert rooms.metric("runs_ended_total", outcome="failed", code="agent-error") == 1
        await rooms.ended(await rooms.post(context_id=receipt.context_id))
    output = capsys.readouterr()
    assert "xylophone" not in output.out + output.err


@pytest.mark.parametrize(
    "agent",
    [
        pytest.param(lambda _history, _run: 1 / 0, id="does not begin"),
        pytest.param(lambda _history, _run: None, id="gives nothing"),
        pytest.param(lambda _history, _run: ["text"], id="gives a list"),
    ],
)
async def test_an_agent_that_is_none_fails(tmp_path, agent):
    async with open_rooms(tmp_path, agent) as rooms:
        assert (await rooms.ended(await rooms.post())).error.code == "agent-error"


@pytest.mark.parametrize(
    "value",
    [
        b"bytes",
        7,
        None,
        Delta(ChunkKind.STEP, data={"when": object()}),
        Delta(ChunkKind.TEXT, b"bytes"),
        Delta("gesture"),
    ],
    ids=["bytes", "number", "None", "no JSON", "bytes in a delta", "unknown kind"],
)
async def test_an_agent_that_yields_something_else_fails(tmp_path, value):
    async def wrong(_history, _run):
        yield "half"
        yield value

    async with open_rooms(tmp_path, wrong) as rooms:
        message = await rooms.ended(await rooms.post())
        assert (message.error.code, message.content) == ("agent-error", "half")


async def test_an_agent_that_exits_ends_its_run_and_not_the_process(tmp_path):
    async def exits(_history, _run):
        yield "half"
        raise SystemExit(3)

    async with open_rooms(tmp_path, exits) as rooms:
        message = await rooms.ended(await rooms.post())
        assert (message.error.code, message.content) == ("agent-error", "half")


async def test_an_agent_that_cancels_itself_fails(tmp_path):
    async def gives_up(_history, _run):
        yield "half"
        raise asyncio.CancelledError

    async with open_rooms(tmp_path, gives_up) as rooms:
        message = await rooms.ended(await rooms.post())
        assert (message.error.code, message.content) == ("agent-error", "half")


@pytest.mark.scenario("runs", "Oversized reply")
async def test_an_endless_reply_fails_and_others_go_on(tmp_path):
    stopped = []

    async def endless(history, _run):
        if history[-1].text != "endless":
            yield "short"
            return
        try:
            while True:
                yield "0123456789"
        finally:
            stopped.append(True)

    limits = ledger_limits(max_pending_bytes=1024, max_reply_bytes=5005)
    async with open_rooms(tmp_path, endless, ledger=limits) as rooms:
        endless_one, short_one = await rooms.post("endless"), await rooms.post("short")
        message = await rooms.ended(endless_one)
        assert (message.error.code, message.content) == ("reply-too-large", "0123456789" * 500)
        assert (await rooms.ended(short_one)).content == "short"
        assert stopped == [True]


@pytest.mark.scenario("runs", "Agent slow to stop")
async def test_an_agent_that_ignores_its_cancellation_is_left_behind(tmp_path):
    late, writes = asyncio.Event(), asyncio.Event()
    stubborn = []

    async def ignores(_history, run):
        yield "word"
        writes.set()
        while not late.is_set():
            try:
                await late.wait()
            except asyncio.CancelledError:
                stubborn.append(run.run_id)
        yield "late"

    async with open_rooms(tmp_path, ignores, runner=runner_limits(cancel_grace=0.05)) as rooms:
        receipt = await rooms.post()
        await writes.wait()
        await rooms.commands.cancel(OWNER, receipt.context_id, if_match=None, once=None)
        message = await rooms.ended(receipt)
        assert (message.status, message.content, stubborn) == (MessageStatus.CANCELLED, "word", [receipt.run_id])
        assert await state_of(rooms, receipt) is State.IDLE
        late.set()

        async def nobody_is_left() -> bool:
            return not rooms.runner._stubborn

        await until(nobody_is_left)
        assert await rooms.message(receipt) == message

"""The ledger: what is merged, cleaned and cut, how it is paced and held back, and what a bad disk does to it."""

import asyncio
import sqlite3

import pytest

from context_server import ledger as ledger_module
from context_server.errors import ReplyTooLarge, SequenceAhead
from context_server.records import (
    ChunkKind,
    ContentDelta,
    Delta,
    MessageCompleted,
    MessageStatus,
    Outcome,
    StateChanged,
)
from context_server.storable import MAX_CHUNK_CHARACTERS
from tests.unit.rooms import OWNER, ledger_limits, open_rooms, until


def text(content: str) -> Delta:
    return Delta(ChunkKind.TEXT, content)


CALL = Delta(ChunkKind.TOOL_CALL, data={"id": "1", "name": "look", "arguments": {}})
RESULT = Delta(ChunkKind.TOOL_RESULT, data={"id": "1", "status": "ok", "result": None})


async def write(rooms, reply, *deltas, outcome=Outcome.SUCCEEDED):
    for delta in deltas:
        await rooms.ledger.append(reply, delta)
    await rooms.ledger.end(reply, outcome)


# What is written


@pytest.mark.scenario("content-log", "Adjacent deltas become one chunk")
async def test_adjacent_text_of_one_kind_is_one_chunk(tmp_path):
    thought = Delta(ChunkKind.REASONING, "hm")
    async with open_rooms(tmp_path) as rooms:
        reply = await rooms.begin()
        await write(rooms, reply, text("a"), text("b"), thought, thought, text("c"), CALL, RESULT, text("d"), text("e"))
        assert await rooms.chunks(reply.run) == [
            (ChunkKind.TEXT, "ab"),
            (ChunkKind.REASONING, "hmhm"),
            (ChunkKind.TEXT, "c"),
            (ChunkKind.TOOL_CALL, CALL.data),
            (ChunkKind.TOOL_RESULT, RESULT.data),
            (ChunkKind.TEXT, "de"),
        ]


async def test_a_long_text_is_cut_into_chunks(tmp_path):
    async with open_rooms(tmp_path) as rooms:
        reply = await rooms.begin()
        await write(rooms, reply, text("x" * (2 * MAX_CHUNK_CHARACTERS + 1)), text("y"))
        assert [len(content) for _, content in await rooms.chunks(reply.run)] == [
            MAX_CHUNK_CHARACTERS,
            MAX_CHUNK_CHARACTERS,
            2,
        ]


@pytest.mark.scenario("content-log", "Characters that cannot be stored")
async def test_what_cannot_be_stored_is_replaced(tmp_path):
    async with open_rooms(tmp_path) as rooms:
        reply = await rooms.begin()
        data = Delta(ChunkKind.STEP, data={"a\x00": ["\ud800", float("nan"), {"b": ("\x00",)}], "n": 1.5})
        await write(rooms, reply, text("a\x00b\ud83d"), data, text("e\u0301\U0001f600"))
        assert await rooms.chunks(reply.run) == [
            (ChunkKind.TEXT, "a\ufffdb\ufffd"),
            (ChunkKind.STEP, {"a\ufffd": ["\ufffd", None, {"b": ["\ufffd"]}], "n": 1.5}),
            (ChunkKind.TEXT, "e\u0301\U0001f600"),
        ]


async def test_nothing_is_no_chunk(tmp_path):
    async with open_rooms(tmp_path) as rooms:
        reply = await rooms.begin()
        await write(rooms, reply, text(""), Delta(ChunkKind.REASONING, ""))
        assert await rooms.chunks(reply.run) == []
        message = await rooms.message(reply.run)
        assert (message.status, message.final_sequence) == (MessageStatus.COMPLETED, 0)


@pytest.mark.parametrize(
    "delta",
    [
        Delta(ChunkKind.TEXT, b"bytes"),
        Delta(ChunkKind.REASONING, "hm", {}),
        Delta(ChunkKind.STEP, data=[1]),
        Delta(ChunkKind.STEP, "text", {}),
    ],
)
async def test_a_delta_that_does_not_fit_its_kind_is_not_taken(tmp_path, delta):
    async with open_rooms(tmp_path) as rooms:
        reply = await rooms.begin()
        with pytest.raises(TypeError):
            await rooms.ledger.append(reply, delta)
        await write(rooms, reply, text("a"), Delta(ChunkKind.STEP, data={}))
        assert await rooms.chunks(reply.run) == [(ChunkKind.TEXT, "a"), (ChunkKind.STEP, {})]


async def test_what_was_committed_is_counted(tmp_path):
    async with open_rooms(tmp_path) as rooms:
        reply = await rooms.begin()
        await write(rooms, reply, text("äb"), Delta(ChunkKind.REASONING, "c"))
        assert (rooms.metric("chunks_committed_total"), rooms.metric("bytes_committed_total")) == (2, 4)
        assert rooms.metric("commit_chunks_count") == rooms.metric("commit_seconds_count") >= 1


@pytest.mark.scenario("runs", "Oversized reply")
async def test_what_exceeds_the_largest_reply_is_not_taken(tmp_path):
    limits = ledger_limits(max_pending_bytes=1024, max_reply_bytes=2000)
    async with open_rooms(tmp_path, ledger=limits) as rooms:
        reply = await rooms.begin()
        await rooms.ledger.append(reply, text("x" * 1999))
        with pytest.raises(ReplyTooLarge) as refusal:
            await rooms.ledger.append(reply, text("ä"))
        assert refusal.value.limit_bytes == 2000
        await write(rooms, reply, text("y"))
        assert (await rooms.message(reply.run)).content == "x" * 1999 + "y"


# What is signalled


@pytest.mark.scenario("content-log", "Signalled content is committed")
async def test_what_is_signalled_can_be_read_by_anybody(tmp_path):
    async with open_rooms(tmp_path) as rooms:
        reply = await rooms.begin()
        beside = sqlite3.connect(tmp_path / "context-server.db")
        seen = []

        async def follow(mailbox):
            while not any(isinstance(signal, MessageCompleted) for signal in seen):
                await mailbox.wait(None)
                signals, _ = mailbox.take()
                seen.extend(signals)
                for signal in signals:
                    if isinstance(signal, ContentDelta):
                        ((head,),) = beside.execute("SELECT count(*) - 1 FROM chunks").fetchall()
                        assert head >= signal.current_sequence
                        page = rooms.reader.recent_page(OWNER, signal.context_id, signal.message_id, 0, None)
                        assert page.head >= signal.current_sequence

        with rooms.hub.subscribe(OWNER, [reply.run.context_id]) as mailbox:
            following = asyncio.create_task(follow(mailbox))
            for number in range(50):
                await rooms.ledger.append(reply, text(f"{number} "))
                await asyncio.sleep(0)
            await rooms.ledger.end(reply, Outcome.SUCCEEDED)
            await following
        beside.close()

        order = [type(signal) for signal in seen]
        assert order[:2] == [StateChanged, ContentDelta]
        assert order[-3:] == [ContentDelta, MessageCompleted, StateChanged]
        assert order.count(MessageCompleted) == 1


async def test_a_rest_follows_each_commit(tmp_path):
    """With a rest of 50 ms for a run that wrote, what comes meanwhile is one commit, and later."""
    limits = ledger_limits(commit_interval=0.05, max_commit_interval=0.05)
    async with open_rooms(tmp_path, ledger=limits) as rooms:
        loop = asyncio.get_running_loop()
        reply = await rooms.begin()

        async def committed(chunks: int) -> float:
            async def reached() -> bool:
                return rooms.metric("chunks_committed_total") >= chunks

            await until(reached)
            return loop.time()

        await rooms.ledger.append(reply, text("first"))
        begun = loop.time()
        await committed(1)
        for _ in range(100):
            await rooms.ledger.append(reply, text("x"))
        assert await committed(2) - begun >= 0.045
        await rooms.ledger.end(reply, Outcome.SUCCEEDED)
        assert (await rooms.message(reply.run)).sequence == 2


async def test_many_replies_are_committed_in_waves_and_each_gets_its_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "_MAX_BATCH_RUNS", 2)
    async with open_rooms(tmp_path) as rooms:
        replies = [await rooms.begin() for _ in range(5)]
        for round_ in range(3):
            for reply in replies:
                await rooms.ledger.append(reply, text(f"{round_} "))
        await asyncio.gather(*(rooms.ledger.end(reply, Outcome.SUCCEEDED) for reply in replies))
        assert {(await rooms.message(reply.run)).content for reply in replies} == {"0 1 2 "}
        assert rooms.metric("commit_chunks_count") >= 3


async def test_a_commit_is_bounded_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "_MAX_BATCH_BYTES", 1000)
    async with open_rooms(tmp_path) as rooms:
        replies = [await rooms.begin() for _ in range(3)]
        for reply in replies:
            await rooms.ledger.append(reply, text("x" * 900))
        await asyncio.gather(*(rooms.ledger.end(reply, Outcome.SUCCEEDED) for reply in replies))
        assert rooms.metric("commit_chunks_bucket", le="1.0") >= 3
        assert {(await rooms.message(reply.run)).content for reply in replies} == {"x" * 900}


# What is held back


@pytest.mark.scenario("runs", "Agent quicker than the disk")
async def test_a_quick_writer_waits_for_the_disk(tmp_path):
    """100 MB as quickly as the ledger takes them: never more than the bound and one delta are on their way."""
    limits = ledger_limits(max_pending_bytes=200_000, max_reply_bytes=200_000_000)
    async with open_rooms(tmp_path, recent_bytes=0, ledger=limits) as rooms:
        reply = await rooms.begin()
        piece, most = "0123456789" * 5_000, 0
        for _ in range(2_000):
            await rooms.ledger.append(reply, text(piece))
            most = max(most, reply.pending_bytes + reply.in_flight_bytes)
        await rooms.ledger.end(reply, Outcome.SUCCEEDED)
        assert most < 200_000
        message = await rooms.message(reply.run)
        assert message.content == piece * 2_000


async def test_with_many_writers_each_has_a_smaller_share(tmp_path):
    async with open_rooms(tmp_path, ledger=ledger_limits(max_pending_bytes=10_000)) as rooms:
        replies = [await rooms.begin() for _ in range(40)]
        await rooms.limit_disk(pages=1)
        waiting = [asyncio.create_task(rooms.ledger.append(reply, text("x" * 8_500))) for reply in replies]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        await rooms.limit_disk(pages=0)
        await asyncio.gather(*waiting)
        await asyncio.gather(*(rooms.ledger.end(reply, Outcome.SUCCEEDED) for reply in replies))


# Pulls


async def test_a_pull_is_answered_from_memory_and_beyond_it_from_the_database(tmp_path):
    async with open_rooms(tmp_path, recent_bytes=1000) as rooms:
        reply = await rooms.begin()
        run = reply.run
        for number in range(10):
            await rooms.ledger.append(reply, text(str(number)))
            await rooms.ledger.append(reply, Delta(ChunkKind.STEP, data={"number": number}))
        await rooms.ledger.end(reply, Outcome.SUCCEEDED)

        newest = await rooms.reader.page(OWNER, run.context_id, run.message_id, 19)
        oldest = await rooms.reader.page(OWNER, run.context_id, run.message_id, 0)

        assert [chunk.sequence for chunk in newest.chunks] == [20]
        assert len(oldest.chunks) == 20
        assert rooms.metric("pulls_total", source="memory") == 1
        assert rooms.metric("pulls_total", source="database") == 1
        with pytest.raises(SequenceAhead):
            await rooms.reader.page(OWNER, run.context_id, run.message_id, 21)
        rooms.recent.forget_context(run.context_id)
        assert rooms.reader.recent_page(OWNER, run.context_id, run.message_id, 19, None) is None

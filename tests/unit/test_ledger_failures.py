"""What a bad disk does to the ledger, and what becomes of runs that do not own their replies any more."""

import asyncio

import pytest

from context_server import ledger as ledger_module
from context_server.errors import Fenced, StorageBroken
from context_server.records import ChunkKind, Delta, Failure, Outcome
from tests.unit.rooms import OWNER, ledger_limits, open_rooms, until


def text(content: str) -> Delta:
    return Delta(ChunkKind.TEXT, content)


# A bad disk


@pytest.mark.scenario("operations", "Disk full")
async def test_a_full_disk_delays_and_loses_nothing(tmp_path):
    async with open_rooms(tmp_path) as rooms:
        reply = await rooms.begin()
        await rooms.ledger.append(reply, text("before "))
        await rooms.limit_disk(pages=1)
        await rooms.ledger.append(reply, text("x" * 100_000))

        async def delayed() -> bool:
            return rooms.metric("commit_failures_total", code="storage-full") >= 2

        await until(delayed)
        ending = asyncio.create_task(rooms.ledger.end(reply, Outcome.SUCCEEDED))
        await asyncio.sleep(0)
        assert not ending.done()
        assert not (await rooms.message(reply.run)).status.ended

        await rooms.limit_disk(pages=0)
        await ending
        assert (await rooms.message(reply.run)).content == "before " + "x" * 100_000


async def test_what_a_full_disk_does_not_take_is_dropped_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "_LAST_COMMIT_SECONDS", 0.05)
    async with open_rooms(tmp_path) as rooms:
        reply = await rooms.begin()
        await rooms.limit_disk(pages=1)
        await rooms.ledger.append(reply, text("x" * 100_000))
    async with open_rooms(tmp_path) as rooms:
        assert (await rooms.message(reply.run)).content == ""
        assert await rooms.store.expired_runs() != []


async def test_after_a_defect_nothing_is_acknowledged(tmp_path):
    """A table that has vanished stands for whatever nobody has thought of."""
    async with open_rooms(tmp_path) as rooms:
        replies = [await rooms.begin() for _ in range(2)]
        await rooms.store._write(lambda connection: connection.exec_driver_sql("ALTER TABLE chunks RENAME TO lost"))
        for reply in replies:
            await rooms.ledger.append(reply, text("one"))
        for reply in replies:
            with pytest.raises((StorageBroken, Fenced)):
                await rooms.ledger.end(reply, Outcome.SUCCEEDED)
            with pytest.raises(Fenced):
                await rooms.ledger.append(reply, text("two"))
        with pytest.raises(StorageBroken, match="OperationalError"):
            await rooms.store.create_context(OWNER)
        assert (await rooms.store.readiness()).failure == "The storage failed: OperationalError."
        assert rooms.metric("chunks_committed_total") == 0


async def test_whoever_waits_when_the_disk_breaks_is_told(tmp_path):
    async with open_rooms(tmp_path) as rooms:
        reply = await rooms.begin()
        rooms.store.fail("the disk is gone")
        with pytest.raises(StorageBroken, match="the disk is gone"):
            await rooms.ledger.end(reply, Outcome.FAILED, Failure(code="agent-error"))
        with pytest.raises(Fenced):
            await rooms.ledger.end(reply, Outcome.SUCCEEDED)


# Runs that do not own their replies


@pytest.mark.scenario("runs", "Stale attempt is fenced")
async def test_a_fenced_run_is_left_out_and_the_others_are_written(tmp_path):
    async with open_rooms(tmp_path, ledger=ledger_limits(max_pending_bytes=1024)) as rooms:
        stale, fresh = await rooms.begin(), await rooms.begin()
        await rooms.ledger.append(stale, text("kept"))

        async def kept() -> bool:
            return rooms.metric("chunks_committed_total") == 1

        await until(kept)
        await rooms.store.expire_run(stale.run)
        before = await rooms.message(stale.run)
        assert before.content == "kept"

        await asyncio.gather(rooms.ledger.append(stale, text("x" * 5000)), rooms.ledger.append(fresh, text("y" * 5000)))
        with pytest.raises(Fenced):
            await rooms.ledger.end(stale, Outcome.SUCCEEDED)
        with pytest.raises(Fenced):
            await rooms.ledger.append(stale, text("late"))
        await rooms.ledger.end(fresh, Outcome.SUCCEEDED)

        assert rooms.fenced == [stale.run.id]
        assert await rooms.message(stale.run) == before
        assert (await rooms.message(fresh.run)).content == "y" * 5000
        rooms.ledger.drop(stale)
        assert rooms.fenced == [stale.run.id]


async def test_the_ending_of_a_deleted_context_is_fenced(tmp_path):
    async with open_rooms(tmp_path) as rooms:
        reply = await rooms.begin()
        await rooms.store.delete_context(OWNER, reply.run.context_id)
        with pytest.raises(Fenced):
            await rooms.ledger.end(reply, Outcome.SUCCEEDED)


async def test_two_writers_of_one_reply_are_a_defect(tmp_path):
    async with open_rooms(tmp_path) as rooms:
        reply = await rooms.begin()
        twin = rooms.ledger.begin(reply.run, on_fenced=lambda: None)
        both = [asyncio.create_task(rooms.ledger.end(each, Outcome.SUCCEEDED)) for each in (reply, twin)]
        failures = await asyncio.gather(*both, return_exceptions=True)
        assert [type(failure) for failure in failures] == [StorageBroken, StorageBroken]


async def test_a_reply_takes_nothing_after_its_end(tmp_path):
    async with open_rooms(tmp_path) as rooms:
        reply = await rooms.begin()
        await rooms.ledger.end(reply, Outcome.SUCCEEDED)
        with pytest.raises(Fenced):
            await rooms.ledger.append(reply, text("late"))


async def test_a_reply_may_be_dropped_after_its_end_and_before_its_commit(tmp_path):
    async with open_rooms(tmp_path) as rooms:
        ended, pending, other = [await rooms.begin() for _ in range(3)]
        await rooms.ledger.end(ended, Outcome.SUCCEEDED)
        before = await rooms.message(ended.run)
        rooms.ledger.drop(ended)
        assert await rooms.message(ended.run) == before

        await rooms.ledger.append(pending, text("never"))
        await rooms.ledger.append(other, text("never"))
        rooms.ledger.drop(pending)
        rooms.store.fail("the disk is gone")
        for reply in (pending, other):
            with pytest.raises((Fenced, StorageBroken)):
                await rooms.ledger.end(reply, Outcome.SUCCEEDED)
        assert rooms.fenced == [ended.run.id, pending.run.id]
        assert (await rooms.message(pending.run)).content == ""

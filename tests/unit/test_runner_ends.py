"""Lost wake-ups, bad disks, the end of the process, and what the next one finds."""

import asyncio
import hashlib
import sqlite3

import pytest

from context_server import runner as runner_module
from context_server.bus import CancelRequested, InProcessBus, RunDeleted, RunQueued
from context_server.errors import DatabaseBusy, ShuttingDown
from context_server.records import MessageStatus
from context_server.store import Store
from context_server.store.exchanges import Post
from tests.unit.gate import gate_rooms
from tests.unit.rooms import OWNER, open_rooms, runner_limits, until

FOREVER = 3600


# Lost wake-ups


class DeafBus(InProcessBus):
    """Loses every wake-up of one kind."""

    def __init__(self, lost: type) -> None:
        super().__init__()
        self.lost = lost

    def publish(self, wake_up):
        if not isinstance(wake_up, self.lost):
            super().publish(wake_up)


@pytest.mark.parametrize("lost", [RunQueued, CancelRequested, RunDeleted])
async def test_a_lost_wake_up_is_made_good_by_the_sweep(tmp_path, monkeypatch, lost):
    monkeypatch.setattr(runner_module, "_SWEEP_SECONDS", 0.02)
    async with gate_rooms(tmp_path, bus=DeafBus(lost)) as (rooms, gate):
        receipt = await rooms.post()
        await gate.has_begun()
        if lost is RunDeleted:
            await rooms.commands.delete_context(OWNER, receipt.context_id, if_match=None)
        else:
            await rooms.commands.cancel(OWNER, receipt.context_id, if_match=None, once=None)
            assert (await rooms.ended(receipt)).status is MessageStatus.CANCELLED
        await rooms.quiet()
        assert gate.stopped == [receipt.run_id]


async def test_a_run_that_is_told_to_stop_while_it_is_being_claimed_stops_without_a_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(runner_module, "_SWEEP_SECONDS", FOREVER)
    async with gate_rooms(tmp_path) as (rooms, _gate):
        claim_runs = rooms.store.claim_runs

        async def claim(limit):
            claimed = await claim_runs(limit)
            for run, _ in claimed:
                await rooms.commands.cancel(OWNER, run.context_id, if_match=None, once=None)
            return claimed

        monkeypatch.setattr(rooms.store, "claim_runs", claim)
        receipt = await rooms.post()
        assert (await rooms.ended(receipt)).status is MessageStatus.CANCELLED


async def test_more_runs_of_a_dead_process_are_ended_than_one_look_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(runner_module, "_REAP_LIMIT", 3)
    async with Store.open(f"sqlite:///{tmp_path / 'context-server.db'}") as dead:
        for _ in range(10):
            context = await dead.create_context(OWNER)
            await dead.post_message(OWNER, context.id, Post(text="Hello"))
        await dead.claim_runs(10)
    async with open_rooms(tmp_path) as rooms:
        await rooms.runner._reap_all()
        assert await rooms.store.active_runs() == {}
        assert rooms.metric("runs_ended_total", outcome="failed", code="interrupted") == 10


async def test_the_sweep_leaves_runs_alone_that_are_on(tmp_path, monkeypatch):
    monkeypatch.setattr(runner_module, "_SWEEP_SECONDS", 0.001)
    async with gate_rooms(tmp_path) as (rooms, gate):
        receipts = [await rooms.post() for _ in range(5)]
        await gate.has_begun(5)
        for _ in range(20):
            await rooms.store.running_states([receipt.run_id for receipt in receipts])
        gate.open.set()
        for receipt in receipts:
            assert (await rooms.ended(receipt)).content == "word end"


async def test_a_locked_database_delays_a_claim(tmp_path, monkeypatch):
    monkeypatch.setattr(runner_module, "_SWEEP_SECONDS", 0.02)
    async with gate_rooms(tmp_path) as (rooms, gate):
        await rooms.store._write(lambda connection: connection.exec_driver_sql("PRAGMA busy_timeout=1"))
        somebody = sqlite3.connect(tmp_path / "context-server.db", isolation_level=None)
        somebody.execute("BEGIN IMMEDIATE")
        for _ in range(3):
            rooms.runner._wake.set()
            with pytest.raises(DatabaseBusy):
                await rooms.store.create_context(OWNER)
        somebody.execute("ROLLBACK")
        somebody.close()
        receipt = await rooms.post()
        await gate.has_begun()
        gate.open.set()
        assert (await rooms.ended(receipt)).content == "word end"


async def test_after_a_broken_disk_nothing_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setattr(runner_module, "_SWEEP_SECONDS", 0.01)
    async with gate_rooms(tmp_path) as (rooms, gate):
        receipt = await rooms.post()
        await gate.has_begun()
        rooms.store.fail("the disk is gone")
        gate.open.set()
        await rooms.quiet()
        assert not (await rooms.message(receipt)).status.ended


async def test_after_a_defect_in_its_own_work_the_process_is_to_end(tmp_path):
    """A table that has vanished stands for whatever nobody has thought of."""
    async with gate_rooms(tmp_path) as (rooms, _):
        await rooms.store._write(lambda connection: connection.exec_driver_sql("ALTER TABLE runs RENAME TO lost"))
        rooms.runner._wake.set()

        async def has_failed() -> bool:
            return (await rooms.store.readiness()).failure is not None

        await until(has_failed)
        assert (await rooms.store.readiness()).failure == "The storage failed: OperationalError."


# The end of the process, and the next one


@pytest.mark.scenario("operations", "Termination lets replies finish")
async def test_replies_may_finish_and_nothing_new_begins(tmp_path):
    async with gate_rooms(tmp_path) as (rooms, gate):
        receipt = await rooms.post()
        await gate.has_begun()
        rooms.commands.draining = True
        draining = asyncio.create_task(rooms.runner.drain(FOREVER))
        await asyncio.sleep(0)
        with pytest.raises(ShuttingDown):
            await rooms.post()
        assert not draining.done()
        gate.open.set()
        await draining
        assert (await rooms.message(receipt)).status is MessageStatus.COMPLETED


@pytest.mark.scenario("operations", "Termination interrupts the rest")
async def test_what_does_not_finish_in_time_is_interrupted(tmp_path):
    async with gate_rooms(tmp_path) as (rooms, gate):
        receipt = await rooms.post()
        await gate.has_begun()
        await rooms.runner.drain(0.01)
        message = await rooms.message(receipt)
        assert (message.status, message.error.code) == (MessageStatus.FAILED, "interrupted")
        assert message.digest == hashlib.sha256(message.content.encode()).hexdigest()
        assert gate.stopped == [receipt.run_id]


async def test_what_is_queued_at_the_end_stays_queued(tmp_path):
    async with gate_rooms(tmp_path, runner=runner_limits(max_active_runs=1)) as (rooms, gate):
        running, queued = await rooms.post(), await rooms.post()
        await gate.has_begun()
    async with gate_rooms(tmp_path, runner=runner_limits(max_active_runs=1)) as (rooms, gate):
        assert rooms.hub.heads(OWNER, [queued.context_id]) == [(queued.context_id, queued.reply_message_id, 0)]
        gate.open.set()
        assert (await rooms.message(running)).error.code == "interrupted"
        assert (await rooms.ended(queued)).content == "word end"


async def test_a_run_that_is_being_claimed_at_the_end_is_not_lost(tmp_path):
    """The process stops while the claim is under way: the run is ended by it, or runs in the next one."""
    for turns in range(12):
        async with gate_rooms(tmp_path) as (rooms, _):
            receipt = await rooms.post()
            for _ in range(turns):
                await asyncio.sleep(0)
        async with open_rooms(tmp_path) as rooms:
            message = await rooms.message(receipt)
            assert await rooms.store.expired_runs() == []
            assert message.status is MessageStatus.PENDING or message.error.code == "interrupted"
            await rooms.store.delete_context(OWNER, receipt.context_id)


@pytest.mark.scenario("resume", "Kill in mid-reply")
async def test_what_a_crash_left_is_ended_before_anything_is_claimed(tmp_path):
    async with open_rooms(tmp_path) as rooms:
        failed, cancelled = await rooms.begin(), await rooms.begin()
        await rooms.store.request_cancel(OWNER, cancelled.run.context_id)
        queued = await rooms.post()
    async with gate_rooms(tmp_path) as (rooms, gate):
        assert (await rooms.message(failed.run)).error.code == "interrupted"
        assert (await rooms.message(cancelled.run)).status is MessageStatus.CANCELLED
        assert rooms.metric("runs_ended_total", outcome="failed", code="interrupted") == 1
        assert rooms.metric("runs_ended_total", outcome="stopped", code="") == 1
        gate.open.set()
        assert (await rooms.ended(queued)).content == "word end"

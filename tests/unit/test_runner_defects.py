"""A defect in the tasks that the server needs is logged and ends the process; the end of the process is no defect."""

import asyncio
import sqlite3
from contextlib import closing

import pytest

from context_server import runner as runner_module
from context_server.errors import StorageBroken
from tests.unit.gate import gate_rooms
from tests.unit.rooms import OWNER


@pytest.mark.parametrize(
    ("table", "pace", "tasks"),
    [
        ("runs", None, {"_claim_forever"}),
        ("runs", "_SWEEP_SECONDS", {"_sweep_forever", "_claim_forever"}),  # A sweep has runs claimed too.
    ],
)
async def test_a_defect_is_logged_and_told(tmp_path, monkeypatch, capsys, table, pace, tasks):
    """A table that has vanished stands for whatever nobody has thought of."""
    if pace is not None:
        monkeypatch.setattr(runner_module, pace, 0.005)
    async with gate_rooms(tmp_path) as (rooms, gate):
        await rooms.post()
        await gate.has_begun()
        told: asyncio.Future[StorageBroken] = asyncio.get_running_loop().create_future()
        rooms.store._database.on_broken = told.set_result
        with closing(sqlite3.connect(tmp_path / "context-server.db")) as database:
            database.execute(f"ALTER TABLE {table} RENAME TO lost")
        if pace is None:
            rooms.runner._wake.set()
        async with asyncio.timeout(60):
            failure = await told
        assert failure.reason == "OperationalError"
        with pytest.raises(StorageBroken, match="OperationalError"):
            await rooms.store.create_context(OWNER)
        logged = capsys.readouterr().out
        assert "task_failed" in logged
        assert {task for task in ("_claim_forever", "_sweep_forever") if task in logged} & tasks
        assert "no such table" not in logged


async def test_the_end_of_the_rooms_is_no_defect(tmp_path, capsys):
    async with gate_rooms(tmp_path) as (rooms, gate):
        broken: list[StorageBroken] = []
        rooms.store._database.on_broken = broken.append
        receipt = await rooms.post()
        gate.open.set()
        assert (await rooms.ended(receipt)).error is None
    assert broken == []
    assert all(task.cancelled() for task in rooms.runner._keeper)
    assert "task_failed" not in capsys.readouterr().out


async def test_a_defect_in_seeing_a_run_through_ends_its_reply(tmp_path, monkeypatch, capsys):
    def broken(*_: object) -> None:
        raise ValueError("what nobody has thought of")

    async with gate_rooms(tmp_path) as (rooms, gate):
        monkeypatch.setattr(rooms.runner, "_verdict", broken)
        receipt = await rooms.post()
        gate.open.set()
        message = await rooms.ended(receipt)
        assert message.error is not None
        assert message.error.code == "agent-error"
    assert "run_supervision_failed" in capsys.readouterr().out

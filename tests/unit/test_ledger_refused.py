"""A batch that is refused while somebody else holds the database: it is tried again, and only one run is lost."""

import asyncio
import sqlite3

import pytest
from sqlalchemy import event

from context_server.errors import Fenced, StorageBroken
from context_server.records import ChunkKind, Delta, Outcome
from tests.unit.rooms import OWNER, open_rooms, until


@pytest.fixture
def somebody(tmp_path):
    """Another connection to the rooms' database, which any thread may use."""
    connection = sqlite3.connect(tmp_path / "context-server.db", isolation_level=None, check_same_thread=False)
    yield connection
    connection.close()


@pytest.mark.scenario("runs", "Stale attempt is fenced")
async def test_a_refused_batch_on_a_locked_database_is_tried_again(tmp_path, somebody):
    async with open_rooms(tmp_path) as rooms:
        lost, kept = await rooms.begin(), await rooms.begin()
        await rooms.store.delete_context(OWNER, lost.run.context_id)
        await rooms.store._write(lambda connection: connection.exec_driver_sql("PRAGMA busy_timeout=1"))

        def lock(*_: object) -> None:
            """Between the refused transaction and the one that asks who was fenced."""
            somebody.execute("BEGIN IMMEDIATE")

        event.listen(rooms.store._database._writer, "checkin", lock, once=True)
        for reply in (lost, kept):
            await rooms.ledger.append(reply, Delta(ChunkKind.TEXT, "words"))

        async def is_delayed() -> bool:
            return rooms.metric("commit_failures_total", code="database-busy") > 0

        await until(is_delayed)
        assert rooms.fenced == []
        somebody.execute("ROLLBACK")
        await rooms.ledger.end(kept, Outcome.SUCCEEDED)
        with pytest.raises(Fenced):
            await rooms.ledger.end(lost, Outcome.SUCCEEDED)
        assert rooms.fenced == [lost.run.id]
        assert (await rooms.message(kept.run)).content == "words"
        assert (await rooms.store.readiness()).failure is None


async def test_a_batch_that_is_refused_without_a_fenced_run_fails_the_store(tmp_path, somebody):
    """The log would not be what its writer believes it to be: nothing more may be acknowledged."""
    async with open_rooms(tmp_path) as rooms:
        reply = await rooms.begin()
        somebody.execute("CREATE TRIGGER refuse BEFORE UPDATE ON messages BEGIN SELECT RAISE(IGNORE); END")
        async with asyncio.timeout(60):
            with pytest.raises(StorageBroken, match="refused without a fenced run"):
                await rooms.ledger.end(reply, Outcome.SUCCEEDED)
        failure = (await rooms.store.readiness()).failure
        assert failure is not None
        assert "refused without a fenced run" in failure

"""A node that stands still in the middle of a statement: what it has locked is freed, and its reply ends in time."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import make_url

from context_server.records import MessageStatus
from context_server.store import Store
from context_server.store.dialects import postgresql
from context_server.store.exchanges import Post
from context_server.store.execution import INTERRUPTED, Lease
from tests.databases import emptied_database
from tests.unit.rooms import OWNER, open_rooms, until


@pytest.fixture
def database_url(tmp_path: Path) -> Iterator[str]:
    with emptied_database("postgresql", tmp_path) as url:
        yield url


@asynccontextmanager
async def standing_still(database_url: str, lock: str) -> AsyncIterator[Any]:
    """A session of a node that has locked rows, has had its next statement parsed, and says nothing more."""
    url = make_url(database_url).set(drivername="postgresql").render_as_string(hide_password=False)
    connection = await asyncpg.connect(url, server_settings=postgresql._SERVER_SETTINGS)
    try:
        await connection.execute("BEGIN")
        await connection.execute(lock)
        await connection.prepare("SELECT 1")  # Parse, Describe and Flush; no Sync follows.
        yield connection
    finally:
        connection.terminate()


@pytest.mark.scenario("many-nodes", "Stopped in the middle of a statement")
async def test_what_a_silent_session_has_locked_is_freed(database_url: str) -> None:
    async with Store.open(database_url) as store:
        context = await store.create_context(OWNER)

        async def is_freed() -> bool:
            return await store.house.end_stalled_sessions() == 1

        async with standing_still(database_url, f"SELECT 1 FROM contexts WHERE id = '{context.id}' FOR UPDATE") as one:
            assert not await is_freed(), "It may still be at work."
            await until(is_freed)
            changed = await store.change_context(OWNER, context.id, {"title": "free"})
            assert changed.title == "free"
            with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
                await one.fetch("SELECT 1")


@pytest.mark.scenario("many-nodes", "Stopped in the middle of a statement")
async def test_the_reply_of_a_node_that_holds_its_rows_is_interrupted(database_url: str, tmp_path: Path) -> None:
    async with Store.open(database_url, lease=Lease(node_id="still", lease_ms=100)) as still:
        context = await still.create_context(OWNER)
        receipt, _ = await still.post_message(OWNER, context.id, Post(text="Hello"))
        await still.claim_runs(1)
        async with (
            standing_still(database_url, "SELECT 1 FROM runs FOR UPDATE"),
            open_rooms(tmp_path, _silent, database_url=database_url) as rooms,
        ):
            assert (await rooms.message(receipt)).status is MessageStatus.PENDING, "It is locked, and passed over."
            message = await rooms.ended(receipt)
            assert (message.status, message.error) == (MessageStatus.FAILED, INTERRUPTED)


async def _silent(_history: Any, _run: Any) -> AsyncIterator[str]:
    return
    yield

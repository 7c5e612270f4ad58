"""A disk that is full, a database that somebody holds, a disk that fails: what the store says, and does then."""

import asyncio
import sqlite3

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from context_server.errors import DatabaseBusy, StorageBroken, StorageFull
from context_server.store import Store
from context_server.store.dialects.sqlite import named_failure
from context_server.store.exchanges import Post
from tests.store.writing import OWNER, exchange, post, start

CANARY = "xylophone"


on_sqlite = pytest.mark.only("sqlite")


def limit_pages(store, pages: int):
    """Has the database file take no more than ``pages`` pages, or as many as it likes (0)."""
    return store._write(lambda connection: connection.exec_driver_sql(f"PRAGMA max_page_count={pages or 2**30}"))


@on_sqlite
@pytest.mark.scenario("operations", "Disk full")
async def test_a_full_disk_refuses_writes_answers_reads_and_recovers(store):
    idle = await store.create_context(OWNER)
    writer = await start(store)
    await writer.write("one")
    await limit_pages(store, 1)
    before = await store.context(OWNER, writer.run.context_id)

    append = writer.take("x" * 100_000)
    for _ in range(2):
        with pytest.raises(StorageFull):
            await store.append([append])
        with pytest.raises(StorageFull):
            await store.post_message(OWNER, idle.id, Post(text="x" * 100_000))

    assert (await writer.message()).content == "one"
    assert await store.context(OWNER, before.id) == before
    await limit_pages(store, 0)
    await store.append([append])
    assert (await writer.message()).content == "one" + "x" * 100_000


@on_sqlite
@pytest.mark.scenario("operations", "Locked database")
async def test_a_database_that_somebody_holds_is_busy_until_they_let_go(store, database_url):
    await store._write(lambda connection: connection.exec_driver_sql("PRAGMA busy_timeout=20"))
    writer = await exchange(store, "Hello", "one")
    other = sqlite3.connect(make_url(database_url).database or "", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    with pytest.raises(DatabaseBusy):
        await post(store)
    assert (await writer.message()).content == "one"

    other.execute("ROLLBACK")
    other.close()
    await post(store)


@on_sqlite
async def test_a_write_waits_for_a_lock_that_is_short(store, database_url):
    other = sqlite3.connect(make_url(database_url).database or "", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    waiting = asyncio.create_task(store.create_context(OWNER))
    await asyncio.sleep(0)
    assert await store.contexts(OWNER) == ([], None)
    assert not waiting.done()
    other.execute("ROLLBACK")
    other.close()
    assert (await waiting).version == 1


@on_sqlite
async def test_after_a_broken_disk_every_write_is_refused_and_reads_go_on(database_url):
    told = []

    def fail(_connection):
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorname = "SQLITE_IOERR_FSYNC"
        raise OperationalError("COMMIT", None, error)

    async with Store.open(database_url, on_broken=told.append) as store:
        writer = await exchange(store, "Hello", "one")

        with pytest.raises(StorageBroken) as first:
            await store._write(fail)
        with pytest.raises(StorageBroken) as second:
            await post(store)

        assert first.value.reason == second.value.reason == "SQLITE_IOERR_FSYNC"
        assert [failure.reason for failure in told] == ["SQLITE_IOERR_FSYNC"]
        assert (await writer.message()).content == "one"
        assert (await store.readiness()).failure == "The storage failed: SQLITE_IOERR_FSYNC."
        assert store.fail("another reason").reason == "SQLITE_IOERR_FSYNC"


async def test_a_store_may_be_told_that_it_is_broken_without_a_listener(store):
    assert store.fail("a defect").reason == "a defect"
    with pytest.raises(StorageBroken, match="a defect"):
        await store.create_context(OWNER)


@pytest.mark.parametrize(
    ("name", "failure"),
    [
        ("SQLITE_FULL", StorageFull),
        ("SQLITE_IOERR_WRITE", StorageFull),
        ("SQLITE_BUSY", DatabaseBusy),
        ("SQLITE_BUSY_SNAPSHOT", DatabaseBusy),
        ("SQLITE_LOCKED", DatabaseBusy),
        ("SQLITE_IOERR_FSYNC", StorageBroken),
        ("SQLITE_IOERR_READ", StorageBroken),
        ("SQLITE_CORRUPT", StorageBroken),
        ("SQLITE_NOTADB", StorageBroken),
        ("SQLITE_READONLY_DBMOVED", StorageBroken),
        ("SQLITE_CANTOPEN", StorageBroken),
        ("SQLITE_CONSTRAINT_CHECK", None),
        (None, None),
    ],
)
def test_what_a_drivers_error_means(name, failure):
    origin = sqlite3.OperationalError("anything")
    if name is not None:
        origin.sqlite_errorname = name
    found = named_failure(DBAPIError("SELECT", None, origin))
    assert type(found) is (type(None) if failure is None else failure)


# What an error says


@pytest.mark.scenario("operations", "Logs and metrics carry no text")
@pytest.mark.parametrize("engine", ["_write", "_read"])
async def test_an_sql_error_carries_no_value(store, engine):
    def fail(connection):
        connection.execute(text("SELECT * FROM nowhere WHERE content = :content"), {"content": CANARY})

    with pytest.raises(DBAPIError) as failure:
        await getattr(store, engine)(fail)
    assert "nowhere" in str(failure.value)
    assert CANARY not in str(failure.value)
    assert CANARY not in repr(failure.value)


async def test_a_refused_row_carries_no_value(store):
    writer = await start(store)
    append = writer.take(CANARY)
    await store.append([append])

    def twice(connection):
        connection.execute(
            text("INSERT INTO chunks (message_id, sequence, kind, text) VALUES (:id, 1, 'text', :content)"),
            {"id": writer.run.message_id, "content": CANARY},
        )

    with pytest.raises(IntegrityError) as failure:
        await store._write(twice)
    assert CANARY not in str(failure.value)
    assert (await writer.message()).content == CANARY


async def test_a_transaction_that_raises_has_done_nothing(store, rows):
    def half(connection):
        connection.execute(text("INSERT INTO server_facts VALUES ('half', 'done')"))
        raise LookupError

    with pytest.raises(LookupError):
        await store._write(half)
    assert rows("SELECT count(*) FROM server_facts WHERE name = 'half'") == [(0,)]


@on_sqlite
async def test_readers_cannot_write(store):
    with pytest.raises(StorageBroken, match="READONLY"):
        await store._read(lambda connection: connection.execute(text("DELETE FROM contexts")))
    await store.create_context(OWNER)


@pytest.mark.scenario("content-log", "Cancelled write")
async def test_a_write_whose_caller_is_cancelled_is_whole_or_not_there(store):
    contexts = [await store.create_context(OWNER) for _ in range(20)]
    posts = [asyncio.create_task(store.post_message(OWNER, context.id, Post(text="Hello"))) for context in contexts]
    await posts[0]
    for task in posts[1:]:
        task.cancel()
    await asyncio.gather(*posts, return_exceptions=True)
    await store.create_context(OWNER)

    for context in contexts:
        messages, _ = await store.messages(OWNER, context.id)
        busy = (await store.context(OWNER, context.id)).active_run is not None
        assert len(messages) == (2 if busy else 0)

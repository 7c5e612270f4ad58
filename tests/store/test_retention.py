"""Retention: a context without activity is gone for everybody at once, and its rows go in small transactions."""

import asyncio
from dataclasses import replace

import pytest

from context_server.errors import ContextNotFound
from context_server.records import Outcome
from context_server.store import Store, conversations, endings, retention
from context_server.store.exchanges import Post
from context_server.store.execution import BatchRefused, Standing
from context_server.store.reading import Subscription
from tests.store.compacting import Interrupted, compact_all, interrupted_at, written
from tests.store.writing import OWNER, claim, exchange, post, start

TABLES = ("contexts", "messages", "chunks", "segments", "runs")


@pytest.fixture
def counted(rows):
    """How many rows there are of each kind."""

    def count() -> dict[str, int]:
        return {table: rows(f"SELECT count(*) FROM {table}")[0][0] for table in TABLES}

    return count


async def nobody_finds(store: Store, context_id: str, message_id: str) -> None:
    """Everything that a client can ask says that there is no such context."""
    for answer in (
        store.context(OWNER, context_id),
        store.message(OWNER, context_id, message_id),
        store.messages(OWNER, context_id),
        store.page(OWNER, context_id, message_id),
        store.snapshots(OWNER, [Subscription(context_id, 1)]),
        store.post_message(OWNER, context_id, Post(text="Hello")),
        store.change_context(OWNER, context_id, {"title": "new"}),
        store.request_cancel(OWNER, context_id),
        store.delete_context(OWNER, context_id),
    ):
        with pytest.raises(ContextNotFound):
            await answer
    assert context_id not in [context.id for context in (await store.contexts(OWNER))[0]]
    assert context_id not in await store.followed_contexts(OWNER, recent=10, limit=10)
    assert await store.snapshots(OWNER, [Subscription(context_id, 1)], all_must_exist=False) == []


@pytest.mark.scenario("retention", "Expired context")
async def test_an_expired_context_is_gone_at_once_and_its_rows_in_small_steps(store, counted, monkeypatch):
    monkeypatch.setattr(retention, "_ROWS", 40)
    run = await written(store, ["word "] * 200)
    await compact_all(store)
    long = await exchange(store, "And?", *["word "] * 100, context_id=run.context_id)
    before = counted()
    (gone,) = await store.house.expire_contexts(-1000)
    assert (gone.owner, gone.context_id) == (OWNER, run.context_id)
    assert counted() == before

    steps = 0
    while await store.house.clear_contexts():
        await nobody_finds(store, run.context_id, run.message_id)
        await nobody_finds(store, run.context_id, long.run.message_id)
        after = counted()
        assert before["chunks"] - after["chunks"] <= 40
        before, steps = after, steps + 1
    assert set(counted().values()) == {0}
    assert steps >= 4


@pytest.mark.scenario("retention", "Deletion of a long context")
@pytest.mark.parametrize("limit", [50, 1000])
async def test_a_long_context_that_its_owner_deletes_goes_in_small_steps(store, counted, monkeypatch, limit):
    monkeypatch.setattr(conversations, "_CHUNKS_AT_ONCE", limit)
    run = await written(store, ["word "] * 50)
    deleted = await store.delete_context(OWNER, run.context_id)
    assert deleted.id == run.context_id
    await nobody_finds(store, run.context_id, run.message_id)
    assert bool(counted()["chunks"]) is (limit == 50)
    while await store.house.clear_contexts():
        await nobody_finds(store, run.context_id, run.message_id)
    assert set(counted().values()) == {0}


async def test_the_run_of_a_long_context_that_is_deleted_is_fenced(store, counted, monkeypatch):
    monkeypatch.setattr(conversations, "_CHUNKS_AT_ONCE", 10)
    writer = await start(store)
    await writer.write(*["word "] * 20)
    await store.delete_context(OWNER, writer.run.context_id)
    await nobody_finds(store, writer.run.context_id, writer.run.message_id)
    assert await store.active_runs() == {}
    late = writer.take("late")
    with pytest.raises(BatchRefused):
        await store.append([late])
    assert await store.standings([late]) == [(Standing.FENCED, None)]
    while await store.house.clear_contexts():
        pass
    assert set(counted().values()) == {0}


@pytest.mark.only("postgresql")
async def test_a_reply_that_goes_on_while_its_long_context_is_deleted(store, monkeypatch):
    read = endings._read
    has_read = asyncio.Event()

    def read_slowly(connection, message_id):
        found = read(connection, message_id)
        has_read.set()
        connection.exec_driver_sql("SELECT pg_sleep(0.5)")
        return found

    monkeypatch.setattr(conversations, "_CHUNKS_AT_ONCE", 10)
    monkeypatch.setattr(endings, "_read", read_slowly)
    writer = await start(store)
    await writer.write(*["word "] * 20)
    deleting = asyncio.create_task(store.delete_context(OWNER, writer.run.context_id))
    await has_read.wait()
    late = replace(writer.take("late"), phases=())  # It moves no state, and so waits for no lock of the context.
    with pytest.raises(BatchRefused):
        await store.append([late])
    await deleting


@pytest.mark.scenario("retention", "Deletion interrupted")
async def test_a_deletion_that_is_interrupted_is_gone_on_with(store, counted, monkeypatch):
    monkeypatch.setattr(retention, "_ROWS", 10)
    run = await written(store, ["word "] * 50)
    await store.house.expire_contexts(-1000)
    there_is_more, failures = True, 0
    for statement in (2, 1, None) * 100:
        try:
            with interrupted_at(statement):
                there_is_more = await store.house.clear_contexts()
        except Interrupted:
            failures += 1
        await nobody_finds(store, run.context_id, run.message_id)
        if not there_is_more:
            break
    assert failures >= 5
    assert set(counted().values()) == {0}


@pytest.mark.scenario("retention", "Active context")
async def test_what_is_active_or_young_is_kept(store):
    done = await written(store, list("a reply"))
    running = await start(store)
    queued = await post(store)

    assert await store.house.expire_contexts(3_600_000) == []
    assert (await store.context(OWNER, done.context_id)).id == done.context_id

    (expired,) = await store.house.expire_contexts(-1000)
    assert expired.context_id == done.context_id
    for kept in (running.run.context_id, queued.context_id):
        assert (await store.context(OWNER, kept)).active_run is not None


async def test_the_longest_inactive_goes_first_and_so_many_at_once(store, monkeypatch):
    monkeypatch.setattr(retention, "_CONTEXTS", 2)
    runs = [await written(store, ["word "]) for _ in range(5)]
    expired = []
    while batch := await store.house.expire_contexts(-1000):
        assert len(batch) <= 2
        expired += batch
    assert [each.context_id for each in expired] == [run.context_id for run in runs]


@pytest.mark.scenario("retention", "Active context")
async def test_a_post_and_the_deletion_of_its_context_never_both_happen(store, counted):
    """Each of them locks the context, and looks at it afterwards."""
    done = await exchange(store, "Hello", "one")
    for _ in range(20):
        posted, expired = await asyncio.gather(
            store.post_message(OWNER, done.run.context_id, Post(text="And?")),
            store.house.expire_contexts(-1000),
            return_exceptions=True,
        )
        if expired:
            assert isinstance(posted, ContextNotFound)
            break
        assert not isinstance(posted, BaseException)
        writer = await claim(store)
        await writer.write("two", outcome=Outcome.SUCCEEDED)


async def test_a_context_that_is_being_cleared_is_not_compacted(store, rows, monkeypatch):
    monkeypatch.setattr(retention, "_ROWS", 10)
    await written(store, ["word "] * 50)
    await store.house.expire_contexts(-1000)
    await store.house.clear_contexts()
    assert await compact_all(store) == 0
    assert rows("SELECT count(*) FROM segments") == [(0,)]

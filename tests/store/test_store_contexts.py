"""Contexts: create, read, list, change, delete, and whose they are."""

from datetime import UTC, datetime, timedelta

import pytest

from context_server.errors import ContextNotFound, MessageNotFound, VersionMismatch
from context_server.records import Mode, RunStatus, State
from context_server.store import Store
from context_server.store.exchanges import Post
from context_server.store.reading import Subscription
from tests.store.writing import OWNER, STRANGER, claim, exchange, post, start


async def test_a_new_context_is_idle_at_version_one(store):
    context = await store.create_context(OWNER, title="Trip", mode=Mode.PLAN, metadata={"tags": ["a"], "n": None})

    assert (context.title, context.mode, context.metadata) == ("Trip", Mode.PLAN, {"tags": ["a"], "n": None})
    assert (context.state, context.version, context.owner) == (State.IDLE, 1, OWNER)
    assert (context.head_message_id, context.active_run) == (None, None)
    assert context.epoch == store.epoch
    assert context.created_at == context.updated_at
    assert datetime.now(UTC) - context.created_at < timedelta(seconds=5)
    assert await store.context(OWNER, context.id) == context


async def test_a_context_has_defaults(store):
    context = await store.create_context(OWNER)
    assert (context.title, context.mode, context.metadata) == (None, Mode.ACT, {})


async def test_a_busy_context_shows_its_run(store):
    receipt = await post(store)
    queued = (await store.context(OWNER, receipt.context_id)).active_run
    await claim(store)
    running = (await store.context(OWNER, receipt.context_id)).active_run

    assert queued is not None
    assert running is not None
    assert (
        (queued.id, queued.message_id)
        == (running.id, running.message_id)
        == (
            receipt.run_id,
            receipt.reply_message_id,
        )
    )
    assert (queued.status, queued.attempt) == (RunStatus.QUEUED, 0)
    assert (running.status, running.attempt) == (RunStatus.RUNNING, 1)


# Lists


async def test_contexts_are_listed_most_recently_active_first(store):
    made = [(await store.create_context(OWNER, title=str(number))).id for number in range(3)]
    await exchange(store, "Hello", context_id=made[0])

    listed, following = await store.contexts(OWNER)

    assert listed[0].id == made[0]
    assert {context.id for context in listed} == set(made)
    assert following is None


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8])
async def test_pages_of_contexts_hold_each_one_once_in_the_same_order(store, limit):
    for number in range(7):
        await store.create_context(OWNER, title=str(number))
    whole, _ = await store.contexts(OWNER, limit=200)

    pages = []
    before = None
    while not pages or before is not None:
        page, before = await store.contexts(OWNER, before=before, limit=limit)
        assert 0 < len(page) <= limit
        pages += page

    assert pages == whole
    assert len({context.id for context in pages}) == 7


async def test_a_page_that_ends_the_list_names_no_further_one(store):
    for _ in range(4):
        await store.create_context(OWNER)
    _, before = await store.contexts(OWNER, limit=2)
    page, following = await store.contexts(OWNER, before=before, limit=2)
    assert (len(page), following) == (2, None)


async def test_the_list_of_nobody_is_empty(store):
    assert await store.contexts(OWNER) == ([], None)


# Changes


async def test_a_change_raises_the_version_and_keeps_the_rest(store):
    context = await store.create_context(OWNER, title="Old", metadata={"a": 1})

    changed = await store.change_context(OWNER, context.id, {"title": "New"}, if_match=1)

    assert (changed.title, changed.metadata, changed.mode) == ("New", {"a": 1}, Mode.ACT)
    assert (changed.version, changed.state) == (2, State.IDLE)
    assert changed.updated_at >= context.updated_at
    assert await store.context(OWNER, context.id) == changed


async def test_a_change_of_everything(store):
    context = await store.create_context(OWNER, title="Old", metadata={"a": 1})
    changed = await store.change_context(OWNER, context.id, {"title": None, "mode": Mode.PLAN, "metadata": {}})
    assert (changed.title, changed.mode, changed.metadata) == (None, Mode.PLAN, {})


async def test_a_change_of_nothing_is_none(store):
    context = await store.create_context(OWNER)
    assert await store.change_context(OWNER, context.id, {}) == context


async def test_an_old_version_changes_nothing(store):
    context = await store.create_context(OWNER, title="First")
    second = await store.change_context(OWNER, context.id, {"title": "Second"})

    attempts = [
        lambda: store.change_context(OWNER, context.id, {"title": "Third"}, if_match=1),
        lambda: store.delete_context(OWNER, context.id, if_match=1),
        lambda: store.post_message(OWNER, context.id, Post(text="Hello"), if_match=1),
        lambda: store.request_cancel(OWNER, context.id, if_match=1),
    ]
    for attempt in attempts:
        with pytest.raises(VersionMismatch) as refusal:
            await attempt()
        assert refusal.value.version == 2

    assert await store.context(OWNER, context.id) == second
    assert await store.messages(OWNER, context.id) == ([], None)


async def test_a_change_while_a_run_is_on_does_not_disturb_it(store):
    writer = await start(store)
    await writer.write("one")
    await store.change_context(OWNER, writer.run.context_id, {"title": "Busy"})
    await writer.write("two")
    assert (await writer.message()).content == "onetwo"


# Deletion


async def test_a_deleted_context_is_gone_with_its_messages(store, rows):
    kept = await exchange(store, "Kept", "answer")
    gone = await exchange(store, "Gone", "answer")
    context_id, message_id = gone.run.context_id, gone.run.message_id

    deleted = await store.delete_context(OWNER, context_id, if_match=5)

    assert (deleted.id, deleted.version) == (context_id, 5)
    assert [context.id for context in (await store.contexts(OWNER))[0]] == [kept.run.context_id]
    with pytest.raises(ContextNotFound):
        await store.message(OWNER, context_id, message_id)
    assert rows("SELECT DISTINCT context_id FROM messages") == [(kept.run.context_id,)]
    assert rows("SELECT DISTINCT context_id FROM runs") == [(kept.run.context_id,)]
    assert rows("SELECT count(*) FROM chunks WHERE message_id NOT IN (SELECT id FROM messages)") == [(0,)]
    assert (await kept.message()).content == "answer"


async def test_deleting_a_busy_context_shows_the_run_that_it_had(store):
    writer = await start(store)
    deleted = await store.delete_context(OWNER, writer.run.context_id)
    assert deleted.active_run is not None
    assert deleted.active_run.id == writer.run.id
    assert await store.expired_runs() == []


# Owners


@pytest.mark.scenario("contexts", "Context of another owner")
async def test_a_context_of_another_owner_does_not_exist(store):
    writer = await exchange(store, "Mine", "answer")
    context_id, message_id = writer.run.context_id, writer.run.message_id
    before = await store.context(OWNER, context_id)

    for there in (context_id, "unknown"):
        attempts = [
            lambda there=there: store.context(STRANGER, there),
            lambda there=there: store.change_context(STRANGER, there, {"title": "Theirs"}),
            lambda there=there: store.delete_context(STRANGER, there),
            lambda there=there: store.post_message(STRANGER, there, Post(text="Hello")),
            lambda there=there: store.request_cancel(STRANGER, there),
            lambda there=there: store.messages(STRANGER, there),
            lambda there=there: store.message(STRANGER, there, message_id),
            lambda there=there: store.page(STRANGER, there, message_id),
            lambda there=there: store.snapshots(STRANGER, [Subscription(there)]),
        ]
        for attempt in attempts:
            with pytest.raises(ContextNotFound) as refusal:
                await attempt()
            assert str(refusal.value) == f"There is no context {there!r}."

    assert await store.contexts(STRANGER) == ([], None)
    assert await store.followed_contexts(STRANGER, recent=10, limit=10) == []
    assert await store.context(OWNER, context_id) == before


async def test_a_message_is_found_in_its_own_context_only(store: Store):
    writer = await exchange(store, "Mine", "answer")
    other = await store.create_context(OWNER)
    for attempt in (store.message, store.page):
        with pytest.raises(MessageNotFound):
            await attempt(OWNER, other.id, writer.run.message_id)

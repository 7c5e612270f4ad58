"""Idempotency keys: the work is done once, and its first answer is given again."""

import asyncio

import pytest

from context_server.errors import CommandNotAllowed, ContextNotFound, IdempotencyKeyReused
from context_server.records import State
from context_server.store.exchanges import Post
from context_server.store.idempotency import Once, Replayed
from tests.store.writing import OWNER, STRANGER, claim, post

HOUR_MS = 3_600_000


def once(key: str = "key-1", what: str = "post Hello", lifetime_ms: int = HOUR_MS) -> Once:
    return Once(key=key, fingerprint=what, encode=repr, lifetime_ms=lifetime_ms)


@pytest.mark.scenario("runs", "Repeat with the same key")
async def test_a_repeated_post_is_answered_as_the_first_time(store):
    context = await store.create_context(OWNER)
    receipt, _ = await store.post_message(OWNER, context.id, Post(text="Hello"), once=once())
    await claim(store)

    for _ in range(2):
        with pytest.raises(Replayed) as replay:
            await store.post_message(OWNER, context.id, Post(text="Hello"), once=once())
        assert replay.value.answer == repr(receipt)

    assert len((await store.messages(OWNER, context.id))[0]) == 2


async def test_a_repeated_creation_makes_one_context(store):
    context = await store.create_context(OWNER, title="Once", once=once())
    with pytest.raises(Replayed) as replay:
        await store.create_context(OWNER, title="Once", once=once())
    assert replay.value.answer == repr(context)
    assert len((await store.contexts(OWNER))[0]) == 1


async def test_a_repeated_cancel_is_answered_as_the_first_time(store):
    receipt = await post(store)
    context, _ = await store.request_cancel(OWNER, receipt.context_id, once=once())
    with pytest.raises(Replayed) as replay:
        await store.request_cancel(OWNER, receipt.context_id, once=once())
    assert replay.value.answer == repr(context)
    assert context.state is State.IDLE


@pytest.mark.scenario("runs", "Key with another body")
async def test_a_key_is_for_one_request(store):
    context = await store.create_context(OWNER)
    await store.post_message(OWNER, context.id, Post(text="Hello"), once=once())
    with pytest.raises(IdempotencyKeyReused):
        await store.post_message(OWNER, context.id, Post(text="Other"), once=once(what="post Other"))
    with pytest.raises(IdempotencyKeyReused):
        await store.request_cancel(OWNER, context.id, once=once(what="cancel"))
    assert (await store.context(OWNER, context.id)).state is State.QUEUED


async def test_each_owner_has_keys_of_its_own(store):
    mine = await store.create_context(OWNER, once=once())
    theirs = await store.create_context(STRANGER, once=once(what="something else"))
    assert mine.id != theirs.id


async def test_a_refused_request_does_not_use_up_its_key(store):
    receipt = await post(store)
    with pytest.raises(CommandNotAllowed):
        await store.post_message(OWNER, receipt.context_id, Post(text="Again"), once=once())
    with pytest.raises(ContextNotFound):
        await store.post_message(OWNER, "unknown", Post(text="Again"), once=once())
    await store.request_cancel(OWNER, receipt.context_id)
    again, _ = await store.post_message(OWNER, receipt.context_id, Post(text="Again"), once=once())
    assert again.state is State.QUEUED


@pytest.mark.scenario("runs", "Fifty posts with one key")
async def test_fifty_posts_at_once_are_one(store):
    context = await store.create_context(OWNER)

    async def attempt() -> str:
        try:
            receipt, _ = await store.post_message(OWNER, context.id, Post(text="Hello"), once=once())
        except Replayed as replay:
            return replay.answer
        return repr(receipt)

    answers = await asyncio.gather(*(attempt() for _ in range(50)))

    assert len(set(answers)) == 1
    assert len((await store.messages(OWNER, context.id))[0]) == 2


# Expiry


async def test_a_key_older_than_its_lifetime_counts_as_new(store, backdate):
    first = await store.create_context(OWNER, once=once())
    backdate(hours=2)
    second = await store.create_context(OWNER, once=once(what="something else"))
    assert first.id != second.id
    with pytest.raises(Replayed) as replay:
        await store.create_context(OWNER, once=once(what="something else"))
    assert replay.value.answer == repr(second)


async def test_a_key_younger_than_its_lifetime_counts(store, backdate):
    await store.create_context(OWNER, once=once(lifetime_ms=3 * HOUR_MS))
    backdate(hours=2)
    with pytest.raises(Replayed):
        await store.create_context(OWNER, once=once(lifetime_ms=3 * HOUR_MS))


async def test_old_keys_are_forgotten_oldest_first_and_in_batches(store, backdate, rows):
    for number in range(5):
        await store.create_context(OWNER, once=once(key=f"old-{number}"))
    backdate(hours=2)
    await store.create_context(OWNER, once=once(key="young"))

    assert await store.forget_idempotency_keys(HOUR_MS, limit=3) == 3
    assert await store.forget_idempotency_keys(HOUR_MS, limit=3) == 2
    assert await store.forget_idempotency_keys(HOUR_MS, limit=3) == 0
    assert rows("SELECT key FROM idempotency_keys") == [("young",)]

"""What a subscriber is told on connect: states, newest replies, and what ended meanwhile."""

import pytest

from context_server.errors import ContextNotFound
from context_server.records import ContentDelta, MessageCompleted, MessageStatus, Outcome, State
from context_server.store.reading import Subscription
from tests.store.writing import OWNER, exchange, post, start


async def snapshot_of(store, context_id, since=None):
    (snapshot,) = await store.snapshots(OWNER, [Subscription(context_id, since)])
    return snapshot


async def test_a_new_context_has_nothing_but_its_state(store):
    context = await store.create_context(OWNER)
    snapshot = await snapshot_of(store, context.id, since=0)
    assert (snapshot.state, snapshot.version, snapshot.run_id) == (State.IDLE, 1, None)
    assert (snapshot.newest, snapshot.newest_sequence, snapshot.ended) == (None, 0, ())


async def test_a_reply_without_output_is_not_told_of(store):
    writer = await start(store)
    snapshot = await snapshot_of(store, writer.run.context_id)
    assert (snapshot.state, snapshot.run_id) == (State.THINKING, writer.run.id)
    assert (snapshot.newest, snapshot.newest_sequence) == (None, 0)


@pytest.mark.scenario("signals", "Snapshot on connect")
async def test_an_open_reply_is_told_by_how_far_it_reaches(store):
    writer = await start(store)
    await writer.write("one", "two")
    snapshot = await snapshot_of(store, writer.run.context_id)
    assert isinstance(snapshot.newest, ContentDelta)
    assert (snapshot.newest.message_id, snapshot.newest.current_sequence) == (writer.run.message_id, 2)
    assert (snapshot.state, snapshot.version, snapshot.newest_sequence) == (State.STREAMING, 4, 2)


@pytest.mark.scenario("signals", "Subscribe after the reply has ended")
@pytest.mark.parametrize(
    ("outcome", "status"),
    [(Outcome.SUCCEEDED, MessageStatus.COMPLETED), (Outcome.FAILED, MessageStatus.FAILED)],
)
async def test_an_ended_reply_is_told_by_its_ending(store, outcome, status):
    writer = await exchange(store, "Hello", "one", outcome=outcome)
    snapshot = await snapshot_of(store, writer.run.context_id)
    newest = snapshot.newest
    assert isinstance(newest, MessageCompleted)
    assert (newest.message_id, newest.final_sequence, newest.status) == (writer.run.message_id, 1, status)
    assert (newest.version, snapshot.newest_sequence, snapshot.run_id) == (5, 1, None)


@pytest.mark.scenario("signals", "Reconnect with Last-Event-ID")
async def test_replies_that_ended_at_a_version_or_later_are_told_of_oldest_first(store):
    context = await store.create_context(OWNER)
    writers, versions = [], []
    for number in range(3):
        writers.append(await exchange(store, f"question {number}", "answer", context_id=context.id))
        versions.append((await store.context(OWNER, context.id)).version)

    async def ended_since(version: int) -> list[str]:
        return [completed.message_id for completed in (await snapshot_of(store, context.id, version)).ended]

    ids = [writer.run.message_id for writer in writers]
    assert await ended_since(0) == ids
    assert await ended_since(versions[0]) == ids
    assert await ended_since(versions[0] + 1) == ids[1:]
    assert await ended_since(versions[2]) == ids[2:]
    assert await ended_since(versions[2] + 1) == []
    assert (await snapshot_of(store, context.id)).ended == ()


async def test_snapshots_come_in_the_order_of_their_subscriptions(store):
    ids = [(await exchange(store, "Hello", "one")).run.context_id for _ in range(3)]
    wanted = [ids[2], ids[0], ids[1]]
    snapshots = await store.snapshots(OWNER, [Subscription(context_id) for context_id in wanted])
    assert [snapshot.context_id for snapshot in snapshots] == wanted
    assert await store.snapshots(OWNER, []) == []


async def test_one_unknown_context_refuses_them_all(store):
    context = await store.create_context(OWNER)
    with pytest.raises(ContextNotFound):
        await store.snapshots(OWNER, [Subscription(context.id), Subscription("unknown")])


async def test_a_context_that_has_gone_meanwhile_may_be_left_out(store):
    context = await store.create_context(OWNER)
    wanted = [Subscription("gone"), Subscription(context.id)]
    (snapshot,) = await store.snapshots(OWNER, wanted, all_must_exist=False)
    assert snapshot.context_id == context.id


async def test_followed_contexts_are_the_busy_ones_and_the_newest_each_once(store):
    busy_and_old = (await post(store)).context_id
    idle = [(await store.create_context(OWNER)).id for _ in range(3)]
    busy_and_new = (await post(store)).context_id

    followed = await store.followed_contexts(OWNER, recent=2, limit=10)

    assert set(followed[:2]) == {busy_and_old, busy_and_new}
    assert len(followed) == len(set(followed))
    assert set(followed) <= {busy_and_old, busy_and_new, *idle}
    assert len(await store.followed_contexts(OWNER, recent=10, limit=10)) == 5
    assert len(await store.followed_contexts(OWNER, recent=0, limit=1)) == 1

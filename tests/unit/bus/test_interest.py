"""What a node wants to hear: shards on Redis, everything elsewhere."""

import pytest

from context_server.bus import RunQueued
from context_server.bus.interest import SHARDS, Interest, shard_of
from context_server.records import new_id
from tests.unit.bus.nodes import PATIENT, moved, until


def test_interest_is_counted():
    interest = Interest()
    first, second = "01890a5d-ac96-774b-bcce-b302099a8057", "01890a5d-ac96-774b-bcce-b302099a8058"
    assert shard_of(first) != shard_of(second)
    interest.unfollow(first)
    interest.unfollow_all()
    for context_id in (first, first, second):
        interest.follow(context_id)
    assert interest.shards() == {shard_of(first), shard_of(second)}
    interest.unfollow(second)
    interest.unfollow(first)
    assert interest.shards() == {shard_of(first)}
    interest.follow_all()
    interest.follow_all()
    interest.unfollow_all()
    assert interest.shards() == set(range(SHARDS))
    interest.unfollow_all()
    interest.unfollow(first)
    assert interest.shards() == set()


def test_contexts_are_spread_over_all_shards():
    assert len({shard_of(new_id()) for _ in range(10_000)}) == SHARDS


@pytest.mark.scenario("wake-ups", "Only what is of interest, on Redis")
async def test_a_node_hears_of_the_contexts_that_it_follows(redis_server):
    context, other = new_id(), new_id()
    while shard_of(other) == shard_of(context):
        other = new_id()
    node = redis_server.node()
    async with redis_server.nodes(1) as (speaker,), node.bus:
        gaps = node.gaps
        node.bus.follow(context)
        await until(lambda: node.gaps > gaps)  # What was said before the server knew of the interest is to be read.
        for version in (1, 2):
            for context_id in (other, context):
                speaker.bus.publish(moved(context_id, version))
            speaker.bus.publish(RunQueued())
            await node.hears(moved(context, version), RunQueued())
            node.bus.unfollow(context)
            node.bus.follow(context)
            await until(lambda version=version: node.counted("wake_ups_received_total") >= 2 * version)
        assert set(node.heard) == {moved(context, 1), moved(context, 2), RunQueued()}


@pytest.mark.scenario("wake-ups", "Only what is of interest, on Redis")
async def test_interest_outlives_a_connection(redis_server):
    context = new_id()
    node = redis_server.node()
    node.bus.follow(context)
    async with redis_server.nodes(1) as (speaker,), node.bus:
        await redis_server.sever()
        await until(lambda: node.counted("bus_reconnects_total") == speaker.counted("bus_reconnects_total") == 1)
        speaker.bus.publish(moved(context))
        await node.hears(moved(context))


@pytest.mark.scenario("wake-ups", "Installations on one Redis")
async def test_installations_do_not_hear_each_other(redis_server):
    async with (
        redis_server.nodes(1, PATIENT, namespace="one") as (here,),
        redis_server.nodes(2, PATIENT, namespace="two") as (there, also_there),
    ):
        here.bus.publish(moved())
        here.bus.publish(RunQueued())
        await until(lambda: here.counted("wake_ups_sent_total") == 2)
        there.bus.publish(moved(context_id := new_id()))
        await also_there.hears(moved(context_id))
        assert also_there.heard == [moved(context_id)]

"""Two nodes on one server: every kind of bus must behave like this."""

import pytest

from context_server.bus import BusState, CancelRequested, Moved, RunDeleted, RunQueued
from context_server.bus.outbox import MAX_CONTEXTS
from context_server.records import new_id
from tests.unit.bus.nodes import OWNER, TAG, hear_each_other, moved, until


@pytest.mark.scenario("wake-ups", "Every wake-up reaches the other node")
async def test_each_kind_of_wake_up_arrives_as_it_was(server):
    run, context, message = new_id(), new_id(), new_id()
    said = [
        RunQueued(), CancelRequested(run), RunDeleted(run), Moved(context, TAG, 2**53 - 1, message, 0),
        Moved(new_id(), TAG, None, message, 2**53 - 1), Moved(new_id(), TAG, 0, None, None),
        Moved(new_id(), TAG, None, None, None),
    ]  # fmt: skip
    async with server.nodes(2) as (here, there):
        for wake_up in said:
            here.bus.publish(wake_up)
        await there.hears(*said)
        assert sorted(there.heard, key=repr) == sorted(said, key=repr)
        assert here.counted("wake_ups_sent_total") == there.counted("wake_ups_received_total") == len(said)


@pytest.mark.scenario("wake-ups", "Own wake-ups are heard once")
async def test_a_node_hears_its_own_wake_up_once_and_at_once(server):
    context = new_id()
    async with server.nodes(2) as (here, there):
        here.bus.publish(moved(context))
        assert here.own == [moved(context)]
        await there.hears(moved(context))
        # What the other says now comes after what was said before, on every server.
        there.bus.publish(moved(context, 2))
        await here.hears(moved(context, 2))
        assert (here.own, here.heard) == ([moved(context)], [moved(context, 2)])


@pytest.mark.scenario("wake-ups", "Much that moves is merged")
async def test_ten_thousand_wake_ups_of_a_few_contexts_arrive_merged_and_in_order(server):
    contexts = [new_id() for _ in range(100)]
    messages = {context: new_id() for context in contexts}
    async with server.nodes(2) as (here, there):
        for number in range(1, 101):
            for context in contexts:
                here.bus.publish(moved(context, number, message_id=messages[context], sequence=10 * number))
            here.bus.publish(RunQueued())
        await there.hears(*[moved(each, 100, message_id=messages[each], sequence=1000) for each in contexts])
        assert len(there.heard) < 1000
        for context in contexts:
            versions = [each.version for each in there.heard if isinstance(each, Moved) and each.context_id == context]
            assert versions == sorted(versions)
        assert len(here.own) == 10_100


@pytest.mark.scenario("wake-ups", "Too much that moves becomes a gap")
async def test_wake_ups_of_too_many_contexts_become_one_gap(server):
    async with server.nodes(2) as (here, there):
        gaps = there.gaps
        for _ in range(MAX_CONTEXTS + 1):
            here.bus.publish(moved())
        await until(lambda: there.gaps > gaps)
        assert here.counted("wake_ups_dropped_total", reason="overflow") == MAX_CONTEXTS + 1
        await hear_each_other([here, there])


@pytest.mark.scenario("wake-ups", "Rubbish on the channel")
async def test_rubbish_is_counted_and_dropped(server):
    async with server.nodes(2) as nodes:
        rubbish = ["", "rubbish", "1", "{}", "é" * 3000, "2" + "0" * 16 + " Q", "1" + "0" * 16 + " X", "x" * 7999]
        for payload in rubbish:
            await server.say(payload)
        await hear_each_other(nodes)
        for node in nodes:
            await until(lambda node=node: node.counted("wake_ups_dropped_total", reason="malformed") == len(rubbish))
            assert node.bus.state is BusState.CONNECTED


@pytest.mark.scenario("wake-ups", "No words on the channel")
async def test_neither_an_owners_name_nor_text_crosses(server):
    words = "what somebody wrote"
    async with server.nodes(2) as (here, there), server.overhear() as said:
        for wake_up in (
            Moved(new_id(), OWNER, 1, None, None),
            Moved(words, TAG, 1, new_id(), 1),
            Moved(new_id(), TAG, 1, words, 1),
            Moved(new_id(), TAG, words, None, None),
            Moved(new_id(), TAG, 1, new_id(), -1),
            CancelRequested(words),
            RunDeleted(words),
            moved(last := new_id()),
        ):
            here.bus.publish(wake_up)
        await there.hears(moved(last))
        await until(lambda: any(TAG in packet for packet in said))
        assert not [packet for packet in said if OWNER in packet or words in packet]
        assert all(len(packet.encode()) <= 7999 for packet in said)
        assert there.heard == [moved(last)]
        assert here.counted("wake_ups_dropped_total", reason="unsendable") == 7

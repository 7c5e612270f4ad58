"""What subscribers of one node are told of what another node writes."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from context_server.bus import BusState
from context_server.errors import DatabaseUnreachable
from context_server.records import (
    ContentDelta,
    ContextChanged,
    ContextDeleted,
    MessageCompleted,
    Outcome,
    State,
    StateChanged,
)
from context_server.relay import RelayLimits
from tests.databases import KINDS, emptied_database
from tests.unit.nodes import Node, Wire, cut, open_nodes
from tests.unit.rooms import OWNER, until

Nodes = tuple[Node, Node, Wire]


@pytest.fixture(params=KINDS)
def database_url(request: pytest.FixtureRequest, tmp_path) -> Iterator[str]:
    with emptied_database(request.param, tmp_path) as url:
        yield url


@pytest.fixture
async def nodes(database_url: str) -> AsyncIterator[Nodes]:
    """A node that writes, one that is read from, and the wire between them."""
    async with open_nodes(database_url) as opened:
        yield opened


@pytest.fixture
async def sqlite_nodes(tmp_path) -> AsyncIterator[Nodes]:
    """The same on SQLite alone, for what does not depend on the database."""
    async with open_nodes(f"sqlite:///{tmp_path / 'context-server.db'}") as opened:
        yield opened


def ended(told):
    return [signal.message_id for signal in told if isinstance(signal, MessageCompleted)]


def last_is(kind, **fields):
    """Whether the last signal is of a kind, with these fields."""
    return lambda told: (
        bool(told)
        and isinstance(told[-1], kind)
        and all(getattr(told[-1], name) == value for name, value in fields.items())
    )


def in_state(state):
    return lambda told: any(isinstance(signal, StateChanged) and signal.new_state is state for signal in told)


@pytest.mark.scenario("many-nodes", "Another node writes")
async def test_a_subscriber_follows_a_reply_that_another_node_writes(nodes: Nodes):
    writer, here, _ = nodes
    context = await writer.store.create_context(OWNER)
    async with here.subscribe(context.id) as subscriber:
        reply = await writer.begin(context.id)
        await subscriber.until(in_state(State.THINKING))
        await writer.write(reply, "one ", "two")
        await subscriber.until(
            lambda told: [s for s in told if isinstance(s, ContentDelta) and s.current_sequence == 2]
        )
        await writer.end(reply)
        told = await subscriber.until(ended)
        await subscriber.until(last_is(StateChanged, new_state=State.IDLE))

    completed = next(signal for signal in told if isinstance(signal, MessageCompleted))
    assert (completed.message_id, completed.final_sequence) == (reply.run.message_id, 2)
    deltas = [signal.current_sequence for signal in subscriber.of(ContentDelta)]
    assert deltas == sorted(deltas)
    assert deltas[-1] == 2
    versions = [signal.version for signal in subscriber.of(StateChanged)]
    assert versions == sorted(set(versions))


async def test_what_a_client_changes_or_deletes_on_one_node_is_told_on_the_other(nodes: Nodes):
    writer, here, _ = nodes
    context = await writer.store.create_context(OWNER)
    async with here.subscribe(context.id) as subscriber:
        await writer.commands.change_context(OWNER, context.id, {"title": "New"}, if_match=None)
        await subscriber.until(last_is(ContextChanged))
        assert len(subscriber.of(StateChanged)) == 1  # The one on connect.
        await writer.commands.delete_context(OWNER, context.id, if_match=None)
        await subscriber.until(last_is(ContextDeleted))
        assert subscriber.told[-1].version == 3


@pytest.mark.scenario("many-nodes", "All contexts of an owner")
async def test_a_subscriber_of_all_contexts_is_told_of_those_that_other_nodes_make(nodes: Nodes):
    writer, here, _ = nodes
    old = await writer.begin()
    async with here.subscribe() as subscriber:
        new = await writer.begin()
        await writer.write(new, "word")
        for reply in (old, new):
            await writer.end(reply)
        await subscriber.until(lambda told: len(ended(told)) == 2)
        await writer.commands.delete_context(OWNER, old.run.context_id, if_match=None)
        await subscriber.until(last_is(ContextDeleted))
    assert set(ended(subscriber.told)) == {old.run.message_id, new.run.message_id}
    assert here.bus.followed_all == 0


@pytest.mark.scenario("many-nodes", "Endings are neither lost nor repeated")
async def test_replies_that_ended_in_between_are_told_before_what_is_committed_here(sqlite_nodes: Nodes):
    writer, here, wire = sqlite_nodes
    context = await writer.store.create_context(OWNER)
    async with here.subscribe(context.id) as subscriber:
        with cut(wire):
            first = await writer.begin(context.id)
            await writer.write(first, "one")
            await writer.end(first)
        second = await here.begin(context.id)
        await here.write(second, "two")
        await here.end(second)
        await subscriber.until(lambda told: len(ended(told)) == 2 and last_is(StateChanged, new_state=State.IDLE)(told))
    assert ended(subscriber.told) == [first.run.message_id, second.run.message_id]
    versions = [signal.version for signal in subscriber.told if not isinstance(signal, ContentDelta)]
    assert versions == sorted(versions)


async def test_the_ending_of_a_run_that_is_reaped_here_follows_its_last_words(sqlite_nodes: Nodes):
    writer, here, wire = sqlite_nodes
    reply = await writer.begin()
    async with here.subscribe(reply.run.context_id) as subscriber:
        with cut(wire):
            await writer.write(reply, "one", "two")
            transition = await here.store.expire_run(reply.run)
            assert transition is not None
            here.hub.publish_transition(OWNER, transition)
        await subscriber.until(ended)
    assert {signal.current_sequence for signal in subscriber.of(ContentDelta)} == {2}


async def test_a_reply_that_is_written_here_is_told_at_once_and_by_nobody_else(sqlite_nodes: Nodes):
    here, other, _ = sqlite_nodes
    context = await here.store.create_context(OWNER)
    async with here.subscribe(context.id) as subscriber, other.subscribe(context.id) as elsewhere:
        subscriber.take()
        before = here.reads()
        reply = await here.begin(context.id)
        await here.write(reply, "one", "two")
        await here.end(reply)
        assert ended(subscriber.take()) == [reply.run.message_id]
        assert here.reads() == before
        await elsewhere.until(ended)
    assert here.bus.heard == []


async def test_a_cancel_on_another_node_is_told_where_the_reply_is_written(sqlite_nodes: Nodes):
    here, other, _ = sqlite_nodes
    reply = await here.begin()
    async with here.subscribe(reply.run.context_id) as subscriber:
        await other.commands.cancel(OWNER, reply.run.context_id, if_match=None, once=None)
        await subscriber.until(in_state(State.CANCELLING))
        await here.write(reply, "last")
        await here.end(reply, Outcome.STOPPED)
        await subscriber.until(last_is(StateChanged, new_state=State.IDLE))
    assert ended(subscriber.told) == [reply.run.message_id]
    assert [signal.current_sequence for signal in subscriber.of(ContentDelta)][-1] == 1


async def test_a_reply_that_this_node_has_lost_is_followed_like_others(sqlite_nodes: Nodes):
    here, other, wire = sqlite_nodes
    reply = await here.begin()
    await here.write(reply, "mine")
    async with here.subscribe(reply.run.context_id) as subscriber:
        with cut(wire):
            transition = await other.store.expire_run(reply.run)
            assert transition is not None
            here.ledger.drop(reply)
        await subscriber.until(ended)
        assert here.hub.heads(OWNER, [reply.run.context_id]) == []


@pytest.mark.scenario("many-nodes", "Heads of replies that other nodes write")
async def test_heartbeats_carry_heads_of_what_others_write_as_long_as_it_is_followed(sqlite_nodes: Nodes):
    writer, here, _ = sqlite_nodes
    reply = await writer.begin()
    await writer.write(reply, "one", "two")
    run = reply.run
    async with here.subscribe(run.context_id):
        assert here.hub.heads(OWNER, [run.context_id]) == [(run.context_id, run.message_id, 2)]
        async with here.subscribe():
            assert here.hub.heads(OWNER, None) == [(run.context_id, run.message_id, 2)]
        await writer.write(reply, "three")

        async def has_grown() -> bool:
            return here.hub.heads(OWNER, [run.context_id]) == [(run.context_id, run.message_id, 3)]

        await until(has_grown)
    assert here.hub.heads(OWNER, None) == []
    assert writer.hub.heads(OWNER, None) == [(run.context_id, run.message_id, 3)]


async def test_interest_ends_with_the_last_subscriber(sqlite_nodes: Nodes):
    writer, here, _ = sqlite_nodes
    context = await writer.store.create_context(OWNER)
    async with here.subscribe(context.id):
        async with here.subscribe(context.id):
            assert here.bus.followed == {context.id: 1}
        assert here.bus.followed == {context.id: 1}
    assert here.bus.followed == {}
    before = here.reads()
    reply = await writer.begin(context.id)
    await writer.end(reply)
    async with here.subscribe(context.id) as subscriber:  # One read, since it begins anew.
        assert here.reads() == before + 1
        assert ended(subscriber.take()) == [reply.run.message_id]


async def test_a_stream_of_a_context_that_is_not_there_waits_for_nothing(sqlite_nodes: Nodes):
    _, here, _ = sqlite_nodes
    with here.hub.subscribe(OWNER, ["never-was"]):
        await here.relay.ready(OWNER, ["never-was"])


# Lost wake-ups


SWEEPING = RelayLimits(distance=0.001, distance_per_signal=0.0, max_distance=0.001, sweep=0.1, sweep_deaf=0.1)
WITHOUT_SWEEP = RelayLimits(distance=0.001, distance_per_signal=0.0, max_distance=0.001, sweep=1e6, sweep_deaf=0.1)


async def test_a_sweep_repairs_what_lost_wake_ups_left(tmp_path):
    async with open_nodes(f"sqlite:///{tmp_path / 'context-server.db'}", limits=SWEEPING) as (writer, here, wire):
        context = await writer.store.create_context(OWNER)
        async with here.subscribe(context.id) as one, here.subscribe() as all_:
            wire.is_cut = True
            reply = await writer.begin(context.id)
            await writer.write(reply, "word")
            await writer.end(reply)
            new = await writer.begin()
            await writer.end(new)
            await one.until(ended)
            await all_.until(lambda told: len(ended(told)) == 2)
            await writer.commands.delete_context(OWNER, context.id, if_match=None)
            await one.until(last_is(ContextDeleted))
            await all_.until(last_is(ContextDeleted))


@pytest.mark.scenario("many-nodes", "Every wake-up is lost")
@pytest.mark.parametrize("limits", [SWEEPING, WITHOUT_SWEEP], ids=["sweep", "no sweep"])
async def test_without_the_sweep_a_lost_wake_up_leaves_a_subscriber_behind(tmp_path, limits):
    """The control: with the sweep off, reads for another context go by and nothing is told."""
    async with open_nodes(f"sqlite:///{tmp_path / 'context-server.db'}", limits=limits) as (writer, here, wire):
        reply, other = await writer.begin(), await writer.begin()
        async with here.subscribe(reply.run.context_id) as left, here.subscribe(other.run.context_id) as awake:
            with cut(wire):
                await writer.write(reply, "lost")
            for number in range(1, 6):
                await writer.write(other, "heard")
                await awake.until(lambda told, number=number: _reaches(told, number))
            if limits is SWEEPING:
                await left.until(lambda told: _reaches(told, 1))
            else:
                left.take()
                assert left.of(ContentDelta) == []


def _reaches(told, sequence):
    return any(isinstance(signal, ContentDelta) and signal.current_sequence >= sequence for signal in told)


async def test_a_gap_of_the_bus_has_everything_read(sqlite_nodes: Nodes):
    writer, here, wire = sqlite_nodes
    reply = await writer.begin()
    async with here.subscribe(reply.run.context_id) as subscriber:
        with cut(wire):
            await writer.write(reply, "lost")
        here.bus.tell_gap()
        await subscriber.until(lambda told: _reaches(told, 1))


async def test_a_node_that_hears_nobody_sweeps_more_often(tmp_path):
    limits = RelayLimits(distance=0.001, distance_per_signal=0.0, max_distance=0.001, sweep=1e6, sweep_deaf=0.1)
    async with open_nodes(f"sqlite:///{tmp_path / 'context-server.db'}", limits=limits) as (writer, here, wire):
        reply = await writer.begin()
        here.bus.state = BusState.POLLING
        async with here.subscribe(reply.run.context_id) as subscriber:
            with cut(wire):
                await writer.write(reply, "lost")
            await subscriber.until(lambda told: _reaches(told, 1))


# Reads


async def test_one_read_serves_all_contexts_that_moved_meanwhile(tmp_path):
    limits = RelayLimits(distance=0.5, distance_per_signal=0.0, max_distance=0.5)
    async with open_nodes(f"sqlite:///{tmp_path / 'context-server.db'}", limits=limits) as (writer, here, _):
        replies = [await writer.begin() for _ in range(20)]
        async with here.subscribe(*[reply.run.context_id for reply in replies]) as subscriber:
            before = here.reads()
            for reply in replies:
                await writer.write(reply, "word")
            await subscriber.until(lambda told: sum(isinstance(signal, ContentDelta) for signal in told) == 20)
            assert here.reads() <= before + 4


@pytest.mark.scenario("many-nodes", "A thousand followers")
async def test_reads_do_not_grow_with_the_number_of_followers(tmp_path):
    counts = {}
    limits = RelayLimits(max_distance=0.05)
    async with open_nodes(f"sqlite:///{tmp_path / 'context-server.db'}", limits=limits) as (writer, here, _):
        for followers in (1, 300):
            reply = await writer.begin()
            run = reply.run
            before = here.reads(), here.pulls("database")
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(_follow(here, run)) for _ in range(followers)]
                for _ in range(20):
                    await writer.write(reply, "word ")
                    await asyncio.sleep(0.01)  # A reply takes some time; otherwise one read would find all of it.
                await writer.end(reply)
            assert {task.result() for task in tasks} == {"word " * 20}
            counts[followers] = here.reads() - before[0] + here.pulls("database") - before[1]
    assert counts[300] <= 2 * counts[1] + 4


async def _follow(node: Node, run) -> str:
    """Follows a reply as a careful client does; its text."""
    text, held = "", 0
    async with node.subscribe(run.context_id) as subscriber:
        while True:
            completed = [signal for signal in subscriber.told if isinstance(signal, MessageCompleted)]
            if completed and completed[0].final_sequence == held:
                return text
            page = await node.pull(run, held)
            text += "".join(chunk.text or "" for chunk in page.chunks)
            held = page.sequence
            if not page.chunks and not completed:
                await subscriber.mailbox.wait(None)
            subscriber.take()


async def test_an_unreachable_database_delays_and_loses_nothing(sqlite_nodes: Nodes, monkeypatch, caplog):
    writer, here, _ = sqlite_nodes
    reply = await writer.begin()
    async with here.subscribe(reply.run.context_id) as subscriber:
        read, failures = here.store.following.movements, []

        async def unreachable(*_args, **_options):
            failures.append(1)
            raise DatabaseUnreachable

        here.store.following.movements = unreachable
        await writer.write(reply, "word")
        with pytest.raises(DatabaseUnreachable):
            await here.relay.next_read()

        async def has_tried_again() -> bool:
            return len(failures) > 2

        await until(has_tried_again)
        here.store.following.movements = read
        await subscriber.until(lambda told: _reaches(told, 1))
        await here.relay.next_read()

"""Pulls of messages that another node writes: from memory, from the relay's next read, from the database."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from context_server.errors import ContextNotFound, DatabaseUnreachable, SequenceAhead
from context_server.reader import Reader
from context_server.records import MessageStatus, Page
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
async def nodes(tmp_path) -> AsyncIterator[Nodes]:
    """A node that writes, one that is pulled from, and the wire between them."""
    async with open_nodes(f"sqlite:///{tmp_path / 'context-server.db'}") as opened:
        yield opened


def text(page: Page) -> str:
    return "".join(chunk.text or "" for chunk in page.chunks)


async def reaches(node: Node, message_id: str, sequence: int) -> None:
    """Waits until memory holds a message up to a sequence."""

    async def held() -> bool:
        tail = node.recent.find(message_id)
        return tail is not None and tail.sequence >= sequence

    await until(held)


@pytest.mark.scenario("many-nodes", "Pull on another node")
async def test_a_reply_of_another_node_is_pulled_from_memory_as_it_grows(database_url):
    async with open_nodes(database_url) as (writer, here, _):
        reply = await writer.begin()
        await writer.write(reply, "one ")
        held, words = 0, ""
        for word in ("two ", "three ", "four"):
            page = await here.pull(reply.run, held)
            held, words = page.sequence, words + text(page)
            await writer.write(reply, word)
            await reaches(here, reply.run.message_id, held + 1)
        await writer.end(reply)

        async def has_ended() -> bool:
            tail = here.recent.find(reply.run.message_id)
            return tail is not None and tail.final_sequence is not None

        await until(has_ended)
        page = await here.pull(reply.run, held)

    assert words + text(page) == "one two three four"
    assert (page.status, page.final_sequence, page.up_to_date) == (MessageStatus.COMPLETED, 4, True)
    assert page.digest is not None
    assert (here.pulls("database"), here.pulls("memory")) == (1, 3)


@pytest.mark.scenario("many-nodes", "Nothing new")
async def test_pulls_that_find_nothing_new_share_the_next_read(tmp_path):
    limits = RelayLimits(distance=0.2, max_distance=0.2)
    async with open_nodes(f"sqlite:///{tmp_path / 'context-server.db'}", limits=limits) as (writer, here, wire):
        reply = await writer.begin()
        await writer.write(reply, "one")
        await here.pull(reply.run)
        await here.relay.next_read()  # What the first pull has asked for is done.
        wire.is_cut = True
        await writer.write(reply, "two")
        before = here.reads()
        pages = await asyncio.gather(*(here.pull(reply.run, 1) for _ in range(100)))
        assert {text(page) for page in pages} == {"two"}
        assert here.reads() == before + 1
        assert here.pulls("relay") == 100


async def test_a_pull_that_is_ahead_of_memory_asks_before_it_is_refused(nodes: Nodes):
    writer, here, wire = nodes
    reply = await writer.begin()
    await writer.write(reply, "one")
    await here.pull(reply.run)
    with cut(wire):
        await writer.write(reply, "two", "three")
        page = await here.pull(reply.run, 3)  # The client was told of it by the other node.
        assert (text(page), page.sequence, page.head) == ("", 3, 3)
        with pytest.raises(SequenceAhead) as refusal:
            await here.pull(reply.run, 4)
    assert refusal.value.sequence == 3


async def test_a_reply_that_is_written_here_is_pulled_without_a_read(nodes: Nodes):
    here, _, _ = nodes
    reply = await here.begin()
    await here.write(reply, "one")
    assert [text(await here.pull(reply.run, start)) for start in (0, 1)] == ["one", ""]
    with pytest.raises(SequenceAhead):
        await here.pull(reply.run, 2)
    assert (here.reads(), here.pulls("memory"), here.pulls("database")) == (0, 2, 1)


# Many at once


@pytest.mark.scenario("many-nodes", "A thousand join at once")
@pytest.mark.parametrize("is_shared", [True, False], ids=["shared", "each its own"])
async def test_first_pulls_at_once_cost_one_read(nodes: Nodes, monkeypatch, is_shared):
    """The control: where each opens for itself, reads grow with those who join."""
    writer, here, _ = nodes
    reply = await writer.begin()
    await writer.write(reply, "one")
    if not is_shared:
        monkeypatch.setattr(Reader, "_relayed_page", lambda self, relay, *pull: self._open(relay, *pull))
        monkeypatch.setattr(Reader, "_opened", lambda *_: None)
    pages = await asyncio.gather(*(here.pull(reply.run) for _ in range(100)))
    assert {text(page) for page in pages} == {"one"}
    assert here.pulls("database") == (1 if is_shared else 100)


@pytest.mark.scenario("many-nodes", "A thousand join at once")
async def test_last_pulls_cost_no_read(nodes: Nodes):
    writer, here, wire = nodes
    reply = await writer.begin()
    await writer.write(reply, "one")
    await here.pull(reply.run)
    await writer.write(reply, "two")
    await writer.end(reply)

    async def has_ended() -> bool:
        tail = here.recent.find(reply.run.message_id)
        return tail is not None and tail.final_sequence is not None

    await until(has_ended)
    wire.is_cut = True
    before = here.reads(), here.pulls("database")
    pages = [await here.pull(reply.run, start) for start in (0, 1, 2) for _ in range(50)]
    assert {page.final_sequence for page in pages} == {2}
    assert (here.reads(), here.pulls("database")) == before


async def test_whoever_joins_while_the_first_pull_reads_misses_nothing(nodes: Nodes):
    writer, here, wire = nodes
    reply = await writer.begin()
    await writer.write(reply, "one")
    read, may_answer, has_read = here.store.following.opening, asyncio.Event(), asyncio.Event()

    async def slow(*what, **bounds):
        found = await read(*what, **bounds)
        has_read.set()
        await may_answer.wait()
        return found

    here.store.following.opening = slow
    wire.is_cut = True
    first = asyncio.create_task(here.pull(reply.run))
    await has_read.wait()
    await writer.write(reply, "two")
    joins = [asyncio.create_task(here.pull(reply.run, held)) for held in (0, 1, 2)]
    await asyncio.sleep(0)
    may_answer.set()
    assert text(await first) == "one"
    # Something new is an answer, though there is more; nothing new is one only when that is so.
    assert [text(page) for page in await asyncio.gather(*joins)] in (["one", "two", ""], ["onetwo", "two", ""])


# What memory holds


async def test_a_long_reply_is_held_from_where_it_was_asked_for(tmp_path):
    url = f"sqlite:///{tmp_path / 'context-server.db'}"
    async with open_nodes(url, recent_bytes=50_000_000) as (writer, here, _):
        reply = await writer.begin()
        for _ in range(20):
            await writer.write(reply, "x" * 65_536)
        far = await here.pull(reply.run, 0)
        assert (far.sequence, far.up_to_date) == (16, False)
        assert here.recent.find(reply.run.message_id) is None
        near = await here.pull(reply.run, 16)
        assert (near.sequence, near.up_to_date) == (20, True)
        tail = here.recent.find(reply.run.message_id)
        assert tail is not None
        assert tail.first == 17
        assert (await here.pull(reply.run, 0)).chunks == far.chunks  # From the database, beyond what memory holds.


async def test_a_burst_is_read_in_parts(tmp_path):
    limits = RelayLimits(distance=0.001, distance_per_signal=0, max_read_bytes=1000)
    async with open_nodes(f"sqlite:///{tmp_path / 'context-server.db'}", limits=limits) as (writer, here, wire):
        reply = await writer.begin()
        await here.pull(reply.run)
        with cut(wire):
            await writer.write(reply, *["x" * 400] * 20)
            await writer.end(reply)
        held, words = 0, ""
        while held < 20:
            page = await here.pull(reply.run, held)
            held, words = page.sequence, words + text(page)
        assert words == "x" * 8000
        assert here.reads() >= 6
        await here.relay.next_read()
        assert (await here.pull(reply.run, 20)).final_sequence == 20


@pytest.mark.scenario("many-nodes", "Deleted on another node")
async def test_a_context_that_was_deleted_elsewhere_is_not_served_from_memory_for_long(tmp_path):
    limits = RelayLimits(distance=0.001, max_distance=0.001, sweep=0.2, sweep_deaf=0.1, fresh=0.3)
    async with open_nodes(f"sqlite:///{tmp_path / 'context-server.db'}", limits=limits) as (writer, here, wire):
        open_, ended = await writer.begin(), await writer.begin()
        for reply in (open_, ended):
            await writer.write(reply, "word")
            await here.pull(reply.run)
        await writer.end(ended)

        async def has_ended() -> bool:
            return (await here.pull(ended.run)).final_sequence is not None

        await until(has_ended)
        wire.is_cut = True
        for reply in (open_, ended):
            await writer.commands.delete_context(OWNER, reply.run.context_id, if_match=None)

            async def is_gone(reply=reply) -> bool:
                try:
                    await here.pull(reply.run)
                except ContextNotFound:
                    return True
                return False

            await until(is_gone)
            assert here.recent.find(reply.run.message_id) is None


async def test_a_message_that_nobody_pulls_any_more_is_forgotten(tmp_path):
    limits = RelayLimits(distance=0.001, max_distance=0.001, sweep=0.1, sweep_deaf=0.1, pulled=0.2)
    async with open_nodes(f"sqlite:///{tmp_path / 'context-server.db'}", limits=limits) as (writer, here, _):
        watched, left = await writer.begin(), await writer.begin()
        with here.hub.watch(watched.run.message_id):
            for reply in (watched, left):
                await here.pull(reply.run)

            async def is_forgotten() -> bool:
                return here.recent.find(left.run.message_id) is None

            await until(is_forgotten)
            assert here.bus.followed == {watched.run.context_id: 1}
            assert here.recent.find(watched.run.message_id) is not None


@pytest.mark.scenario("many-nodes", "Long poll on another node")
async def test_whoever_waits_for_a_message_is_woken_by_a_read(nodes: Nodes):
    writer, here, _ = nodes
    reply = await writer.begin()
    run = reply.run
    with here.hub.watch(run.message_id) as watch:
        page = await here.pull(run)
        assert text(page) == ""
        for number, word in enumerate(("one", "two")):
            watch.clear()
            page = await here.reader.page(OWNER, run.context_id, run.message_id, number, is_watched=True)
            assert text(page) == ""  # Without a read: it will be told.
            await writer.write(reply, word)
            assert await watch.wait(20)
            page = await here.reader.page(OWNER, run.context_id, run.message_id, number, is_watched=True)
            assert text(page) == word
        watch.clear()
        await writer.commands.delete_context(OWNER, run.context_id, if_match=None)
        assert await watch.wait(20)
        with pytest.raises(ContextNotFound):
            await here.pull(run, 2)


async def test_a_message_that_was_pulled_here_may_be_written_here_later(nodes: Nodes):
    here, other, _ = nodes
    receipt = await other.post()
    page = await here.reader.page(OWNER, receipt.context_id, receipt.reply_message_id, 0)
    assert page.status is MessageStatus.PENDING
    reply = await here.claim()
    await here.write(reply, "one")
    assert [text(await node.pull(reply.run)) for node in (here, other)] == ["one", "one"]


async def test_memory_serves_nobody_elses_messages(nodes: Nodes):
    writer, here, _ = nodes
    reply = await writer.begin()
    await writer.write(reply, "one")
    run = reply.run
    await here.pull(run)
    with pytest.raises(ContextNotFound):
        await here.reader.page("somebody else", run.context_id, run.message_id, 0)
    with pytest.raises(ContextNotFound):
        await here.reader.page(OWNER, "another", run.message_id, 0)


async def test_pulls_are_refused_while_the_database_is_away_and_go_on_later(nodes: Nodes):
    writer, here, _ = nodes
    reply = await writer.begin()
    await writer.write(reply, "one")
    await here.pull(reply.run)
    await here.relay.next_read()
    read = here.store.following.movements

    async def unreachable(*_args, **_options):
        raise DatabaseUnreachable

    here.store.following.movements = unreachable
    with pytest.raises(DatabaseUnreachable):
        await here.pull(reply.run, 1)
    here.store.following.movements = read
    assert text(await here.pull(reply.run, 1)) == ""

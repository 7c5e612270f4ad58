"""The tree of a context's messages: lines, siblings, heads, and forks that share their text."""

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from sqlalchemy import Engine, event

from context_server.errors import CommandNotAllowed, ContextNotFound, MessageNotFound, MessageOpen
from context_server.records import Context, IfBusy, Message, Outcome, Role, State, new_id
from context_server.store import Store, compaction
from context_server.store.exchanges import Post
from context_server.store.maintenance import change_schema
from context_server.store.reading import Subscription
from tests.databases import beside, run_beside
from tests.store.asking import suspended
from tests.store.compacting import compact_all
from tests.store.writing import OWNER, STRANGER, Writer, claim, exchange, post, sha256, start


async def say(store: Store, context_id: str, text: str, answer: str, **options) -> Writer:
    """A message and its whole reply."""
    await store.post_message(OWNER, context_id, Post(text=text, **options))
    writer = await claim(store)
    await writer.write(answer, outcome=Outcome.SUCCEEDED)
    return writer


async def line(store: Store, context_id: str) -> list[str]:
    found, following = await store.messages(OWNER, context_id, include_content=True)
    assert following is None
    return [message.content for message in found]


async def tree(store: Store, context_id: str) -> list[Message]:
    return (await store.messages(OWNER, context_id, include_content=True, tree=True))[0]


@dataclass
class Talk:
    """A context of two exchanges, ``a → b → c → d``, and the ids of its messages."""

    store: Store
    id: str
    of: dict[str, str] = field(default_factory=dict)

    async def name(self) -> None:
        self.of = {message.content: message.id for message in await tree(self.store, self.id)}


@pytest.fixture
async def talk(store: Store) -> Talk:
    context = await store.create_context(OWNER, title="talk", metadata={"k": 1})
    await say(store, context.id, "a", "b")
    await say(store, context.id, "c", "d")
    made = Talk(store, context.id)
    await made.name()
    return made


# Branches


@pytest.mark.scenario("branches", "An earlier message is edited")
async def test_a_message_with_a_parent_begins_a_branch(store, talk):
    writer = await say(store, talk.id, "c2", "d2", parent_id=talk.of["b"])
    assert await line(store, talk.id) == ["a", "b", "c2", "d2"]
    history = await store.history(writer.run, max_bytes=1000)
    assert [turn.text for turn in history] == ["a", "b", "c2"]
    found, _ = await store.messages(OWNER, talk.id)
    assert [len(message.siblings) for message in found] == [1, 1, 2, 1]
    assert found[2].siblings == (talk.of["c"], found[2].id)
    assert [message.parent_id for message in found] == [None, *(message.id for message in found[:-1])]


@pytest.mark.scenario("branches", "The first message is edited")
async def test_a_message_without_a_parent_begins_afresh(store, talk):
    writer = await say(store, talk.id, "a2", "b2", parent_id=None)
    assert await line(store, talk.id) == ["a2", "b2"]
    assert [turn.text for turn in await store.history(writer.run, max_bytes=1000)] == ["a2"]
    found, _ = await store.messages(OWNER, talk.id)
    assert found[0].siblings == (talk.of["a"], found[0].id)
    assert len(await tree(store, talk.id)) == 6


async def test_a_parent_must_be_of_the_context(store, talk):
    other = await exchange(store)
    before = await store.context(OWNER, talk.id)
    for parent_id in (other.run.message_id, new_id(), talk.id):
        with pytest.raises(MessageNotFound):
            await store.post_message(OWNER, talk.id, Post(text="x", parent_id=parent_id))
    assert await store.context(OWNER, talk.id) == before


@pytest.mark.scenario("branches", "A reply is regenerated")
@pytest.mark.parametrize("named", ["c", "d"])
async def test_a_regenerated_reply_stands_beside_the_first(store, talk, named):
    receipt, transition = await store.regenerate(OWNER, talk.id, talk.of[named])
    assert (receipt.message_id, receipt.state, transition.state) == (talk.of["c"], State.QUEUED, State.QUEUED)
    writer = await claim(store)
    assert [turn.text for turn in await store.history(writer.run, max_bytes=1000)] == ["a", "b", "c"]
    await writer.write("d2", outcome=Outcome.SUCCEEDED)
    assert await line(store, talk.id) == ["a", "b", "c", "d2"]
    found, _ = await store.messages(OWNER, talk.id)
    assert found[-1].siblings == (talk.of["d"], receipt.reply_message_id)
    assert (await store.message(OWNER, talk.id, talk.of["d"])).content == "d"


async def test_a_reply_early_in_the_line_is_regenerated_without_what_followed(store, talk):
    await store.regenerate(OWNER, talk.id, talk.of["b"])
    writer = await claim(store)
    await writer.write("b2", outcome=Outcome.FAILED)
    assert await line(store, talk.id) == ["a", "b2"]


async def test_a_busy_context_regenerates_nothing(store, talk):
    await post(store, context_id=talk.id)
    with pytest.raises(CommandNotAllowed):
        await store.regenerate(OWNER, talk.id, talk.of["d"])
    with pytest.raises(MessageNotFound):
        await store.regenerate(OWNER, talk.id, new_id())
    with pytest.raises(ContextNotFound):
        await store.regenerate(STRANGER, talk.id, talk.of["d"])


@pytest.mark.scenario("branches", "The head moves between branches")
async def test_the_head_moves_between_branches(store, talk):
    await say(store, talk.id, "c2", "d2", parent_id=talk.of["b"])
    before = await store.context(OWNER, talk.id)

    moved = await store.change_context(OWNER, talk.id, {"head_message_id": talk.of["d"]}, if_match=before.version)

    assert (moved.head_message_id, moved.version, moved.state) == (talk.of["d"], before.version + 1, State.IDLE)
    assert await line(store, talk.id) == ["a", "b", "c", "d"]
    await say(store, talk.id, "e", "f")
    assert await line(store, talk.id) == ["a", "b", "c", "d", "e", "f"]


@pytest.mark.scenario("branches", "A fresh start")
async def test_without_a_head_the_line_is_empty_and_the_next_message_begins_afresh(store, talk):
    await store.change_context(OWNER, talk.id, {"head_message_id": None})
    assert await line(store, talk.id) == []
    assert len(await tree(store, talk.id)) == 4
    writer = await say(store, talk.id, "a2", "b2")
    assert [turn.text for turn in await store.history(writer.run, max_bytes=1000)] == ["a2"]
    (snapshot,) = await store.snapshots(OWNER, [Subscription(talk.id)])
    assert snapshot.newest.message_id == writer.run.message_id


@pytest.mark.scenario("branches", "The head of a busy context")
async def test_the_head_of_a_busy_context_stays(store, talk):
    other = await exchange(store)
    await post(store, context_id=talk.id)
    before = await store.context(OWNER, talk.id)
    for head in (talk.of["b"], None):
        with pytest.raises(CommandNotAllowed):
            await store.change_context(OWNER, talk.id, {"head_message_id": head})
    assert await store.context(OWNER, talk.id) == before
    await store.request_cancel(OWNER, talk.id)
    with pytest.raises(MessageNotFound):
        await store.change_context(OWNER, talk.id, {"head_message_id": other.run.message_id})


async def test_a_subscriber_is_told_of_the_reply_at_the_head(store, talk):
    await say(store, talk.id, "c2", "d2", parent_id=talk.of["b"])
    await store.change_context(OWNER, talk.id, {"head_message_id": talk.of["b"]})
    (snapshot,) = await store.snapshots(OWNER, [Subscription(talk.id)])
    assert snapshot.newest.message_id == talk.of["b"]


# Listing


@dataclass
class Tree:
    """A context whose messages form a tree, as the test remembers it."""

    id: str
    parents: dict[str, str | None] = field(default_factory=dict)

    def line(self, head: str | None) -> list[str]:
        found = []
        while head is not None:
            found.append(head)
            head = self.parents[head]
        return found[::-1]

    def siblings(self, message_id: str) -> tuple[str, ...]:
        return tuple(key for key, parent in self.parents.items() if parent == self.parents[message_id])


async def grown(store: Store, database_url: str, *, messages: int, branches: int) -> Tree:
    """A tree of so many messages, written beside the store; each branch leaves the others at some place."""
    context = await store.create_context(OWNER)
    made = Tree(context.id)
    chosen = random.Random(1)
    rows = []
    tip: str | None = None
    for number in range(messages):
        if number % (messages // branches) == 0 and rows:
            tip = chosen.choice(rows)["id"]
        row = {"id": new_id(), "context": context.id, "position": number + 1, "parent": tip,
               "role": "user" if number % 2 == 0 else "assistant", "digest": sha256("")}  # fmt: skip
        rows.append(row)
        made.parents[row["id"]] = tip
        tip = row["id"]
    with beside(database_url).begin() as connection:
        mark = "?" if connection.dialect.name == "sqlite" else "%s"
        connection.exec_driver_sql(
            "INSERT INTO messages (id, context_id, position, parent_id, role, digest, status, sequence, final_sequence,"
            " content_bytes, attempt, client_metadata, created_at, completed_at, ended_version)"
            f" VALUES ({', '.join([mark] * 6)}, 'completed', 0, 0, 0, 1, '{{}}', 1, 1, 1)",
            [tuple(row.values()) for row in rows],
        )
    run_beside(database_url, f"UPDATE contexts SET message_count = {messages}, head_message_id = '{tip}'")
    return made


@contextmanager
def counted() -> Iterator[list[str]]:
    """The statements that are executed meanwhile."""
    executed: list[str] = []

    def record(_connection, _cursor, statement, *_):
        executed.append(statement)

    event.listen(Engine, "before_cursor_execute", record)
    try:
        yield executed
    finally:
        event.remove(Engine, "before_cursor_execute", record)


@pytest.mark.scenario("branches", "Large tree")
async def test_a_line_of_a_large_tree_is_one_statement(store, database_url):
    made = await grown(store, database_url, messages=1000, branches=50)
    heads = list(made.parents)[19::20]
    assert len(heads) == 50
    for head in heads:
        await store.change_context(OWNER, made.id, {"head_message_id": head})
        with counted() as executed:
            found, following = await store.messages(OWNER, made.id, limit=1000)
        assert [message.id for message in found] == made.line(head)
        assert following is None
        read = [statement for statement in executed if re.match(r"\s*(SELECT|WITH)", statement)]
        # Whether the context is there, and its line.
        assert ["RECURSIVE" in statement for statement in read] == [False, True]
    assert [message.siblings for message in found] == [made.siblings(message.id) for message in found]


async def test_pages_of_a_line_join_without_a_gap(store, database_url):
    made = await grown(store, database_url, messages=200, branches=10)
    head = (await store.context(OWNER, made.id)).head_message_id
    for is_tree, expected in ((False, made.line(head)), (True, list(made.parents))):
        seen, after = [], 0
        while after is not None:
            page, after = await store.messages(OWNER, made.id, after=after, limit=7, tree=is_tree)
            assert len(page) <= 7
            seen += page
        assert [message.id for message in seen] == expected
        assert all(message.siblings == made.siblings(message.id) for message in seen)


async def test_a_page_with_content_ends_where_its_bytes_do(store, talk):
    seen, after = [], 0
    while after is not None:
        page, after = await store.messages(OWNER, talk.id, after=after, include_content=True, max_bytes=2)
        seen += [message.content for message in page]
    assert seen == ["a", "b", "c", "d"]


async def test_a_history_is_no_longer_than_its_limit(store, database_url):
    made = await grown(store, database_url, messages=1000, branches=1)
    await store.post_message(OWNER, made.id, Post(text="And?"))
    writer = await claim(store)
    history = await store.history(writer.run, max_bytes=2**30)
    assert len(history) == 500
    assert history[-1].text == "And?"


# Forks


@pytest.mark.scenario("branches", "Fork")
async def test_a_fork_shares_the_text_of_its_line(store, talk, rows):
    await say(store, talk.id, "c2", "d2", parent_id=talk.of["b"])
    chunks = rows("SELECT count(*) FROM chunks")

    fork = await store.fork_context(OWNER, talk.id, talk.of["d"], title=None)

    assert rows("SELECT count(*) FROM chunks") == chunks
    assert (fork.state, fork.version, fork.title, fork.metadata) == (State.IDLE, 1, "talk", {"k": 1})
    assert fork.id != talk.id
    assert await line(store, fork.id) == ["a", "b", "c", "d"]
    found = await tree(store, fork.id)
    assert [message.parent_id for message in found] == [None, *(message.id for message in found[:-1])]
    assert [message.role for message in found] == [Role.USER, Role.ASSISTANT] * 2
    assert all(message.context_id == fork.id and message.siblings == (message.id,) for message in found)
    assert not {message.id for message in found} & set(talk.of.values())
    page = await store.page(OWNER, fork.id, found[-1].id)
    assert [chunk.text for chunk in page.chunks] == ["d"]
    assert page.digest == sha256("d")
    assert (await store.message(OWNER, fork.id, found[0].id)).content == "a"


@pytest.mark.scenario("branches", "Fork goes its own way")
async def test_a_fork_and_its_source_go_their_own_ways(store, talk):
    fork = await store.fork_context(OWNER, talk.id, talk.of["b"], title="other")
    assert fork.title == "other"
    writer = await say(store, fork.id, "x", "y")
    assert [turn.text for turn in await store.history(writer.run, max_bytes=1000)] == ["a", "b", "x"]
    await say(store, talk.id, "e", "f")
    assert await line(store, fork.id) == ["a", "b", "x", "y"]
    assert await line(store, talk.id) == ["a", "b", "c", "d", "e", "f"]
    with pytest.raises(MessageNotFound):
        await store.page(OWNER, fork.id, talk.of["b"])


@pytest.mark.scenario("branches", "Fork of what is open")
async def test_what_is_open_or_follows_what_is_open_is_not_forked(store, talk):
    writer = await start(store, "e", context_id=talk.id)
    await writer.write("f")
    waits, _ = await store.post_message(OWNER, talk.id, Post(text="g", if_busy=IfBusy.QUEUE))
    steers, _ = await store.post_message(OWNER, talk.id, Post(text="h", if_busy=IfBusy.STEER))
    for open_message in (writer.run.message_id, waits.message_id, waits.reply_message_id, steers.message_id):
        with pytest.raises(MessageOpen):
            await store.fork_context(OWNER, talk.id, open_message, title=None)
    fork = await store.fork_context(OWNER, talk.id, talk.of["d"], title=None)
    assert await line(store, fork.id) == ["a", "b", "c", "d"]


async def test_only_the_owner_forks(store, talk):
    with pytest.raises(ContextNotFound):
        await store.fork_context(STRANGER, talk.id, talk.of["d"], title=None)
    with pytest.raises(MessageNotFound):
        await store.fork_context(OWNER, talk.id, new_id(), title=None)


async def test_what_steered_a_run_stands_in_a_fork_and_steers_nothing_there(store, talk):
    writer = await start(store, "e", context_id=talk.id)
    await writer.write("f")
    await store.post_message(OWNER, talk.id, Post(text="g", if_busy=IfBusy.STEER))
    await store.suspension.look(writer.run)
    await writer.write(outcome=Outcome.SUCCEEDED)
    head = (await store.context(OWNER, talk.id)).head_message_id
    fork = await store.fork_context(OWNER, talk.id, head, title=None)
    assert await line(store, fork.id) == ["a", "b", "c", "d", "e", "f", "g"]
    followed = await store.snapshots(OWNER, [Subscription(talk.id), Subscription(fork.id)])
    assert [snapshot.newest and snapshot.newest.message_id for snapshot in followed] == [writer.run.message_id, None]
    answering = await start(store, "x", context_id=fork.id)
    assert (await store.suspension.look(answering.run)).steering == ()
    assert [turn.steers for turn in await store.history(answering.run, max_bytes=1000)] == [False] * 6 + [True, False]


async def cleared(store: Store) -> None:
    while await store.house.clear_contexts():
        pass


@pytest.mark.scenario("branches", "The source of a fork is deleted")
async def test_a_fork_outlives_its_source(store, talk, rows):
    await say(store, talk.id, "c2", "d2", parent_id=talk.of["b"])
    fork = await store.fork_context(OWNER, talk.id, talk.of["d"], title=None)

    await store.delete_context(OWNER, talk.id)
    with pytest.raises(ContextNotFound):
        await store.context(OWNER, talk.id)
    await cleared(store)

    assert await line(store, fork.id) == ["a", "b", "c", "d"]
    # What the fork has no share of is gone; the rest is nobody's.
    assert rows(f"SELECT count(*) FROM messages WHERE context_id = '{talk.id}'") == [(4,)]
    writer = await say(store, fork.id, "e", "f")
    assert len(await store.history(writer.run, max_bytes=1000)) == 5
    await store.delete_context(OWNER, fork.id)
    await cleared(store)
    for table in ("contexts", "messages", "chunks", "runs"):
        assert rows(f"SELECT count(*) FROM {table}") == [(0,)]


async def test_a_deleted_fork_leaves_its_source_whole(store, talk, rows):
    fork = await store.fork_context(OWNER, talk.id, talk.of["d"], title=None)
    await store.delete_context(OWNER, fork.id)
    await cleared(store)
    assert await line(store, talk.id) == ["a", "b", "c", "d"]
    await store.delete_context(OWNER, talk.id)
    await cleared(store)
    assert rows("SELECT count(*) FROM contexts") == rows("SELECT count(*) FROM chunks") == [(0,)]


@pytest.mark.scenario("branches", "Fork of a fork")
async def test_a_fork_of_a_fork_outlives_both(store, talk, rows):
    fork = await store.fork_context(OWNER, talk.id, talk.of["d"], title=None)
    await say(store, fork.id, "e", "f")
    second = await store.fork_context(OWNER, fork.id, (await tree(store, fork.id))[-1].id, title=None)
    for gone in (talk.id, fork.id):
        await store.delete_context(OWNER, gone)
        await cleared(store)
        assert await line(store, second.id) == ["a", "b", "c", "d", "e", "f"]
    assert rows("SELECT count(*) FROM chunks") == [(6,)]
    await store.delete_context(OWNER, second.id)
    await cleared(store)
    assert rows("SELECT count(*) FROM contexts") == rows("SELECT count(*) FROM chunks") == [(0,)]


async def test_an_expired_source_leaves_its_text_to_its_fork(store, talk, database_url):
    fork = await store.fork_context(OWNER, talk.id, talk.of["d"], title=None)
    run_beside(database_url, f"UPDATE contexts SET updated_at = 1 WHERE id = '{talk.id}'")
    (expired,) = await store.house.expire_contexts(3_600_000)
    assert expired.context_id == talk.id
    await cleared(store)
    assert await line(store, fork.id) == ["a", "b", "c", "d"]


async def test_a_fork_reads_while_its_source_is_compacted(store, rows, monkeypatch):
    monkeypatch.setattr(compaction, "_CHUNKS", 10)
    monkeypatch.setattr("context_server.store.segments.MAX_SEGMENT_CHUNKS", 10)
    words = [f"{number} " for number in range(45)]
    done = await exchange(store, "Hello", *words)
    fork = await store.fork_context(OWNER, done.run.context_id, done.run.message_id, title=None)
    reply = (await tree(store, fork.id))[-1]
    before = [await store.page(OWNER, fork.id, reply.id, from_sequence=start) for start in range(45)]
    after = None
    for _ in range(5):
        after = (await store.house.compact(-1000, after)).resume_after
        assert [await store.page(OWNER, fork.id, reply.id, from_sequence=start) for start in range(45)] == before
    await compact_all(store)
    assert rows("SELECT count(*) FROM segments") != [(0,)]
    assert await line(store, fork.id) == ["Hello", "".join(words)]
    assert [await store.page(OWNER, fork.id, reply.id, from_sequence=start) for start in range(45)] == before


# The schema


async def everything_of(store: Store) -> dict[str, list[Message]]:
    found, _ = await store.contexts(OWNER, limit=200)
    return {context.id: await tree(store, context.id) for context in found}


def without_modes(found: dict[str, list[Message]]) -> list[tuple[object, ...]]:
    return [
        (message.id, message.parent_id, message.status, message.content, message.digest, message.siblings)
        for messages in found.values()
        for message in messages
    ]


@pytest.mark.new_database
async def test_down_to_the_schema_before_agents_and_up_again(database_url):
    async with Store.open(database_url, connections=4) as store:
        context: Context = await store.create_context(OWNER)
        await say(store, context.id, "a", "b")
        await store.regenerate(OWNER, context.id, (await tree(store, context.id))[0].id)
        writer = await claim(store)
        waits, _ = await store.post_message(OWNER, context.id, Post(text="g", if_busy=IfBusy.QUEUE))
        asking, _ = await suspended(store)
        ended_before = without_modes(await everything_of(store))

    await change_schema(database_url, "0003", down=True)
    assert run_beside(database_url, "SELECT count(*) FROM messages") == [(7,)]
    await change_schema(database_url, "head", down=False)

    async with Store.open(database_url, connections=4) as store:
        after = without_modes(await everything_of(store))
        reply = await store.message(OWNER, context.id, waits.reply_message_id)
        assert (reply.status.value, reply.final_sequence, reply.digest) == ("cancelled", 0, sha256(""))
        assert [row for row in after if row[0] != reply.id] == [row for row in ended_before if row[0] != reply.id]
        # What was suspended cannot go on, and is cancelled; what was running is ended as after a crash.
        await store.request_cancel(OWNER, asking.run.context_id)
        run_beside(database_url, "UPDATE runs SET lease_expires_at = NULL")
        for run in await store.expired_runs():
            await store.expire_run(run)
        assert await store.active_runs() == {}
        assert (await store.message(OWNER, context.id, writer.run.message_id)).status.ended


@pytest.mark.new_database
async def test_the_schema_before_forks_is_refused_while_there_are_some(database_url):
    async with Store.open(database_url, connections=4) as store:
        done = await exchange(store, "Hello", "one")
        fork = await store.fork_context(OWNER, done.run.context_id, done.run.message_id, title=None)
    with pytest.raises(RuntimeError, match="2 messages of forks"):
        await change_schema(database_url, "0003", down=True)
    async with Store.open(database_url, connections=4) as store:
        assert await line(store, fork.id) == ["Hello", "one"]
        await store.delete_context(OWNER, fork.id)
    await change_schema(database_url, "0003", down=True)

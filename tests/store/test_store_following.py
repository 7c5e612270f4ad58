"""Following what other nodes write: what one read finds of many contexts and messages."""

import time
from functools import partial

import pytest
from sqlalchemy import Executable
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import ClauseElement

from context_server.errors import ContextNotFound, MessageNotFound, SequenceAhead
from context_server.records import Chunk, ChunkKind, MessageStatus, Mode, Outcome, State
from context_server.store import following_statements as statements
from context_server.store.exchanges import Post
from context_server.store.following import Held, Since
from tests.store.writing import OWNER, STRANGER, exchange, post, start

MEBIBYTE = 1_048_576


async def movements(store, contexts=(), messages=(), max_bytes=MEBIBYTE):
    """What is new of contexts after versions, and of messages after ``(sequence, content_bytes)``."""
    since = {key: value if isinstance(value, Since) else Since(value) for key, value in dict(contexts).items()}
    held = {key: Held(*value) for key, value in dict(messages).items()}
    return await store.following.movements(since, held, max_bytes=max_bytes)


def sequences(growth):
    return [chunk.sequence for chunk in growth.chunks]


# Contexts


async def test_a_context_is_told_as_it_stands_with_its_open_reply(store):
    writer = await start(store)
    await writer.write("one", "two")
    run = writer.run

    found = await movements(store, {run.context_id: Since()})

    moved = found.contexts[run.context_id]
    assert (moved.owner, moved.state, moved.version, moved.run_id) == (OWNER, State.STREAMING, 4, run.id)
    assert (moved.open.id, moved.open.sequence) == (run.message_id, 2)
    assert moved.ended == ()


async def test_replies_that_ended_after_a_version_are_told_oldest_first(store):
    context = await store.create_context(OWNER)
    writers = [await exchange(store, "Hello", "one", context_id=context.id) for _ in range(3)]
    versions = [5, 9, 13]

    found = await movements(store, {context.id: 5})

    moved = found.contexts[context.id]
    assert [(ended.message_id, ended.version) for ended in moved.ended] == [
        (writer.run.message_id, version) for writer, version in zip(writers[1:], versions[1:], strict=True)
    ]
    assert {(ended.final_sequence, ended.status) for ended in moved.ended} == {(1, MessageStatus.COMPLETED)}
    assert (moved.open, moved.run_id, moved.version) == (None, None, 13)


async def test_of_a_context_that_did_not_move_there_is_its_open_reply_alone(store):
    writer = await start(store)
    await writer.write("one")
    version = (await store.context(OWNER, writer.run.context_id)).version
    await writer.write("two")

    found = await movements(store, {writer.run.context_id: version})

    moved = found.contexts[writer.run.context_id]
    assert (moved.version, moved.open.sequence, moved.details) == (version, 2, None)


async def test_what_ended_since_a_time_is_told_of_a_context_that_nothing_is_known_of(store, rows):
    context = await store.create_context(OWNER)
    old, new = [await exchange(store, "Hello", "one", context_id=context.id) for _ in range(2)]
    rows(f"UPDATE messages SET completed_at = 1000 WHERE id = '{old.run.message_id}'")

    found = await movements(store, {context.id: Since(ended_after_ms=time.time_ns() // 1_000_000 - 60_000)})

    assert [ended.message_id for ended in found.contexts[context.id].ended] == [new.run.message_id]


async def test_users_messages_are_no_endings(store):
    receipt = await post(store)
    found = await movements(store, {receipt.context_id: 1})
    assert found.contexts[receipt.context_id].ended == ()


@pytest.mark.parametrize("changes", [{"title": "New"}, {"mode": Mode.PLAN}, {"metadata": {"a": 1}}])
async def test_the_details_differ_once_they_were_changed(store, changes):
    context = await store.create_context(OWNER)
    before = await movements(store, {context.id: Since()})
    again = await movements(store, {context.id: Since()})
    await store.change_context(OWNER, context.id, changes)
    after = await movements(store, {context.id: 1})
    assert before.contexts[context.id].details == again.contexts[context.id].details
    assert before.contexts[context.id].details != after.contexts[context.id].details


async def test_a_context_that_is_gone_is_left_out(store):
    kept, deleted = await store.create_context(OWNER), await store.create_context(OWNER)
    await store.delete_context(OWNER, deleted.id)
    found = await movements(store, {kept.id: 1, deleted.id: 1, "never-was": 1})
    assert list(found.contexts) == [kept.id]


async def test_a_context_that_has_expired_is_gone_before_its_rows_are(store):
    writer = await exchange(store, "Hello", "one")
    run = writer.run
    assert [expired.context_id for expired in await store.house.expire_contexts(-60_000)] == [run.context_id]
    found = await movements(store, {run.context_id: 1}, {run.message_id: (0, 0)})
    assert (found.contexts, found.messages) == ({}, {})


async def test_more_contexts_than_one_statement_takes_are_all_told(store):
    contexts = [await store.create_context(OWNER) for _ in range(3)]
    asked = {f"never-was-{number}": 1 for number in range(1100)} | {context.id: 1 for context in contexts}
    found = await movements(store, asked)
    assert set(found.contexts) == {context.id for context in contexts}


# Messages


async def test_new_chunks_come_in_order_with_the_head(store):
    writer = await start(store)
    await writer.write("one", "two", "three")
    await writer.write(Chunk(0, ChunkKind.STEP, None, {"number": 4}))

    found = await movements(store, messages={writer.run.message_id: (1, 3)})

    growth = found.messages[writer.run.message_id]
    assert list(growth.chunks) == writer.chunks[1:]
    assert (growth.head, growth.status, growth.final_sequence) == (4, MessageStatus.STREAMING, None)
    assert (growth.context_id, growth.owner) == (writer.run.context_id, OWNER)
    assert growth.content_bytes == writer.size


async def test_many_messages_grow_each_from_where_it_is(store):
    writers = [await start(store) for _ in range(5)]
    for number, writer in enumerate(writers):
        await writer.write(*[f"{number}.{place}" for place in range(4)])

    held = {writer.run.message_id: (number, 3 * number) for number, writer in enumerate(writers)}
    found = await movements(store, messages=held)

    for number, writer in enumerate(writers):
        assert sequences(found.messages[writer.run.message_id]) == list(range(number + 1, 5))


async def test_an_ended_message_has_its_ending(store):
    writer = await exchange(store, "Hello", "one", outcome=Outcome.FAILED)
    growth = (await movements(store, messages={writer.run.message_id: (1, 3)})).messages[writer.run.message_id]
    message = await writer.message()
    assert (growth.status, growth.final_sequence, growth.digest) == (MessageStatus.FAILED, 1, message.digest)
    assert growth.chunks == ()


async def test_a_read_is_bounded_in_bytes_and_goes_on_in_the_next(store):
    writer = await start(store)
    await writer.write(*["x" * 1000] * 50)
    held, reads = (0, 0), []
    while held[0] < 50:
        growth = (await movements(store, messages={writer.run.message_id: held}, max_bytes=10_000)).messages
        chunks = growth[writer.run.message_id].chunks
        reads.append(len(chunks))
        held = (chunks[-1].sequence, held[1] + 1000 * len(chunks))
    assert reads == [10] * 5


async def test_a_chunk_larger_than_the_bound_is_read_all_the_same(store):
    writer = await start(store)
    await writer.write("x" * 5000, "y" * 5000)
    growth = (await movements(store, messages={writer.run.message_id: (0, 0)}, max_bytes=10)).messages
    assert sequences(growth[writer.run.message_id]) == [1]


async def test_the_bound_is_shared_by_the_messages(store):
    idle, first, second = [await start(store) for _ in range(3)]
    for writer in (first, second):
        await writer.write(*["x" * 1000] * 20)
    held = {writer.run.message_id: (0, 0) for writer in (idle, first, second)}
    found = await movements(store, messages=held, max_bytes=10_000)
    assert [len(found.messages[writer.run.message_id].chunks) for writer in (idle, first, second)] == [0, 4, 4]


# How the database finds what it reads


class Explain(Executable, ClauseElement):
    """How a statement would be run."""

    inherit_cache = False

    def __init__(self, statement) -> None:
        self.statement = statement


@compiles(Explain)
def explain(element, compiler, **options):
    words = "EXPLAIN QUERY PLAN" if compiler.dialect.name == "sqlite" else "EXPLAIN"
    return f"{words} {compiler.process(element.statement, **options)}"


def explained(connection, *, statement, asked):
    return connection.execute(Explain(statement), asked).all()


async def test_what_is_new_is_found_by_indexes_however_small_the_tables_are(store):
    """A plan that reads a small table from end to end is kept while the table grows."""
    writer = await exchange(store, "Hello", "one")
    for statement, asked in (
        statements.select_movements({writer.run.context_id: (1, 1, 0)}),
        statements.select_growth({writer.run.message_id: (0, 0)}, 100, 1000),
    ):
        for row in await store._read(partial(explained, statement=statement, asked=asked)):
            step = " ".join(map(str, row))
            assert "Seq Scan" not in step
            assert "Hash" not in step
            assert "SCAN" not in step.replace("SCAN asked", "")


# The first pull


async def opening(store, run, from_sequence=0, to_sequence=None, *, owner=OWNER, max_bytes=MEBIBYTE):
    return await store.following.opening(
        owner,
        run.context_id,
        run.message_id,
        from_sequence=from_sequence,
        to_sequence=to_sequence,
        max_bytes=max_bytes,
    )


@pytest.mark.parametrize("from_sequence", [0, 1, 3])
async def test_the_first_pull_of_an_open_reply_brings_all_of_it(store, from_sequence):
    writer = await start(store)
    await writer.write("one", "two", "three")
    opened = await opening(store, writer.run, from_sequence)
    assert opened.page == await store.page(
        OWNER, writer.run.context_id, writer.run.message_id, from_sequence=from_sequence
    )
    assert (list(opened.chunks), opened.content_bytes) == (writer.chunks, 11)


async def test_of_a_long_reply_it_brings_what_was_asked_for(store):
    writer = await start(store)
    await writer.write(*["x" * 1000] * 20)
    near, far = [await opening(store, writer.run, start, max_bytes=5000) for start in (17, 5)]
    assert [chunk.sequence for chunk in near.chunks] == [18, 19, 20]
    assert (far.chunks, far.page.sequence) == (None, 10)


async def test_of_an_ended_message_it_brings_the_answer_alone(store):
    writer = await exchange(store, "Hello", "one", "two")
    opened = await opening(store, writer.run, 1)
    assert ([chunk.text for chunk in opened.page.chunks], opened.chunks) == (["two"], None)


async def test_the_first_pull_refuses_what_every_pull_refuses(store):
    writer = await start(store)
    other = await post(store)
    with pytest.raises(SequenceAhead):
        await opening(store, writer.run, 1)
    with pytest.raises(ContextNotFound):
        await opening(store, writer.run, owner=STRANGER)
    await store.post_message(OWNER, (await store.create_context(OWNER)).id, Post(text="Hello"))
    with pytest.raises(MessageNotFound):
        await store.following.opening(
            OWNER, other.context_id, writer.run.message_id, from_sequence=0, to_sequence=None, max_bytes=1
        )

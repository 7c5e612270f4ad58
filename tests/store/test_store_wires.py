"""What the wires of simple clients ask of the store: about a reply, and a conversation by its key's id."""

import asyncio

import pytest

from context_server.errors import ContextNotFound, MessageNotFound
from context_server.records import MessageStatus, Outcome, new_id
from tests.store.writing import FAILURE, OWNER, STRANGER, call, exchange, reasoning, result, start

KIB = 1024
CONVERSATION = "0b0a5d2e-7c1e-8b4f-9a55-3f0d2c6b8e11"


async def test_the_texts_of_a_reply_and_of_its_question_come_where_they_are_asked_for(store):
    run = (await exchange(store, "Hello?", "One ", reasoning("why"), call(), result(), "two")).run
    ids = (OWNER, run.context_id, run.message_id)

    bare = await store.wires.reply(*ids, max_bytes=KIB)
    facts = await store.wires.reply(*ids, max_bytes=KIB, question=True, content=True, elder=True)

    assert (bare.question, bare.content, bare.is_regenerated) == (None, None, False)
    assert (facts.question, facts.content, facts.is_regenerated) == ("Hello?", "One two", False)
    assert facts.message == bare.message
    assert (facts.message.status, facts.message.run_id) == (MessageStatus.COMPLETED, run.id)


async def test_a_text_that_does_not_fit_is_none(store):
    run = (await exchange(store, "x" * KIB, "One ", "two")).run
    ids = (OWNER, run.context_id, run.message_id)

    facts = await store.wires.reply(*ids, max_bytes=6, question=True, content=True)

    assert (facts.question, facts.content) == ("x" * KIB, None)  # A page holds one chunk, however long it is.


async def test_why_a_reply_failed_is_among_what_is_known(store):
    run = (await exchange(store, "Hello", "One", outcome=Outcome.FAILED)).run

    facts = await store.wires.reply(OWNER, run.context_id, run.message_id, max_bytes=KIB)

    assert facts.message.error == FAILURE


async def test_a_reply_with_an_older_one_is_regenerated(store):
    first = (await exchange(store, "Hello", "One")).run
    receipt, _ = await store.regenerate(OWNER, first.context_id, first.message_id)

    async def is_regenerated(message_id: str) -> bool:
        facts = await store.wires.reply(OWNER, first.context_id, message_id, max_bytes=KIB, elder=True)
        return facts.is_regenerated

    assert await is_regenerated(receipt.reply_message_id)
    assert not await is_regenerated(first.message_id)
    assert not await is_regenerated(receipt.message_id)


async def test_a_reply_is_found_in_its_own_context_of_its_own_owner(store):
    run = (await start(store)).run
    other = await store.create_context(OWNER)

    with pytest.raises(MessageNotFound):
        await store.wires.reply(OWNER, other.id, run.message_id, max_bytes=KIB)
    with pytest.raises(MessageNotFound):
        await store.wires.reply(OWNER, run.context_id, new_id(), max_bytes=KIB)
    with pytest.raises(ContextNotFound):
        await store.wires.reply(STRANGER, run.context_id, run.message_id, max_bytes=KIB)


async def test_a_conversation_is_made_once(store):
    made = await asyncio.gather(*(store.wires.conversation(OWNER, CONVERSATION) for _ in range(4)))

    assert {(context.id, context.version) for context in made} == {(CONVERSATION, 1)}
    contexts, _ = await store.contexts(OWNER)
    assert [context.id for context in contexts] == [CONVERSATION]


async def test_a_conversation_that_was_deleted_is_made_anew(store):
    await store.wires.conversation(OWNER, CONVERSATION)
    await exchange(store, "Hello", "One", context_id=CONVERSATION)
    await store.delete_context(OWNER, CONVERSATION)

    again = await store.wires.conversation(OWNER, CONVERSATION)

    assert (again.version, again.head_message_id) == (1, None)


async def test_the_id_of_another_owners_conversation_is_not_taken(store):
    await store.wires.conversation(STRANGER, CONVERSATION)

    with pytest.raises(ContextNotFound):
        await store.wires.conversation(OWNER, CONVERSATION)

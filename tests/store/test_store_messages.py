"""Messages: posting them, reading them one by one, listed, and by sequence."""

import pytest

from context_server.errors import CommandNotAllowed, ContextNotFound, MessageNotFound, SequenceAhead
from context_server.records import (
    ChunkKind,
    Command,
    MessageStatus,
    Outcome,
    Role,
    State,
)
from context_server.storable import MAX_CHUNK_CHARACTERS
from context_server.store.exchanges import Post
from context_server.store.reading import MAX_PAGE_CHUNKS
from tests.store.writing import OWNER, call, claim, exchange, post, reasoning, result, sha256, start

KIB = 1024


# Posting


@pytest.mark.scenario("runs", "Post a message")
async def test_a_post_makes_the_message_its_empty_reply_and_a_queued_run(store):
    context = await store.create_context(OWNER)

    receipt, transition = await store.post_message(
        OWNER, context.id, Post(text="Hello", display={"as": "card"}, client_metadata={"n": 1}), if_match=1
    )

    assert (receipt.context_id, receipt.state, receipt.version) == (context.id, State.QUEUED, 2)
    assert (transition.previous_state, transition.state, transition.version) == (State.IDLE, State.QUEUED, 2)
    assert (transition.run_id, transition.ended) == (receipt.run_id, None)
    user = await store.message(OWNER, context.id, receipt.message_id)
    assert (user.role, user.status, user.content, user.parent_id) == (Role.USER, MessageStatus.COMPLETED, "Hello", None)
    assert (user.display, user.client_metadata) == ({"as": "card"}, {"n": 1})
    assert (user.sequence, user.final_sequence, user.digest) == (1, 1, sha256("Hello"))
    assert user.completed_at is not None
    reply = await store.message(OWNER, context.id, receipt.reply_message_id)
    assert (reply.role, reply.status, reply.parent_id) == (Role.ASSISTANT, MessageStatus.PENDING, receipt.message_id)
    assert (reply.sequence, reply.final_sequence, reply.digest, reply.content) == (0, None, None, "")
    assert (reply.run_id, reply.completed_at) == (receipt.run_id, None)
    after = await store.context(OWNER, context.id)
    assert (after.state, after.version, after.head_message_id) == (State.QUEUED, 2, receipt.reply_message_id)


async def test_the_next_message_follows_the_reply(store):
    first = await exchange(store, "Hello", "Hi")
    receipt = await post(store, "And?", context_id=first.run.context_id)
    second = await store.message(OWNER, receipt.context_id, receipt.message_id)
    assert second.parent_id == first.run.message_id


async def test_an_empty_message_has_no_chunks(store):
    receipt = await post(store, "")
    user = await store.message(OWNER, receipt.context_id, receipt.message_id)
    assert (user.sequence, user.final_sequence, user.content, user.digest) == (0, 0, "", sha256(""))


@pytest.mark.scenario("content-log", "User message in the log")
async def test_a_long_message_is_stored_in_several_chunks(store):
    text = "é" * (2 * MAX_CHUNK_CHARACTERS + 1)
    receipt = await post(store, text)

    page = await store.page(OWNER, receipt.context_id, receipt.message_id)

    assert [len(chunk.text) for chunk in page.chunks] == [MAX_CHUNK_CHARACTERS, MAX_CHUNK_CHARACTERS, 1]
    assert "".join(chunk.text for chunk in page.chunks) == text
    assert (page.status, page.sequence, page.final_sequence) == (MessageStatus.COMPLETED, 3, 3)
    assert page.digest == sha256(text)


@pytest.mark.scenario("runs", "Post while busy")
async def test_a_busy_context_takes_no_message(store):
    receipt = await post(store)

    async def refused(state: State) -> None:
        with pytest.raises(CommandNotAllowed) as refusal:
            await post(store, "Again", context_id=receipt.context_id)
        assert (refusal.value.command, refusal.value.state) == (Command.SEND, state)
        assert str(refusal.value).startswith(f"'send' is not allowed while the context is '{state}'; allowed now: ")
        assert len((await store.messages(OWNER, receipt.context_id))[0]) == 2

    await refused(State.QUEUED)
    writer = await claim(store)
    await refused(State.THINKING)
    await writer.write("one")
    await refused(State.STREAMING)
    await store.request_cancel(OWNER, receipt.context_id)
    await refused(State.CANCELLING)


async def test_a_failed_context_takes_the_next_message(store):
    writer = await exchange(store, "Hello", "half", outcome=Outcome.FAILED)
    receipt = await post(store, "Again", context_id=writer.run.context_id)
    assert receipt.state == State.QUEUED


@pytest.mark.parametrize("text", ["\ufffd", "a\u0301\U0001f600", "\r\n\t", "' OR 1=1 --", '{"$[0]": "]"}', "\u2028"])
async def test_text_is_kept_as_it_is(store, text):
    writer = await exchange(store, text, text, reasoning(text), text)
    context_id = writer.run.context_id
    (user, reply), _ = await store.messages(OWNER, context_id, include_content=True)
    assert (user.content, reply.content) == (text, text + text)


# Lists


@pytest.mark.scenario("content-log", "Read messages")
async def test_messages_are_listed_oldest_first_in_pages(store):
    context = await store.create_context(OWNER)
    for number in range(3):
        await exchange(store, f"question {number}", f"answer {number}", context_id=context.id)
    whole, following = await store.messages(OWNER, context.id)
    assert [message.role for message in whole] == [Role.USER, Role.ASSISTANT] * 3
    assert following is None

    for limit in (1, 2, 3, 5, 6, 7):
        pages, after = [], 0
        while after is not None:
            page, after = await store.messages(OWNER, context.id, after=after, limit=limit)
            assert 0 < len(page) <= limit
            pages += page
        assert pages == whole


async def test_a_list_has_the_text_of_users_and_of_replies_when_asked(store):
    writer = await exchange(store, "question", "answer")
    (user, reply), _ = await store.messages(OWNER, writer.run.context_id)
    assert (user.content, reply.content, reply.content_sequence) == ("question", None, None)
    (user, reply), _ = await store.messages(OWNER, writer.run.context_id, include_content=True)
    assert (user.content, reply.content, reply.content_sequence) == ("question", "answer", 1)


async def test_messages_of_no_context(store):
    with pytest.raises(ContextNotFound):
        await store.messages(OWNER, "unknown")


@pytest.mark.scenario("content-log", "List messages with content")
@pytest.mark.parametrize("reply_chunks", [[60] * 4, [100], [1] * 110, [30, 90, 90]])
async def test_a_page_of_a_list_keeps_its_budget_and_loses_no_text(store, reply_chunks):
    """Budgets of 100 KiB: what a page cuts is pulled from where it was cut."""
    budget = 100 * KIB
    context = await store.create_context(OWNER)
    expected = []
    for number in range(3):
        question, answer = f"question {number} " * 10, ["x" * (size * KIB) for size in reply_chunks]
        await exchange(store, question, *answer, context_id=context.id)
        expected += [question, "".join(answer)]

    texts, after = [], 0
    while after is not None:
        page, after = await store.messages(
            OWNER, context.id, after=after, include_content=True, max_bytes=budget, limit=50
        )
        assert page
        assert sum(len(message.content.encode()) for message in page) <= budget
        for message in page:
            text, sequence = message.content, message.content_sequence
            while sequence < message.sequence:
                rest = await store.page(OWNER, context.id, message.id, from_sequence=sequence, max_bytes=budget)
                text, sequence = text + "".join(chunk.text for chunk in rest.chunks), rest.sequence
            texts.append(text)

    assert texts == expected


async def test_a_message_of_a_user_is_never_cut(store):
    text = "x" * (200 * KIB)
    writer = await exchange(store, text, "answer")
    page, after = await store.messages(OWNER, writer.run.context_id, include_content=True, max_bytes=KIB)
    assert [message.content for message in page] == [text]
    page, after = await store.messages(OWNER, writer.run.context_id, include_content=True, max_bytes=KIB, after=after)
    assert ([message.content for message in page], after) == (["answer"], None)


# One message


@pytest.mark.scenario("content-pull", "Chunks view")
async def test_content_is_the_text_and_sequences_count_every_kind(store):
    writer = await exchange(store, "Hello", "one", reasoning("hm"), call(), result(), "two")
    message = await writer.message()
    assert (message.content, message.sequence, message.content_sequence) == ("onetwo", 5, 5)
    page = await store.page(OWNER, message.context_id, message.id)
    assert list(page.chunks) == writer.chunks
    assert [chunk.kind for chunk in page.chunks][2:4] == [ChunkKind.TOOL_CALL, ChunkKind.TOOL_RESULT]


@pytest.mark.parametrize("method", ["message", "page"])
async def test_an_unknown_message(store, method):
    context = await store.create_context(OWNER)
    with pytest.raises(MessageNotFound):
        await getattr(store, method)(OWNER, context.id, "unknown")


# Pages of content


async def test_a_page_holds_what_comes_after_a_sequence(store):
    writer = await start(store)
    await writer.write(*"abcdef")

    async def pulled(start_at: int, stop_at: int | None = None) -> tuple[str, int, bool]:
        page = await store.page(
            OWNER, writer.run.context_id, writer.run.message_id, from_sequence=start_at, to_sequence=stop_at
        )
        assert page.head == 6
        assert page.from_sequence == start_at
        return "".join(chunk.text for chunk in page.chunks), page.sequence, page.closed

    assert await pulled(0) == ("abcdef", 6, False)
    assert await pulled(4) == ("ef", 6, False)
    assert await pulled(6) == ("", 6, False)
    assert await pulled(2, 4) == ("cd", 4, True)
    assert await pulled(2, 6) == ("cdef", 6, True)
    assert await pulled(2, 7) == ("cdef", 6, False)
    assert await pulled(3, 3) == ("", 3, True)
    assert await pulled(3, 2) == ("", 3, True)


async def test_a_page_says_how_far_the_message_is(store):
    writer = await start(store)
    context_id, message_id = writer.run.context_id, writer.run.message_id
    pending = await store.page(OWNER, context_id, message_id)
    assert (pending.status, pending.head, pending.up_to_date) == (MessageStatus.PENDING, 0, True)
    await writer.write("one")
    streaming = await store.page(OWNER, context_id, message_id)
    assert (streaming.status, streaming.final_sequence, streaming.digest) == (MessageStatus.STREAMING, None, None)
    await writer.write("two", outcome=Outcome.SUCCEEDED)
    ended = await store.page(OWNER, context_id, message_id, from_sequence=1)
    assert (ended.status, ended.final_sequence, ended.digest) == (MessageStatus.COMPLETED, 2, sha256("onetwo"))


@pytest.mark.scenario("content-pull", "Sequence ahead of the log")
@pytest.mark.parametrize("ahead", [3, 2**53 - 1])
async def test_a_sequence_ahead_of_the_log_is_refused_with_where_it_is(store, ahead):
    writer = await exchange(store, "Hello", "one", "two")
    with pytest.raises(SequenceAhead) as refusal:
        await store.page(OWNER, writer.run.context_id, writer.run.message_id, from_sequence=ahead)
    assert refusal.value.sequence == 2


@pytest.mark.scenario("content-pull", "Page of bounded size")
async def test_pages_are_bounded_in_bytes_make_progress_and_join_to_the_whole(store):
    writer = await exchange(store, "Hello", "ä" * 30, "b" * 300, "c" * 60, "d" * 40, "e", "f" * 99)
    ends, text, sequence = [], "", 0
    while sequence < 6:
        page = await store.page(
            OWNER, writer.run.context_id, writer.run.message_id, from_sequence=sequence, max_bytes=100
        )
        assert page.up_to_date == (page.sequence == 6)
        sequence = page.sequence
        text += "".join(chunk.text for chunk in page.chunks)
        ends.append(sequence)
    assert ends == [1, 2, 4, 6]
    assert text == writer.text


async def test_a_page_is_bounded_in_chunks(store):
    writer = await exchange(store, "Hello", *("x" * (MAX_PAGE_CHUNKS + 1)))
    page = await store.page(OWNER, writer.run.context_id, writer.run.message_id)
    assert (page.sequence, page.up_to_date) == (MAX_PAGE_CHUNKS, False)
    rest = await store.page(OWNER, writer.run.context_id, writer.run.message_id, from_sequence=page.sequence)
    assert (rest.sequence, rest.up_to_date) == (MAX_PAGE_CHUNKS + 1, True)


async def test_a_log_whose_rows_are_gone_is_read_as_far_as_it_goes(store, rows):
    """Nothing of ours removes rows; a reader must not wait for them for ever all the same."""
    writer = await exchange(store, "Hello", "one", "two", "three")
    rows("DELETE FROM chunks WHERE sequence > 1")
    assert (await writer.message()).content == "one"
    page = await store.page(OWNER, writer.run.context_id, writer.run.message_id, from_sequence=1)
    assert (page.chunks, page.up_to_date) == ((), False)

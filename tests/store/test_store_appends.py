"""Appends: the group commit, the states that it moves, endings, and the fence against stale attempts."""

import dataclasses
from dataclasses import asdict

import pytest

from context_server.records import Chunk, ChunkKind, EndedMessage, MessageStatus, Outcome, State, Usage
from context_server.store.execution import BatchRefused, Standing
from tests.store.writing import FAILURE, OWNER, Writer, call, exchange, reasoning, result, sha256, start


async def test_an_append_adds_chunks_and_moves_the_head(store):
    writer = await start(store)

    await writer.write("one", reasoning("hm"))
    await writer.write("two")

    page = await store.page(OWNER, writer.run.context_id, writer.run.message_id)
    assert list(page.chunks) == writer.chunks
    assert [chunk.sequence for chunk in page.chunks] == [1, 2, 3]
    assert (page.head, page.status) == (3, MessageStatus.STREAMING)


@pytest.mark.scenario("runs", "States of a reply")
async def test_what_is_appended_moves_the_state(store):
    writer = await start(store)
    seen = []
    for pieces in (["one"], ["two"], [call(1)], [call(2)], [result(1)], [result(2)], [call(3), result(3), "three"]):
        transition = await writer.write(*pieces)
        if transition is not None:
            seen.append((transition.previous_state, transition.state, transition.version))
            assert transition.ended is None

    assert seen == [
        (State.THINKING, State.STREAMING, 4),
        (State.STREAMING, State.CALLING_TOOL, 5),
        (State.CALLING_TOOL, State.THINKING, 6),
        (State.THINKING, State.STREAMING, 9),
    ]
    context = await store.context(OWNER, writer.run.context_id)
    assert (context.state, context.version) == (State.STREAMING, 9)


async def test_text_while_a_tool_runs_does_not_move_the_state(store):
    writer = await start(store)
    await writer.write(call())
    assert await writer.write("meanwhile") is None
    assert (await store.context(OWNER, writer.run.context_id)).state is State.CALLING_TOOL


async def test_what_a_cancelled_run_still_says_is_kept_and_moves_nothing(store):
    writer = await start(store)
    await store.request_cancel(OWNER, writer.run.context_id)
    assert await writer.write("one", call()) is None
    assert (await store.context(OWNER, writer.run.context_id)).state is State.CANCELLING
    assert (await writer.message()).content == "one"


async def test_a_batch_is_of_many_runs_each_in_its_own_state(store):
    writers = [await start(store) for _ in range(3)]
    await writers[1].write("zero")

    transitions = await store.append(
        [writers[0].take("one"), writers[1].take("two"), writers[2].take(outcome=Outcome.SUCCEEDED)]
    )

    assert [transition and transition.state for transition in transitions] == [State.STREAMING, None, State.IDLE]
    assert [(await writer.message()).content for writer in writers] == ["one", "zerotwo", ""]


async def test_an_append_of_nothing_leaves_a_reply_pending(store):
    writer = await start(store)
    assert await writer.write() is None
    assert (await writer.message()).status is MessageStatus.PENDING


# Endings


@pytest.mark.scenario("content-log", "Digest of an ended message")
@pytest.mark.parametrize(
    ("outcome", "state", "status", "error"),
    [
        (Outcome.SUCCEEDED, State.IDLE, MessageStatus.COMPLETED, None),
        (Outcome.FAILED, State.FAILED, MessageStatus.FAILED, FAILURE),
        (Outcome.STOPPED, State.FAILED, MessageStatus.FAILED, FAILURE),
    ],
)
async def test_an_ending_closes_message_run_and_state_together(store, outcome, state, status, error):
    writer = await start(store)
    await writer.write("one")

    append = writer.take("two", outcome=outcome, failure=FAILURE, usage=Usage(input_tokens=7))
    (transition,) = await store.append([append])

    assert transition is not None
    assert (transition.previous_state, transition.state, transition.version) == (State.STREAMING, state, 5)
    assert transition.ended == EndedMessage(id=writer.run.message_id, status=status, final_sequence=2)
    message = await writer.message()
    assert (message.status, message.error, message.usage) == (status, error, asdict(Usage(input_tokens=7)))
    assert (message.sequence, message.final_sequence, message.digest) == (2, 2, sha256("onetwo"))
    assert message.completed_at is not None
    context = await store.context(OWNER, writer.run.context_id)
    assert (context.state, context.version, context.active_run) == (state, 5, None)


@pytest.mark.parametrize("before", [[], [call()]])
async def test_a_run_may_end_from_any_working_state(store, before):
    writer = await start(store)
    await writer.write(*before)
    transition = await writer.write(outcome=Outcome.SUCCEEDED)
    assert transition is not None
    assert transition.state is State.IDLE


# The fence


@pytest.mark.scenario("runs", "Stale attempt is fenced")
@pytest.mark.parametrize("ends", [None, Outcome.SUCCEEDED])
@pytest.mark.parametrize("stale", ["attempt", "sequence behind", "sequence ahead", "ended", "expired", "deleted"])
async def test_a_stale_writer_is_refused_and_nothing_of_its_batch_is_written(store, rows, lapse, stale, ends):
    writer = await start(store)
    await writer.write("one", outcome=Outcome.SUCCEEDED if stale == "ended" else None)
    if stale == "expired":
        lapse()
    fresh = await start(store)
    good = fresh.take("good")
    bad = writer.take("bad", outcome=ends)
    match stale:
        case "attempt":
            bad = dataclasses.replace(bad, run=dataclasses.replace(bad.run, attempt=bad.run.attempt + 1))
        case "sequence behind" | "sequence ahead":
            believed = 0 if stale == "sequence behind" else 2
            bad = dataclasses.replace(
                bad, expected_sequence=believed, chunks=(Chunk(believed + 1, ChunkKind.TEXT, "bad"),)
            )
        case "expired":
            await store.expire_run(writer.run)
        case "deleted":
            await store.delete_context(OWNER, writer.run.context_id)

    def everything() -> list:
        return [rows(f"SELECT * FROM {table}") for table in ("contexts", "messages", "chunks", "runs")]

    before = everything()

    for batch in ([good, bad], [bad, good]):
        with pytest.raises(BatchRefused):
            await store.append(batch)

    assert everything() == before
    (fresh_standing, _), (stale_standing, _) = await store.standings([good, bad])
    assert fresh_standing is Standing.NOT_WRITTEN
    assert stale_standing is not Standing.NOT_WRITTEN
    await store.append([good])
    assert (await fresh.message()).content == "good"


async def test_a_reply_is_written_by_one_append_of_a_batch_only(store):
    writer = await start(store)
    first = writer.take("one")
    with pytest.raises(BatchRefused):
        await store.append([first, dataclasses.replace(first)])
    assert (await writer.message()).content == ""


async def test_where_appends_stand_whose_commit_has_an_unknown_outcome(store):
    writers = [await start(store) for _ in range(3)]
    written = writers[0].take("one", "two")
    ended = writers[1].take("all", outcome=Outcome.SUCCEEDED)
    await store.append([written, ended])
    found = await store.standings([written, ended, writers[2].take("next"), writers[0].take("three")])
    assert [standing for standing, _ in found] == [
        Standing.WRITTEN,
        Standing.WRITTEN,
        Standing.NOT_WRITTEN,
        Standing.NOT_WRITTEN,
    ]
    contexts = [await store.context(OWNER, writer.run.context_id) for writer in writers[:2]]
    told = [transition for _, transition in found[:2]]
    assert [(move.state, move.version, move.previous_state) for move in told] == [
        (context.state, context.version, None) for context in contexts
    ]
    assert told[0].ended is None
    assert told[1].ended == EndedMessage(
        id=ended.run.message_id, status=MessageStatus.COMPLETED, final_sequence=ended.sequence
    )


async def test_an_ending_of_somebody_else_is_not_ours(store, lapse):
    writer = await start(store)
    await writer.write("one")
    append = writer.take(outcome=Outcome.SUCCEEDED)
    append = dataclasses.replace(append, ending=dataclasses.replace(append.ending, digest="0" * 64))
    lapse()
    await store.expire_run(writer.run)
    assert await store.standings([append]) == [(Standing.FENCED, None)]


async def test_what_was_read_once_reads_the_same_for_ever_after(store):
    writer = await exchange(store, "Hello", "one", call(), result(), "two")
    run = writer.run
    first = await store.page(OWNER, run.context_id, run.message_id, to_sequence=3)
    await exchange(store, "More", "three", context_id=run.context_id)
    with pytest.raises(BatchRefused):
        await Writer(store, run, sequence=4).write("late")
    again = await store.page(OWNER, run.context_id, run.message_id, to_sequence=3)
    assert again == first

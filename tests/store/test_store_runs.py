"""Runs: claiming, cancelling, what an agent is given, and the repair of what a crash left."""

import pytest

from context_server.records import (
    ChunkKind,
    EndedMessage,
    MessageStatus,
    Mode,
    Outcome,
    Role,
    RunStatus,
    State,
)
from context_server.store import Store
from context_server.store.execution import INTERRUPTED
from tests.store.writing import (
    FAILURE,
    OWNER,
    STRANGER,
    Writer,
    call,
    claim,
    exchange,
    post,
    reasoning,
    sha256,
    start,
)

# Claiming


async def test_runs_are_claimed_oldest_first_and_once(store):
    posted = [await post(store, owner=owner) for owner in (OWNER, STRANGER, OWNER)]

    first = await store.claim_runs(2)
    second = await store.claim_runs(2)

    claimed = [run for run, _ in (*first, *second)]
    assert [run.id for run in claimed] == [receipt.run_id for receipt in posted]
    assert [run.owner for run in claimed] == [OWNER, STRANGER, OWNER]
    assert [run.message_id for run in claimed] == [receipt.reply_message_id for receipt in posted]
    assert await store.claim_runs(2) == []


async def test_a_claimed_run_is_on_its_first_attempt_and_its_context_thinks(store):
    context = await store.create_context(OWNER, mode=Mode.PLAN, metadata={"model": "small"})
    receipt = await post(store, context_id=context.id)

    ((run, transition),) = await store.claim_runs(10)

    assert (run.attempt, run.mode, run.metadata) == (1, Mode.PLAN, {"model": "small"})
    assert (transition.previous_state, transition.state) == (State.QUEUED, State.THINKING)
    assert (transition.version, transition.run_id, transition.ended) == (receipt.version + 1, run.id, None)
    assert (await store.context(OWNER, context.id)).state is State.THINKING


async def test_a_claim_of_none(store):
    await post(store)
    assert await store.claim_runs(0) == []


async def test_active_runs_are_counted(store):
    await post(store)
    assert await store.active_runs() == {RunStatus.QUEUED: 1}
    writer = await claim(store)
    await post(store)
    await post(store)
    assert await store.active_runs() == {RunStatus.QUEUED: 2, RunStatus.RUNNING: 1}
    await writer.write(outcome=Outcome.SUCCEEDED)
    assert await store.active_runs() == {RunStatus.QUEUED: 2}


# Cancelling


@pytest.mark.scenario("runs", "Cancel a queued run")
async def test_cancelling_a_queued_run_ends_it_at_once(store):
    receipt = await post(store)

    context, transition = await store.request_cancel(OWNER, receipt.context_id, if_match=2)

    assert (context.state, context.version, context.active_run) == (State.IDLE, 3, None)
    assert transition is not None
    assert (transition.previous_state, transition.state, transition.version) == (State.QUEUED, State.IDLE, 3)
    assert transition.ended == EndedMessage(
        id=receipt.reply_message_id, status=MessageStatus.CANCELLED, final_sequence=0
    )
    reply = await store.message(OWNER, context.id, receipt.reply_message_id)
    assert (reply.status, reply.final_sequence, reply.digest) == (MessageStatus.CANCELLED, 0, sha256(""))
    assert (reply.error, reply.content) == (None, "")
    assert await store.claim_runs(1) == []


async def test_cancelling_a_running_run_asks_it_to_stop(store):
    writer = await start(store)
    await writer.write("one")

    context, transition = await store.request_cancel(OWNER, writer.run.context_id)

    assert (context.state, context.version) == (State.CANCELLING, 5)
    assert transition is not None
    assert (transition.previous_state, transition.state, transition.ended) == (State.STREAMING, State.CANCELLING, None)
    assert transition.run_id == writer.run.id
    assert (await writer.message()).status is MessageStatus.STREAMING


@pytest.mark.parametrize("said", [Outcome.SUCCEEDED, Outcome.FAILED, Outcome.STOPPED])
async def test_a_run_that_was_told_to_stop_is_cancelled_whatever_it_says(store, said):
    writer = await start(store)
    await writer.write("one")
    await store.request_cancel(OWNER, writer.run.context_id)

    transition = await writer.write("two", outcome=said, failure=FAILURE)

    assert transition is not None
    assert (transition.previous_state, transition.state) == (State.CANCELLING, State.IDLE)
    message = await writer.message()
    assert (message.status, message.error, message.content) == (MessageStatus.CANCELLED, None, "onetwo")
    assert message.digest == sha256("onetwo")


@pytest.mark.scenario("runs", "Cancel when nothing runs")
@pytest.mark.parametrize("outcome", [None, Outcome.SUCCEEDED, Outcome.FAILED])
async def test_cancelling_twice_changes_nothing(store, outcome):
    """Idle, failed and, with no outcome, cancelling."""
    writer = await start(store)
    await writer.write("one", outcome=outcome, failure=FAILURE)
    if outcome is None:
        await store.request_cancel(OWNER, writer.run.context_id)
    before = await store.context(OWNER, writer.run.context_id)

    for _ in range(2):
        assert await store.request_cancel(OWNER, before.id) == (before, None)


# What an agent is given


async def test_the_history_ends_with_the_message_to_be_answered(store):
    context = await store.create_context(OWNER)
    await exchange(store, "first", "answer", reasoning("hm"), call(), context_id=context.id)
    await exchange(store, "second", "half", context_id=context.id, outcome=Outcome.FAILED)
    writer = await start(store, "third", context_id=context.id)

    turns = await store.history(writer.run, max_bytes=10_000)

    assert [turn.role for turn in turns] == [Role.USER, Role.ASSISTANT] * 2 + [Role.USER]
    assert [turn.text for turn in turns] == ["first", "answer", "second", "half", "third"]
    assert [turn.status for turn in turns][3] is MessageStatus.FAILED
    assert [chunk.kind for chunk in turns[1].chunks] == [ChunkKind.TEXT, ChunkKind.REASONING, ChunkKind.TOOL_CALL]


@pytest.mark.parametrize(("max_bytes", "kept"), [(0, "c"), (30, "c"), (49, "c"), (50, "bc"), (59, "bc"), (60, "abc")])
async def test_the_history_is_the_newest_messages_that_fit(store, max_bytes, kept):
    """Three messages of 10, 20 and 30 bytes; the last one is always there."""
    first = await exchange(store, "a" * 10, "b" * 20)
    writer = await start(store, "c" * 30, context_id=first.run.context_id)
    turns = await store.history(writer.run, max_bytes=max_bytes)
    assert "".join(turn.text[0] for turn in turns) == kept


async def test_the_history_of_a_deleted_context_is_empty(store):
    writer = await start(store)
    await store.delete_context(OWNER, writer.run.context_id)
    assert await store.history(writer.run, max_bytes=1000) == []


# After a crash


@pytest.mark.scenario("resume", "Kill in mid-reply")
@pytest.mark.parametrize("written", [[], ["one", reasoning("hm"), "two"], [call()]])
async def test_an_orphaned_run_fails_as_interrupted_with_what_it_wrote(store, lapse, written):
    writer = await start(store)
    await writer.write(*written)
    lapse()
    assert await store.expired_runs() == [writer.run]

    transition = await store.expire_run(writer.run)

    message = await writer.message()
    length = len(written) + writer.open_tools  # Each open call got a result that says that there is none.
    assert (message.status, message.error) == (MessageStatus.FAILED, INTERRUPTED)
    assert (message.content, message.digest) == (writer.text, sha256(writer.text))
    assert message.sequence == message.final_sequence == length
    assert (transition.state, transition.ended) == (
        State.FAILED,
        EndedMessage(id=message.id, status=MessageStatus.FAILED, final_sequence=length),
    )
    context = await store.context(OWNER, message.context_id)
    assert (context.state, context.version, context.active_run) == (State.FAILED, transition.version, None)
    assert await store.expired_runs() == []


@pytest.mark.scenario("resume", "Kill while cancelling")
async def test_an_orphaned_run_that_was_being_cancelled_is_cancelled(store, lapse):
    writer = await start(store)
    await writer.write("one")
    lapse()
    await store.request_cancel(OWNER, writer.run.context_id)

    transition = await store.expire_run(writer.run)

    message = await writer.message()
    assert transition.state is State.IDLE
    assert (message.status, message.error, message.content) == (MessageStatus.CANCELLED, None, "one")
    assert message.digest == sha256("one")


async def test_the_digest_of_a_long_orphan_is_that_of_its_text(store, lapse):
    """Longer than what is read at once for it."""
    writer = await start(store)
    await writer.write(*(f"{number} ä\n" for number in range(2500)))
    lapse()
    await store.expire_run(writer.run)
    assert (await writer.message()).digest == sha256(writer.text)


@pytest.mark.scenario("resume", "Kill while queued")
async def test_a_queued_run_outlives_its_process(database_url):
    async with Store.open(database_url) as store:
        receipt = await post(store)
    async with Store.open(database_url) as store:
        assert await store.expired_runs() == []
        writer = await claim(store)
    assert (writer.run.id, writer.run.message_id) == (receipt.run_id, receipt.reply_message_id)


async def test_a_running_run_is_found_by_the_next_process(database_url, lapse):
    async with Store.open(database_url) as store:
        writer = await start(store)
        await writer.write("one")
    lapse()
    async with Store.open(database_url) as store:
        (run,) = await store.expired_runs()
        assert (run.id, run.attempt) == (writer.run.id, 1)
        await store.expire_run(run)
        assert (await Writer(store, run).message()).content == "one"

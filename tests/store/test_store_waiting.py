"""What is posted while a context is busy: it waits for its turn, interrupts, or steers."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from context_server.errors import CommandNotAllowed, Fenced, MessageOpen, QueueFull, WaitingNotFound
from context_server.records import IfBusy, MessageStatus, Mode, Outcome, Receipt, State, WorkflowCall
from context_server.store import Store
from context_server.store.exchanges import Post
from tests.databases import run_beside
from tests.store.asking import decide, go_on, suspended
from tests.store.writing import OWNER, Writer, call, claim, exchange, post, start


async def send(store: Store, context_id: str, text: str, if_busy: IfBusy, **options) -> Receipt:
    receipt, _ = await store.post_message(OWNER, context_id, Post(text=text, if_busy=if_busy, **options))
    return receipt


async def queue(store: Store, context_id: str, text: str = "And?") -> Receipt:
    return await send(store, context_id, text, IfBusy.QUEUE)


async def steer(store: Store, context_id: str, text: str = "Rather so") -> Receipt:
    return await send(store, context_id, text, IfBusy.STEER)


async def line(store: Store, context_id: str) -> list[str | None]:
    """The texts on the head's line, oldest first."""
    found, _ = await store.messages(OWNER, context_id, include_content=True)
    return [message.content for message in found]


async def waiting(store: Store, context_id: str) -> list[str]:
    return [message.content for message, _ in await store.suspension.waiting(OWNER, context_id)]


async def state_of(store: Store, context_id: str) -> State:
    return (await store.context(OWNER, context_id)).state


async def status_of(store: Store, context_id: str, message_id: str) -> MessageStatus:
    return (await store.message(OWNER, context_id, message_id)).status


# Each way to be busy


async def queued(store: Store) -> str:
    return (await post(store)).context_id


async def thinking(store: Store) -> str:
    return (await start(store)).run.context_id


async def streaming(store: Store) -> str:
    writer = await start(store)
    await writer.write("one")
    return writer.run.context_id


async def calling_tool(store: Store) -> str:
    writer = await start(store)
    await writer.write(call())
    return writer.run.context_id


async def awaiting_approval(store: Store) -> str:
    writer, _ = await suspended(store)
    return writer.run.context_id


async def cancelling(store: Store) -> str:
    context_id = await streaming(store)
    await store.request_cancel(OWNER, context_id)
    return context_id


Busy = Callable[[Store], Awaitable[str]]
UNHELD: list[Busy] = [queued, awaiting_approval]
WORKING: list[Busy] = [thinking, streaming, calling_tool]
BUSY = [*UNHELD, *WORKING, cancelling]
busy = pytest.mark.parametrize("make_busy", BUSY, ids=lambda make: make.__name__)


# Queue


@busy
@pytest.mark.scenario("when-busy", "Refused by default")
async def test_a_busy_context_refuses_what_says_nothing(store, make_busy):
    context_id = await make_busy(store)
    before = await store.context(OWNER, context_id)
    with pytest.raises(CommandNotAllowed):
        await store.post_message(OWNER, context_id, Post(text="And?"))
    assert await store.context(OWNER, context_id) == before


@busy
@pytest.mark.scenario("when-busy", "Queued")
async def test_a_message_waits_in_every_busy_state(store, make_busy):
    context_id = await make_busy(store)
    before = await store.context(OWNER, context_id)

    receipt = await queue(store, context_id)

    after = await store.context(OWNER, context_id)
    assert (receipt.disposition, receipt.state, receipt.version) == (IfBusy.QUEUE, before.state, before.version + 1)
    assert (after.state, after.version, after.head_message_id) == (
        before.state,
        receipt.version,
        before.head_message_id,
    )
    assert await status_of(store, context_id, receipt.reply_message_id) is MessageStatus.PENDING
    ((message, reply_id),) = await store.suspension.waiting(OWNER, context_id)
    assert (message.id, message.content, reply_id) == (receipt.message_id, "And?", receipt.reply_message_id)
    assert "And?" not in await line(store, context_id)


@pytest.mark.parametrize("if_busy", IfBusy)
async def test_an_idle_context_takes_every_message_at_once(store, if_busy):
    context = await store.create_context(OWNER)
    receipt = await send(store, context.id, "Hello", if_busy)
    assert (receipt.disposition, receipt.state) == (None, State.QUEUED)
    assert await waiting(store, context.id) == []


@pytest.mark.scenario("when-busy", "The queue is bounded")
@pytest.mark.parametrize("if_busy", [IfBusy.QUEUE, IfBusy.INTERRUPT, IfBusy.STEER])
async def test_only_so_many_wait(store, if_busy):
    context_id = await streaming(store)
    for number in range(3):
        await send(store, context_id, str(number), IfBusy.STEER if if_busy is IfBusy.STEER else IfBusy.QUEUE)
    before = await store.context(OWNER, context_id)
    with pytest.raises(QueueFull):
        await store.post_message(OWNER, context_id, Post(text="3", if_busy=if_busy), max_waiting=3)
    assert await store.context(OWNER, context_id) == before


@pytest.mark.scenario("when-busy", "In the order in which they came")
async def test_each_has_its_turn_in_the_order_in_which_they_came(store):
    writer = await start(store, "0")
    context_id = writer.run.context_id
    receipts = [await queue(store, context_id, str(number)) for number in (1, 2, 3)]
    for receipt in receipts:
        transition = await writer.write("!", outcome=Outcome.SUCCEEDED)
        assert (transition.promoted.run_id, transition.promoted.state) == (receipt.run_id, State.QUEUED)
        assert (transition.promoted.previous_version, transition.promoted.version) == (
            transition.version,
            transition.version + 1,
        )
        writer = await claim(store)
        assert (writer.run.id, writer.run.message_id) == (receipt.run_id, receipt.reply_message_id)
        history = await store.history(writer.run, max_bytes=1000)
        assert history[-1].message_id == receipt.message_id
    await writer.write("!", outcome=Outcome.SUCCEEDED)
    assert await line(store, context_id) == ["0", "!", "1", "!", "2", "!", "3", "!"]
    assert await waiting(store, context_id) == []


@pytest.mark.scenario("when-busy", "In the order in which they came")
async def test_the_order_is_not_that_of_the_clocks(store, database_url):
    context_id = await streaming(store)
    for number in range(5):
        await queue(store, context_id, str(number))
        await send(store, context_id, f"now {number}", IfBusy.INTERRUPT)
    run_beside(database_url, "UPDATE waiting_runs SET created_at = 1")
    assert await waiting(store, context_id) == [f"now {number}" for number in range(5)] + list("01234")


@pytest.mark.scenario("when-busy", "The run before fails")
@pytest.mark.parametrize("ending", ["succeeded", "failed", "interrupted", "crash", "crash of a stopped one", "expired"])
async def test_what_waits_has_its_turn_however_the_run_before_it_ends(store, lapse, ending):
    if ending == "expired":
        writer, _ = await suspended(store, {"lifetime": -1})
    else:
        writer = await start(store)
    context_id = writer.run.context_id
    receipt = await queue(store, context_id)
    match ending:
        case "succeeded" | "failed":
            moved = await writer.write("one", outcome=Outcome(ending))
        case "interrupted":
            receipt = await send(store, context_id, "Now!", IfBusy.INTERRUPT)
            moved = await writer.write("one", outcome=Outcome.STOPPED)
        case "expired":
            moved = await store.suspension.expire(OWNER, context_id)
        case _:
            if ending != "crash":
                receipt = await send(store, context_id, "Now!", IfBusy.INTERRUPT)
            lapse()
            (orphan,) = await store.expired_runs()
            moved = await store.expire_run(orphan)
    assert (await writer.message()).status.ended
    assert (moved.promoted.run_id, moved.promoted.state) == (receipt.run_id, State.QUEUED)
    context = await store.context(OWNER, context_id)
    assert (context.state, context.version) == (State.QUEUED, moved.promoted.version)
    assert context.head_message_id == receipt.reply_message_id
    assert (await claim(store)).run.id == receipt.run_id


@pytest.mark.scenario("when-busy", "Taken back")
async def test_what_waits_can_be_removed_by_its_message_or_its_reply(store, rows):
    context_id = await streaming(store)
    receipts = [await queue(store, context_id, str(number)) for number in range(3)]
    version = receipts[-1].version
    removed = await store.suspension.remove_waiting(OWNER, context_id, receipts[0].message_id, if_match=version)
    assert removed == (version + 1, receipts[0].reply_message_id)
    await store.suspension.remove_waiting(OWNER, context_id, receipts[2].reply_message_id, if_match=None)
    assert await waiting(store, context_id) == ["1"]
    assert rows("SELECT count(*) FROM messages") == [(4,)]
    for gone in (receipts[0].message_id, receipts[2].message_id, "nothing"):
        with pytest.raises(WaitingNotFound):
            await store.suspension.remove_waiting(OWNER, context_id, gone, if_match=None)


async def test_what_has_had_its_turn_cannot_be_removed(store):
    writer = await start(store)
    receipt = await queue(store, writer.run.context_id)
    await writer.write("one", outcome=Outcome.SUCCEEDED)
    with pytest.raises(WaitingNotFound):
        await store.suspension.remove_waiting(OWNER, writer.run.context_id, receipt.message_id, if_match=None)


@busy
@pytest.mark.scenario("when-busy", "Cancelled with what waits")
async def test_a_cancel_drops_what_waits_and_says_so(store, make_busy):
    context_id = await make_busy(store)
    receipts = [await queue(store, context_id, str(number)) for number in range(2)]
    late = None if make_busy is cancelling else await steer(store, context_id)

    context, transition = await store.request_cancel(OWNER, context_id)

    assert [ended.id for ended in transition.also_ended] == [receipt.reply_message_id for receipt in receipts]
    for receipt in receipts:
        reply = await store.message(OWNER, context_id, receipt.reply_message_id)
        assert (reply.status, reply.final_sequence) == (MessageStatus.CANCELLED, 0)
        assert (await store.message(OWNER, context_id, receipt.message_id)).content in ("0", "1")
    assert (transition.version, transition.promoted) == (context.version, None)
    assert context.state is (State.IDLE if make_busy in UNHELD else State.CANCELLING)
    assert await waiting(store, context_id) == []
    if context.state is State.CANCELLING:
        run_id = context.active_run.id
        lapsed = await _end(store, context_id, run_id)
        assert lapsed.promoted is None
    assert await state_of(store, context_id) is State.IDLE
    assert await store.claim_runs(10) == []
    if late is not None:
        assert "Rather so" not in await line(store, context_id)


async def _end(store: Store, context_id: str, run_id: str):
    """Ends a run that was told to stop, as the process that took it over."""
    await store._write(
        lambda connection: connection.exec_driver_sql(f"UPDATE runs SET lease_expires_at = NULL WHERE id = '{run_id}'")
    )
    (orphan,) = await store.expired_runs()
    return await store.expire_run(orphan)


async def test_a_message_that_waits_is_no_parent(store):
    context_id = await streaming(store)
    receipt = await queue(store, context_id)
    for parent_id in (receipt.message_id, receipt.reply_message_id):
        for if_busy in (IfBusy.QUEUE, IfBusy.INTERRUPT):
            with pytest.raises(MessageOpen):
                await send(store, context_id, "On that", if_busy, parent_id=parent_id)


async def test_what_waits_with_a_parent_of_its_own_keeps_it(store):
    done = await exchange(store, "Hello", "one")
    context_id = done.run.context_id
    user = (await done.message()).parent_id
    writer = await start(store, "Go on", context_id=context_id)
    edited = await send(store, context_id, "Edited", IfBusy.QUEUE, parent_id=done.run.message_id)
    first = await send(store, context_id, "Afresh", IfBusy.QUEUE, parent_id=None)
    await writer.write("two", outcome=Outcome.SUCCEEDED)
    assert await line(store, context_id) == ["Hello", "one", "Edited", ""]
    message = await store.message(OWNER, context_id, edited.message_id)
    assert (message.parent_id, user is not None) == (done.run.message_id, True)
    await (await claim(store)).write("three", outcome=Outcome.SUCCEEDED)
    assert await line(store, context_id) == ["Afresh", ""]
    assert (await store.message(OWNER, context_id, first.message_id)).parent_id is None


@pytest.mark.scenario("when-busy", "Two tabs post at once")
async def test_two_who_queue_at_once_both_have_their_turn(store):
    writer = await start(store)
    context_id = writer.run.context_id
    receipts = await asyncio.gather(*(queue(store, context_id, str(number)) for number in range(8)))
    assert len({receipt.version for receipt in receipts}) == 8
    for _ in receipts:
        await writer.write("!", outcome=Outcome.SUCCEEDED)
        writer = await claim(store)
    await writer.write("!", outcome=Outcome.SUCCEEDED)
    texts = await line(store, context_id)
    assert sorted(texts[2::2]) == [str(number) for number in range(8)]
    assert await state_of(store, context_id) is State.IDLE


async def test_what_waits_outlives_its_process(database_url):
    async with Store.open(database_url, connections=4) as store:
        context_id = await queued(store)
        receipt = await queue(store, context_id)
    async with Store.open(database_url, connections=4) as store:
        assert await waiting(store, context_id) == ["And?"]
        await (await claim(store)).write("one", outcome=Outcome.SUCCEEDED)
        assert (await claim(store)).run.id == receipt.run_id


async def test_a_deleted_context_takes_what_waits_with_it(store, rows):
    context_id = await streaming(store)
    await queue(store, context_id)
    await steer(store, context_id)
    await store.delete_context(OWNER, context_id)
    assert rows("SELECT count(*) FROM waiting_runs") == rows("SELECT count(*) FROM messages") == [(0,)]


# Interrupt


@pytest.mark.scenario("when-busy", "Interrupted while a person is asked")
@pytest.mark.parametrize("make_busy", UNHELD, ids=lambda make: make.__name__)
async def test_an_interruption_of_what_nobody_runs_is_next_at_once(store, make_busy):
    context_id = await make_busy(store)
    before = await store.context(OWNER, context_id)
    waits = await queue(store, context_id, "Later")

    receipt, transition = await store.post_message(OWNER, context_id, Post(text="Now!", if_busy=IfBusy.INTERRUPT))

    assert (receipt.disposition, receipt.state) == (IfBusy.INTERRUPT, State.QUEUED)
    assert (transition.previous_version, transition.state) == (waits.version, State.IDLE)
    assert (transition.ended.id, transition.ended.status) == (before.active_run.message_id, MessageStatus.CANCELLED)
    assert (transition.promoted.run_id, transition.promoted.version) == (receipt.run_id, receipt.version)
    assert await waiting(store, context_id) == ["Later"]
    assert (await claim(store)).run.id == receipt.run_id


@pytest.mark.scenario("when-busy", "Interrupted")
@pytest.mark.parametrize("make_busy", [*WORKING, cancelling], ids=lambda make: make.__name__)
async def test_an_interruption_of_a_run_waits_in_front_until_that_has_stopped(store, make_busy):
    context_id = await make_busy(store)
    run = (await store.context(OWNER, context_id)).active_run
    waits = await queue(store, context_id, "Later")

    receipt, transition = await store.post_message(OWNER, context_id, Post(text="Now!", if_busy=IfBusy.INTERRUPT))

    assert (receipt.disposition, receipt.state) == (IfBusy.INTERRUPT, State.CANCELLING)
    if make_busy is cancelling:
        assert transition is None
    else:
        assert (transition.previous_version, transition.version) == (waits.version, receipt.version)
        assert (transition.state, transition.run_id) == (State.CANCELLING, run.id)
    assert receipt.version == (await store.context(OWNER, context_id)).version
    assert await waiting(store, context_id) == ["Now!", "Later"]
    moved = await _end(store, context_id, run.id)
    assert (moved.state, moved.promoted.run_id) == (State.IDLE, receipt.run_id)
    assert await waiting(store, context_id) == ["Later"]


# Steer


@pytest.mark.scenario("when-busy", "Steered")
async def test_a_running_agent_takes_what_steers_it_at_its_next_look(store):
    writer = await start(store)
    await writer.write("one ")
    context_id = writer.run.context_id
    receipts = [await steer(store, context_id, text) for text in ("left", "and up")]
    assert {receipt.reply_message_id for receipt in receipts} == {writer.run.message_id}
    assert {receipt.disposition for receipt in receipts} == {IfBusy.STEER}
    assert await line(store, context_id) == ["Hello", "one "]

    taken = await store.suspension.look(writer.run)

    assert [turn.text for turn in taken.steering] == ["left", "and up"]
    assert all(turn.steers for turn in taken.steering)
    assert taken.version == receipts[-1].version + 1 == (await store.context(OWNER, context_id)).version
    known = {turn.message_id for turn in taken.steering}
    assert await store.suspension.look(writer.run, known) == type(taken)(mode=Mode.ACT)
    again = await store.suspension.look(writer.run)  # As after an unknown outcome.
    assert (again.steering, again.version) == (taken.steering, None)
    assert await line(store, context_id) == ["Hello", "one ", "left", "and up"]
    moved = await writer.write("two", outcome=Outcome.SUCCEEDED)
    assert moved.promoted is None
    await post(store, "Thanks", context_id=context_id)
    assert await line(store, context_id) == ["Hello", "one two", "left", "and up", "Thanks", ""]
    history = await store.history((await claim(store)).run, max_bytes=1000)
    assert [(turn.text, turn.steers) for turn in history] == [
        ("Hello", False), ("one two", False), ("left", True), ("and up", True), ("Thanks", False),
    ]  # fmt: skip


async def test_a_stale_attempt_takes_nothing(store):
    writer = await start(store)
    await steer(store, writer.run.context_id, "left")

    with pytest.raises(Fenced):
        await store.suspension.look(replace(writer.run, attempt=writer.run.attempt + 1))

    assert [turn.text for turn in (await store.suspension.look(writer.run)).steering] == ["left"]


async def test_a_workflow_does_not_steer(store):
    writer = await start(store)
    workflow = Post(text="", workflow=WorkflowCall(name="release", input={}), if_busy=IfBusy.STEER)

    receipt, _ = await store.post_message(OWNER, writer.run.context_id, workflow)

    assert receipt.disposition is IfBusy.QUEUE


async def test_regenerating_what_steered_regenerates_the_reply_that_it_steered(store):
    writer = await start(store)
    await writer.write("one ")
    steering = await steer(store, writer.run.context_id, "left")
    await store.suspension.look(writer.run)
    await writer.write("two", outcome=Outcome.SUCCEEDED)

    receipt, _ = await store.regenerate(OWNER, writer.run.context_id, steering.message_id)

    asked = await store.message(OWNER, writer.run.context_id, writer.run.message_id)
    assert receipt.message_id == asked.parent_id


async def test_what_waits_cannot_be_forked(store):
    writer = await start(store)
    post = Post(text="Wait", parent_id=None, if_busy=IfBusy.QUEUE)
    receipt, _ = await store.post_message(OWNER, writer.run.context_id, post)

    with pytest.raises(MessageOpen):
        await store.fork_context(OWNER, writer.run.context_id, receipt.message_id, title=None)


async def test_a_look_tells_the_mode_as_it_is_now(store):
    writer = await start(store)
    await store.change_context(OWNER, writer.run.context_id, {"mode": Mode.PLAN})
    assert (await store.suspension.look(writer.run)).mode is Mode.PLAN


@pytest.mark.scenario("when-busy", "Steered too late")
@pytest.mark.parametrize("ending", ["succeeded", "failed", "crash", "interrupted"])
async def test_what_came_too_late_to_steer_is_answered_next(store, lapse, ending):
    writer = await start(store)
    context_id = writer.run.context_id
    waits = await queue(store, context_id, "Later")
    late = [await steer(store, context_id, text) for text in ("left", "and up")]
    if ending == "crash":
        lapse()
        (orphan,) = await store.expired_runs()
        moved = await store.expire_run(orphan)
    else:
        if ending == "interrupted":
            await send(store, context_id, "Now!", IfBusy.INTERRUPT)
        moved = await writer.write("one", outcome=Outcome.STOPPED if ending == "interrupted" else Outcome(ending))

    answering = await claim(store)

    assert moved.promoted.run_id == answering.run.id not in (waits.run_id, writer.run.id)
    history = await store.history(answering.run, max_bytes=1000)
    assert [turn.message_id for turn in history][-2:] == [receipt.message_id for receipt in late]
    assert not any(turn.steers for turn in history)
    assert (await store.suspension.look(answering.run)).steering == ()
    assert "Later" in await waiting(store, context_id)


@pytest.mark.scenario("when-busy", "Steered while it waits")
@pytest.mark.parametrize("make_busy", UNHELD, ids=lambda make: make.__name__)
async def test_a_run_that_waits_is_steered_once_it_is_on(store, make_busy):
    context_id = await make_busy(store)
    await steer(store, context_id)
    if make_busy is awaiting_approval:
        (asked,) = await store.suspension.approvals(OWNER, context_id, only_pending=True)
        await decide(store, asked)
    writer = await go_on(store)
    assert [turn.text for turn in (await store.suspension.look(writer.run)).steering] == ["Rather so"]


async def test_what_was_taken_before_a_suspension_is_in_the_history_after_it(store):
    writer, (asked,) = await suspended(store)
    await steer(store, writer.run.context_id)
    await decide(store, asked)
    following = await go_on(store)
    await store.suspension.look(following.run)
    lost = await store.history(following.run, max_bytes=1000)
    assert [turn.text for turn in lost] == ["Hello", "Rather so"]


@pytest.mark.scenario("when-busy", "Steered while it stops")
async def test_what_would_steer_a_run_that_stops_waits_for_its_turn(store):
    context_id = await cancelling(store)
    receipt = await steer(store, context_id)
    assert receipt.disposition is IfBusy.QUEUE
    assert await waiting(store, context_id) == ["Rather so"]


async def test_a_run_takes_nothing_of_another(store):
    writer = await start(store)
    receipt = await steer(store, writer.run.context_id)
    other = await start(store)
    assert (await store.suspension.look(other.run)).steering == ()
    assert receipt.run_id == writer.run.id
    stale = Writer(store, writer.run)
    assert len((await store.suspension.look(stale.run)).steering) == 1

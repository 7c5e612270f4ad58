"""Mailboxes and the hub, with a clock that the tests move."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest

from context_server.hub import Hub, put_snapshot
from context_server.mailbox import _PULLED_AGAIN as PULLED_AGAIN
from context_server.mailbox import Mailbox, Pacing, Pulls
from context_server.metrics import Metrics
from context_server.records import (
    ContentDelta,
    ContextChanged,
    ContextDeleted,
    MessageCompleted,
    MessageStatus,
    Signal,
    Snapshot,
    State,
    StateChanged,
)

AT = datetime(2026, 1, 1, tzinfo=UTC)
SETTLE, INTERVAL, DELAY, PATIENCE = 0.125, 0.5, 2.0, 1.0


class Clock:
    """Seconds, as the test sets them."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def hub(clock: Clock) -> Hub:
    return Hub(Pacing(), Metrics(), clock)


@pytest.fixture
def pulls(clock: Clock) -> Pulls:
    return Pulls(clock)


@pytest.fixture
def paced(clock: Clock, pulls: Pulls) -> Mailbox:
    """A mailbox of a subscriber who pulls at each signal, or whose patience runs out."""
    return Mailbox(
        Pacing(settle=SETTLE, interval=INTERVAL, completion=DELAY, patience=PATIENCE), pulls, Metrics(), clock
    )


@pytest.fixture
def mailbox(clock: Clock, pulls: Pulls) -> Mailbox:
    return Mailbox(Pacing(), pulls, Metrics(), clock)


def state(
    version: int, new: State = State.THINKING, previous: State | None = State.QUEUED, context: str = "c"
) -> Signal:
    return StateChanged(
        context_id=context, new_state=new, previous_state=previous, version=version, run_id=None, timestamp=AT
    )


def delta(sequence: int, message: str = "m", context: str = "c") -> Signal:
    return ContentDelta(context_id=context, message_id=message, current_sequence=sequence, timestamp=AT)


def completed(sequence: int, message: str = "m", context: str = "c", version: int = 9) -> MessageCompleted:
    return MessageCompleted(
        context_id=context,
        message_id=message,
        final_sequence=sequence,
        status=MessageStatus.COMPLETED,
        version=version,
        timestamp=AT,
    )


def changed(version: int, context: str = "c") -> Signal:
    return ContextChanged(context_id=context, version=version, timestamp=AT)


def deleted(version: int, context: str = "c") -> Signal:
    return ContextDeleted(context_id=context, version=version, timestamp=AT)


def told(mailbox: Mailbox) -> list[Signal]:
    """What may be sent now."""
    return mailbox.take()[0]


# Latest wins


def test_a_newer_signal_replaces_an_unsent_one(mailbox: Mailbox) -> None:
    for signal in (delta(1), changed(2), delta(2), delta(5), changed(3)):
        mailbox.put(signal)
    assert told(mailbox) == [delta(5), changed(3)]
    assert told(mailbox) == []


def test_an_older_signal_replaces_nothing(mailbox: Mailbox) -> None:
    for signal in (state(7), delta(5), state(6, State.STREAMING), delta(3), state(7), delta(5)):
        mailbox.put(signal)
    assert told(mailbox) == [state(7), delta(5)]


def test_messages_and_contexts_have_slots_of_their_own(mailbox: Mailbox) -> None:
    signals = [state(1), delta(1, "a"), delta(2, "b"), state(1, context="d"), delta(3, "e", "d")]
    for signal in signals:
        mailbox.put(signal)
    assert told(mailbox) == signals


def test_merged_states_say_what_the_client_last_knew(mailbox: Mailbox) -> None:
    mailbox.put(state(2, State.QUEUED, State.IDLE))
    mailbox.put(state(3, State.THINKING, State.QUEUED))
    mailbox.put(state(4, State.STREAMING, State.THINKING))
    assert told(mailbox) == [state(4, State.STREAMING, State.IDLE)]
    mailbox.put(state(5, State.IDLE, State.STREAMING))
    assert told(mailbox) == [state(5, State.IDLE, State.STREAMING)]


def test_a_reply_ends_before_the_state_that_followed(mailbox: Mailbox) -> None:
    """Unread, a whole reply is its head, its end and the last state, in this order."""
    mailbox.put(state(2, State.QUEUED, State.IDLE))
    mailbox.put(state(3, State.STREAMING, State.QUEUED))
    for sequence in range(1, 100):
        mailbox.put(delta(sequence))
    mailbox.put(completed(99, version=4))
    mailbox.put(state(4, State.IDLE, State.STREAMING))
    assert told(mailbox) == [delta(99), completed(99, version=4), state(4, State.IDLE, State.IDLE)]


def test_endings_are_never_merged(mailbox: Mailbox) -> None:
    for number in range(5):
        mailbox.put(delta(number + 1, f"m{number}"))
        mailbox.put(completed(number + 1, f"m{number}"))
    mailbox.put(completed(1, "m0"))  # Known already.
    assert [signal for signal in told(mailbox) if isinstance(signal, MessageCompleted)] == [
        completed(number + 1, f"m{number}") for number in range(5)
    ]


def test_nothing_of_a_message_follows_its_end(mailbox: Mailbox) -> None:
    mailbox.put(completed(5))
    mailbox.put(delta(5))
    assert told(mailbox) == [completed(5)]


def test_a_deleted_context_leaves_one_signal(mailbox: Mailbox) -> None:
    for signal in (state(1), delta(3), changed(2), delta(7, "other", "d"), deleted(3)):
        mailbox.put(signal)
    assert told(mailbox) == [delta(7, "other", "d"), deleted(3)]


@pytest.mark.scenario("signals", "Slow reader")
def test_who_never_reads_costs_constant_memory(mailbox: Mailbox, hub: Hub) -> None:
    with hub.subscribe("owner", ["c"]) as unread:
        for sequence in range(1, 100_001):
            hub.publish("owner", delta(sequence, f"m{sequence % 3}"))
            if sequence % 1000 == 0:
                hub.publish("owner", state(sequence // 1000))
        assert len(unread._slots) == 4
        assert unread._sent == {}
        assert sorted(signal.current_sequence for signal in told(unread) if isinstance(signal, ContentDelta)) == [
            99_998,
            99_999,
            100_000,
        ]


def test_merged_signals_are_counted(clock: Clock) -> None:
    metrics = Metrics()
    mailbox = Mailbox(Pacing(), Pulls(clock), metrics, clock)
    for signal in (state(1), delta(1), state(2), delta(2), delta(3), completed(3)):
        mailbox.put(signal)
    assert b"context_server_signals_merged_total 3.0" in metrics.exposition()


# Pacing


@pytest.mark.scenario("signals", "Paced signals")
def test_the_next_delta_waits_for_the_answer_of_a_pull_and_a_little_longer(
    paced: Mailbox, pulls: Pulls, clock: Clock
) -> None:
    paced.put(delta(1))
    assert paced.take() == ([delta(1)], None)
    paced.put(delta(2))
    assert paced.take() == ([], PATIENCE)
    clock.now += 0.25
    pulls.note("m", 1)
    assert paced.take() == ([], SETTLE)
    paced.put(delta(3))
    clock.now += SETTLE
    assert paced.take() == ([delta(3)], None)


def test_a_pull_that_was_answered_before_the_next_delta_holds_nothing(
    paced: Mailbox, pulls: Pulls, clock: Clock
) -> None:
    paced.put(delta(1))
    told(paced)
    pulls.note("m", 1)
    clock.now += SETTLE
    paced.put(delta(2))
    assert paced.take() == ([delta(2)], None)


def test_a_pull_that_was_asked_for_before_the_last_delta_does_not_count(
    paced: Mailbox, pulls: Pulls, clock: Clock
) -> None:
    paced.put(delta(5))
    told(paced)
    pulls.note("m", 4)
    paced.put(delta(6))
    assert paced.take() == ([], PATIENCE)


def test_a_pull_that_was_answered_before_the_first_signal_counts(paced: Mailbox, pulls: Pulls, clock: Clock) -> None:
    """It waited for the read that brought the signal, and its client has nothing left to pull."""
    pulls.note("m", 2)
    for number in range(1000):
        pulls.note(f"other {number}", 1)
    pulls.note("m", 2)
    clock.now += 0.001
    paced.put(delta(2))
    assert paced.take() == ([delta(2)], None)
    paced.put(delta(3))
    assert paced.take() == ([], INTERVAL)


def test_an_answer_that_was_quicker_than_its_signal_holds_the_next_for_an_interval(
    paced: Mailbox, pulls: Pulls, clock: Clock
) -> None:
    paced.put(delta(1))
    told(paced)
    pulls.note("m", 2)
    clock.now += SETTLE
    paced.put(delta(2))
    assert paced.take() == ([delta(2)], None)
    paced.put(delta(3))
    assert paced.take() == ([], INTERVAL)
    pulls.note("m", 2)
    assert paced.take() == ([], SETTLE)


@pytest.mark.scenario("signals", "Paced signals")
async def test_an_answered_pull_wakes_whoever_waits_for_it(paced: Mailbox, pulls: Pulls) -> None:
    paced.put(delta(1))
    told(paced)
    paced.put(delta(2))
    _, left = paced.take()
    waiting = asyncio.create_task(paced.wait(left))
    await asyncio.sleep(0)
    pulls.note("m", 1)
    await waiting
    assert paced.take() == ([], SETTLE)


@pytest.mark.scenario("signals", "Paced signals")
def test_where_nobody_pulls_deltas_keep_an_interval_once_patience_has_run_out(paced: Mailbox, clock: Clock) -> None:
    paced.put(delta(1))
    told(paced)
    paced.put(delta(2))
    clock.now += PATIENCE
    assert paced.take() == ([delta(2)], None)
    paced.put(delta(3))
    assert paced.take() == ([], INTERVAL)
    clock.now += INTERVAL - 0.1
    paced.put(delta(4))
    signals, left = paced.take()
    assert signals == []
    assert left == pytest.approx(0.1)
    clock.now += 0.2
    assert paced.take() == ([delta(4)], None)


def unpulled_reply(paced: Mailbox, clock: Clock, message: str, context: str = "c") -> None:
    """A reply whose signals are sent while nobody pulls it."""
    for signal, seconds in ((delta(1, message, context), PATIENCE), (completed(1, message, context), DELAY)):
        paced.put(signal)
        told(paced)
        clock.now += seconds
    assert told(paced) == [completed(1, message, context)]


@pytest.mark.scenario("signals", "Patience runs out once")
def test_where_nobody_pulled_one_message_the_next_is_not_waited_for(paced: Mailbox, clock: Clock) -> None:
    unpulled_reply(paced, clock, "m")
    paced.put(delta(1, "next"))
    assert paced.take() == ([delta(1, "next")], None)
    paced.put(delta(2, "next"))
    assert paced.take() == ([], INTERVAL)
    clock.now += INTERVAL
    assert paced.take() == ([delta(2, "next")], None)
    paced.put(completed(2, "next"))
    assert paced.take() == ([], DELAY)


def follow(paced: Mailbox, pulls: Pulls, clock: Clock, numbers: range, *, every: int = 1) -> None:
    """Deltas that are sent an interval apart, each ``every``-th of them pulled here."""
    for number in numbers:
        paced.put(delta(number, "next"))
        assert told(paced) == [delta(number, "next")]
        if number % every == 0:
            pulls.note("next", number)
        clock.now += INTERVAL


@pytest.mark.scenario("signals", "Patience runs out once")
def test_many_pulls_in_a_row_have_the_context_waited_for_again(paced: Mailbox, pulls: Pulls, clock: Clock) -> None:
    unpulled_reply(paced, clock, "m")
    follow(paced, pulls, clock, range(1, PULLED_AGAIN + 2))
    paced.put(delta(PULLED_AGAIN + 2, "next"))
    told(paced)
    paced.put(completed(PULLED_AGAIN + 2, "next"))
    assert paced.take() == ([], PATIENCE)


@pytest.mark.scenario("signals", "Patience runs out once")
def test_where_pulls_are_spread_over_nodes_nobody_is_waited_for(paced: Mailbox, pulls: Pulls, clock: Clock) -> None:
    unpulled_reply(paced, clock, "m")
    follow(paced, pulls, clock, range(1, 10 * PULLED_AGAIN), every=2)
    paced.put(delta(10 * PULLED_AGAIN, "next"))
    assert paced.take() == ([delta(10 * PULLED_AGAIN, "next")], None)


@pytest.mark.scenario("signals", "Patience runs out once")
def test_another_context_of_the_stream_is_waited_for_as_ever(paced: Mailbox, clock: Clock) -> None:
    unpulled_reply(paced, clock, "m")
    paced.put(delta(1, "other", "d"))
    told(paced)
    paced.put(delta(2, "other", "d"))
    assert paced.take() == ([], PATIENCE)


def test_another_stream_of_the_context_has_patience_of_its_own(paced: Mailbox, pulls: Pulls, clock: Clock) -> None:
    unpulled_reply(paced, clock, "m")
    other = Mailbox(
        Pacing(settle=SETTLE, interval=INTERVAL, completion=DELAY, patience=PATIENCE), pulls, Metrics(), clock
    )
    for sequence in (1, 2):
        other.put(delta(sequence, "next"))
        signals, left = other.take()
    assert (signals, left) == ([], PATIENCE)


def test_how_many_contexts_are_remembered_as_unpulled_is_bounded(paced: Mailbox, clock: Clock) -> None:
    for number in range(1001):
        unpulled_reply(paced, clock, f"m{number}", f"c{number}")
    paced.put(deleted(9, "c1000"))
    assert list(paced._unpulled) == [f"c{number}" for number in range(1, 1000)]


@pytest.mark.scenario("signals", "Paced signals")
def test_the_end_waits_for_its_own_time_after_the_last_pull(paced: Mailbox, pulls: Pulls, clock: Clock) -> None:
    paced.put(delta(2))
    told(paced)
    for signal in (completed(2), state(9, State.IDLE)):
        paced.put(signal)
    assert paced.take() == ([], PATIENCE)
    clock.now += 0.5
    pulls.note("m", 2)
    assert paced.take() == ([], DELAY)
    clock.now += DELAY
    assert paced.take() == ([completed(2), state(9, State.IDLE)], None)


def test_the_end_comes_without_a_pull_too(paced: Mailbox, clock: Clock) -> None:
    for signal in (delta(2), completed(2)):
        paced.put(signal)
    assert paced.take() == ([delta(2)], PATIENCE)
    clock.now += PATIENCE
    assert paced.take() == ([], DELAY - PATIENCE)
    clock.now += DELAY - PATIENCE
    assert paced.take() == ([completed(2)], None)


def test_an_end_without_deltas_is_told_at_once(paced: Mailbox) -> None:
    paced.put(completed(0))
    assert paced.take() == ([completed(0)], None)


def test_without_patience_nothing_is_held(mailbox: Mailbox) -> None:
    mailbox.put(delta(1))
    told(mailbox)
    for signal in (delta(2), completed(2)):
        mailbox.put(signal)
    assert mailbox.take() == ([delta(2), completed(2)], None)


def test_pulls_are_remembered_only_while_somebody_is_signalled(paced: Mailbox, pulls: Pulls, clock: Clock) -> None:
    pulls.note("m", 1)
    for message_id in ("m", "n"):
        paced.put(delta(1, message_id))
        told(paced)
        pulls.note(message_id, 1)
    paced.put(delta(2, "n"))
    told(paced)
    paced.put(completed(1))
    clock.now += DELAY
    assert completed(1) in told(paced)
    paced.leave()
    assert (pulls._followers, pulls._answered, pulls._waiting) == ({}, {}, {})


def test_what_is_held_holds_its_own_context_only(paced: Mailbox, clock: Clock) -> None:
    paced.put(delta(1))
    told(paced)
    for signal in (delta(2), state(5), delta(1, "x", "d"), changed(6), state(2, context="d")):
        paced.put(signal)
    assert paced.take() == ([delta(1, "x", "d"), state(2, context="d")], PATIENCE)
    clock.now += PATIENCE
    assert paced.take() == ([delta(2), state(5), changed(6)], None)


def test_messages_of_one_context_are_paced_each_by_itself(paced: Mailbox, pulls: Pulls, clock: Clock) -> None:
    paced.put(delta(1, "a"))
    told(paced)
    paced.put(delta(1, "b"))
    assert paced.take() == ([delta(1, "b")], None)
    pulls.note("b", 1)
    clock.now += SETTLE
    paced.put(delta(2, "b"))
    paced.put(delta(2, "a"))
    assert paced.take() == ([delta(2, "b")], PATIENCE - SETTLE)


# Snapshots


def snapshot(
    version: int, newest: Any = None, newest_sequence: int = 0, ended: tuple[MessageCompleted, ...] = ()
) -> Snapshot:
    return Snapshot(
        context_id="c",
        state=State.STREAMING,
        version=version,
        run_id=None,
        newest=newest,
        newest_sequence=newest_sequence,
        ended=ended,
        at=AT,
    )


def test_a_snapshot_says_missed_endings_then_state_then_reply_then_end(mailbox: Mailbox) -> None:
    newest = completed(4, "new")
    put_snapshot(mailbox, snapshot(5, newest, 4, (completed(1, "old"), newest)))
    assert told(mailbox) == [completed(1, "old"), state(5, State.STREAMING, None), delta(4, "new"), newest]


def test_an_empty_reply_is_no_delta(mailbox: Mailbox) -> None:
    put_snapshot(mailbox, snapshot(5, delta(0)))
    assert told(mailbox) == [state(5, State.STREAMING, None)]


def test_a_stale_snapshot_replaces_nothing_newer(mailbox: Mailbox) -> None:
    """Subscribed first, read later: what was published between is newer than what was read."""
    for signal in (delta(9), completed(9, version=7), state(7, State.IDLE, State.STREAMING)):
        mailbox.put(signal)
    put_snapshot(mailbox, snapshot(6, delta(3), 3))
    assert told(mailbox) == [delta(9), completed(9, version=7), state(7, State.IDLE, State.STREAMING)]


def test_a_deletion_is_not_undone_by_a_stale_snapshot(mailbox: Mailbox) -> None:
    mailbox.put(deleted(8))
    put_snapshot(mailbox, snapshot(6, delta(3), 3))
    assert told(mailbox) == [deleted(8)]


# Waiting, and the end


async def test_a_wait_ends_with_a_signal_with_its_delay_and_with_the_mailbox(mailbox: Mailbox) -> None:
    await mailbox.wait(0)  # Nothing came, and it returned.
    waiting = asyncio.create_task(mailbox.wait(None))
    await asyncio.sleep(0)
    assert not waiting.done()
    mailbox.put(delta(1))
    await asyncio.wait_for(waiting, 60)
    assert told(mailbox) == [delta(1)]
    waiting = asyncio.create_task(mailbox.wait(60))
    await asyncio.sleep(0)
    mailbox.close()
    await asyncio.wait_for(waiting, 60)
    assert mailbox.closed


def test_a_closed_mailbox_still_gives_what_it_holds(paced: Mailbox, clock: Clock) -> None:
    paced.put(delta(1))
    told(paced)
    paced.put(completed(1))
    paced.close()
    assert paced.take() == ([], PATIENCE)
    clock.now += DELAY
    assert paced.take() == ([completed(1)], None)


# The hub


def test_a_signal_reaches_who_subscribed_to_its_context_or_to_all(hub: Hub) -> None:
    with (
        hub.subscribe("me", ["c"]) as one,
        hub.subscribe("me", ["c", "d"]) as both,
        hub.subscribe("me", None) as everything,
        hub.subscribe("you", None) as foreign,
    ):
        hub.publish("me", delta(1, "m", "d"))
        assert [told(mailbox) for mailbox in (one, both, everything, foreign)] == [
            [],
            [delta(1, "m", "d")],
            [delta(1, "m", "d")],
            [],
        ]
        hub.publish("me", delta(2))
        assert [told(mailbox) for mailbox in (one, both, everything, foreign)] == [[delta(2)]] * 3 + [[]]


def test_who_has_left_leaves_nothing_behind(hub: Hub) -> None:
    with hub.subscribe("me", ["c"]) as left, hub.subscribe("me", None), hub.watch("m"):
        pass
    hub.publish("me", delta(1))
    assert told(left) == []
    assert not hub._of_context
    assert not hub._of_owner
    assert not hub._watches


def test_heads_are_those_of_open_messages(hub: Hub) -> None:
    hub.open_message("me", "c", "m")
    hub.open_message("you", "d", "n", 4)
    hub.publish("me", delta(7))
    hub.publish("me", delta(3, "unknown"))
    assert hub.heads("me", ["c"]) == hub.heads("me", None) == [("c", "m", 7)]
    assert hub.heads("you", None) == [("d", "n", 4)]
    hub.publish("me", completed(7))
    hub.publish("you", deleted(2, "d"))
    assert hub.heads("me", None) == hub.heads("me", ["c"]) == hub.heads("you", None) == []
    assert not hub._heads
    assert not hub._owners


async def test_a_watch_is_told_of_growth_end_and_deletion(hub: Hub) -> None:
    hub.open_message("me", "c", "m")
    with hub.watch("m") as watch, hub.watch("other") as other:
        for signal in (delta(1), completed(1)):
            watch.clear()
            assert await watch.wait(0) is False
            hub.publish("me", signal)
            assert await watch.wait(60) is True
        hub.open_message("me", "c", "m")
        watch.clear()
        hub.publish("me", deleted(3))
        assert await watch.wait(60) is True
        assert await other.wait(0) is False


async def test_closing_the_hub_ends_every_stream_and_wait(hub: Hub) -> None:
    with hub.subscribe("me", ["c"]) as one, hub.subscribe("me", None) as all_, hub.watch("m") as watch:
        hub.close()
        assert one.closed
        assert all_.closed
        assert await watch.wait(60) is True
    with hub.subscribe("me", ["c"]) as late:
        assert late.closed

"""A subscriber of some types of signals: what it does not get neither reaches it nor holds anything up."""

import pytest

from context_server.hub import Hub
from context_server.mailbox import Mailbox, Pacing, Pulls
from context_server.metrics import Metrics
from context_server.records import ContentDelta, ContextDeleted, MessageCompleted, State, StateChanged
from tests.unit.test_hub import Clock, changed, completed, deleted, delta, state

PACING = Pacing(settle=0.125, interval=0.5, completion=2.0, patience=1.0)


def subscriber(*types: type) -> Mailbox:
    """A mailbox for these types, all paced, at a moment that stands still."""
    clock = Clock()
    return Mailbox(PACING, Pulls(clock), Metrics(), clock, frozenset(types))


@pytest.mark.scenario("signals", "Types filter")
def test_an_end_is_not_held_for_deltas_that_are_not_sent() -> None:
    mailbox = subscriber(MessageCompleted)
    for signal in (delta(1), state(2), delta(2)):
        mailbox.put(signal)
        assert mailbox.take() == ([], None)
    mailbox.put(completed(2))
    assert mailbox.take() == ([completed(2)], None)


@pytest.mark.scenario("signals", "Types filter")
def test_a_state_is_not_held_for_an_end_that_is_not_sent() -> None:
    mailbox = subscriber(StateChanged)
    mailbox.put(delta(1))
    assert mailbox.take() == ([], None)
    for signal in (delta(2), completed(2), state(9, State.IDLE)):
        mailbox.put(signal)
    assert mailbox.take() == ([state(9, State.IDLE)], None)


def test_an_end_that_is_not_sent_leaves_nothing_behind() -> None:
    clock = Clock()
    pulls = Pulls(clock)
    mailbox = Mailbox(PACING, pulls, Metrics(), clock, frozenset({ContentDelta}))
    mailbox.put(delta(1))
    assert mailbox.take() == ([delta(1)], None)
    assert pulls._followers
    for signal in (delta(2), completed(2)):
        mailbox.put(signal)
    assert pulls._followers, "The last delta is still to come."
    clock.now += PACING.patience
    assert mailbox.take() == ([delta(2)], None)
    assert not pulls._followers
    assert not mailbox._sent
    assert not mailbox._ending


def test_what_is_sent_is_paced_as_ever() -> None:
    mailbox = subscriber(ContentDelta, StateChanged)
    for signal in (delta(1), state(2)):
        mailbox.put(signal)
    assert mailbox.take() == ([delta(1), state(2)], None)
    mailbox.put(delta(2))
    assert mailbox.take() == ([], PACING.patience)


def test_a_deletion_comes_whatever_was_asked_for() -> None:
    mailbox = subscriber(MessageCompleted)
    for signal in (changed(2), completed(1), deleted(3)):
        mailbox.put(signal)
    assert mailbox.take() == ([deleted(3)], None)
    assert subscriber(ContextDeleted).take() == ([], None)


async def test_what_is_not_wanted_wakes_nobody() -> None:
    clock = Clock()
    hub = Hub(PACING, Metrics(), clock)
    with hub.subscribe("owner", ["c"], frozenset({MessageCompleted})) as some, hub.subscribe("owner", ["c"]) as every:
        for signal in (delta(1), state(2)):
            hub.publish("owner", signal)
        await every.wait(None)
        assert every.take() == ([delta(1), state(2)], None)
        assert some.take() == ([], None)
        hub.publish("owner", completed(1))
        await some.wait(None)
        assert some.take() == ([completed(1)], None)
        assert every.take() == ([], PACING.patience)

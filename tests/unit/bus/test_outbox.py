"""What waits to be sent: merged, bounded, in order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from context_server.bus.outbox import MAX_CONTEXTS, MAX_MESSAGES, MAX_RUNS, Outbox
from context_server.bus.packets import Gap, Ping
from context_server.bus.wakeups import CancelRequested, Moved, RunDeleted, RunQueued

TAG = "00c0ffee"
PING = Ping("c001d00d")


def moved(context="c", version=None, message=None, sequence=None):
    return Moved(context, TAG, version, message, sequence)


def after(*wake_ups):
    outbox = Outbox()
    assert sum(outbox.put(each) for each in wake_ups) == 0
    return outbox.take()


@pytest.mark.scenario("wake-ups", "Much that moves is merged")
@pytest.mark.parametrize(
    ("said", "sent"),
    [
        ([RunQueued(), RunQueued()], [RunQueued()]),
        ([CancelRequested("r"), RunDeleted("r"), CancelRequested("r")], [CancelRequested("r"), RunDeleted("r")]),
        ([moved(version=2), moved(version=1)], [moved(version=2)]),
        ([moved(version=2), moved("d", 1), moved(version=3)], [moved(version=3), moved("d", 1)]),
        ([moved(None, 1), moved("c", None, "m", 4)], [moved(None, 1), moved("c", None, "m", 4)]),
        ([moved("c", 5), moved("c", None, "m", 4), moved("c", 4, "m", 6)], [moved("c", 5, "m", 6)]),
        ([moved("c", 5, "m", 4), moved("c", 7, "n", 1)], [moved("c", 7, "m", 4), moved("c", None, "n", 1)]),
        ([moved("c", 1, "m", None), moved("c", 1, "m", 3)], [moved("c", 1, "m", 3)]),
        ([moved("c", 5, "m", 4), moved("c")], [moved("c")]),
        ([moved("c"), moved("c", 5)], [moved("c")]),
        ([moved("c", 1), RunQueued()], [RunQueued(), moved("c", 1)]),
    ],
)
def test_what_says_less_than_another_is_not_sent(said, sent):
    assert after(*said) == sent


def test_what_was_taken_is_gone():
    outbox = Outbox()
    outbox.put(RunQueued())
    outbox.put(moved(version=1))
    outbox.ping(PING)
    assert outbox.take() == [PING, RunQueued(), moved(version=1)]
    assert outbox.take() == []
    assert not outbox


def test_too_many_messages_of_one_context_become_the_context():
    assert after(*[moved("c", 9, f"m{number}", 1) for number in range(MAX_MESSAGES + 1)]) == [moved("c")]


@pytest.mark.scenario("wake-ups", "Too much that moves becomes a gap")
@pytest.mark.parametrize(
    ("limit", "make"),
    [(MAX_CONTEXTS, lambda number: moved(f"c{number}", 1)), (MAX_RUNS, lambda number: CancelRequested(f"r{number}"))],
)
def test_too_many_become_a_gap_and_the_box_stays_small(limit, make):
    outbox = Outbox()
    for number in range(limit):
        assert outbox.put(make(number)) == 0
    assert outbox.put(make(0)) == 0
    assert outbox.put(make(limit)) == limit + 1
    assert outbox.take() == [Gap()]


def test_what_could_not_be_sent_is_lost_or_comes_later():
    outbox = Outbox()
    assert outbox.lose() == 0
    assert outbox.take() == []
    outbox.put(RunQueued())
    outbox.put(moved(version=1))
    outbox.ping(PING)
    taken = outbox.take()
    outbox.put(moved(version=2))
    outbox.put_back(taken)
    assert outbox.take() == [RunQueued(), moved(version=2)]
    outbox.put_back(taken)
    assert outbox.lose() == 2
    outbox.put_back(gap := outbox.take())
    assert outbox.take() == gap == [Gap()]


@given(
    st.lists(
        st.builds(
            moved,
            st.sampled_from("ab"),
            st.none() | st.integers(1, 9),
            st.none() | st.sampled_from("mn"),
            st.none() | st.integers(1, 9),
        )
    )
)
def test_what_is_sent_never_says_less_than_what_was_said(said):
    sent = after(*said)
    for each in said:
        of_context = [other for other in sent if other.context_id == each.context_id]
        if any((other.version, other.message_id) == (None, None) for other in of_context):
            continue
        assert each.version is None or max(other.version or 0 for other in of_context) >= each.version
        if each.message_id is not None:
            (other,) = [other for other in of_context if other.message_id == each.message_id]
            assert (other.sequence or 0) >= (each.sequence or 0)

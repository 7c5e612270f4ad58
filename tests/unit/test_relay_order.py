"""Nothing is told twice, back to front or not at all, however commits, reads and snapshots overtake each other."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from context_server.mailbox import Mailbox
from context_server.order import Order
from context_server.pulling import PulledHere
from tests.unit.relaying import run_world


@pytest.mark.scenario("many-nodes", "Endings are neither lost nor repeated")
@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 10_000), max_size=150))
def test_whatever_overtakes_what_clients_are_told_right(choices):
    run_world(choices)


def run_worlds(count: int) -> None:
    """Worlds in which more happens than Hypothesis likes to try."""
    for number in range(count):
        dice = random.Random(number)
        run_world([dice.randrange(10_000) for _ in range(dice.randrange(200))])


@pytest.mark.scenario("many-nodes", "Endings are neither lost nor repeated")
def test_in_long_worlds_too():
    run_worlds(300)


@pytest.mark.parametrize(
    ("room", "protection", "without"),
    [
        (Mailbox, "_is_news", lambda *_: True),
        (Order, "admits", lambda *_args, **_options: True),
        (PulledHere, "trusts", lambda *_args, **_options: True),
    ],
)
def test_without_a_protection_a_client_is_told_wrong(monkeypatch, room, protection, without):
    """The controls: what each protection prevents does happen when it is off."""
    monkeypatch.setattr(room, protection, without)
    with pytest.raises(AssertionError):
        run_worlds(2000)

"""What the pace is worth to a simple client, reckoned on a clock of the test's own.

The client is the one of ``tests/blackbox/seed_frontend.js``: it pulls at each ``content_delta`` from where its last
answer ended, appends what comes, and stops at ``message_completed``. Here the network takes exactly as long as the test
says, so that no pause of the machine comes between.
"""

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial

import pytest

from context_server.mailbox import Mailbox, Pacing, Pulls
from context_server.metrics import Metrics
from context_server.records import ContentDelta, MessageCompleted, MessageStatus, Signal
from context_server.settings import Settings

AT = datetime(2026, 1, 1, tzinfo=UTC)
SETTINGS = Settings()
DEFAULTS = Pacing(
    settle=SETTINGS.signal_settle_ms / 1000,
    interval=SETTINGS.signal_interval_ms / 1000,
    completion=SETTINGS.completion_delay_ms / 1000,
    patience=SETTINGS.signal_patience_ms / 1000,
)
SEEDS = range(10)


@dataclass(slots=True)
class Network:
    """Draws how long each way takes, in seconds."""

    signal: Callable[[], float]
    request: Callable[[], float]
    answer: Callable[[], float]


class Trial:
    """One reply, and one simple client that reads it."""

    def __init__(self, pacing: Pacing, network: Network, moments: list[float]) -> None:
        """Runs it until nothing more happens; ``moments`` are those of the chunks, in seconds."""
        self.held: list[int] = []  # The sequences that the client has appended.
        self.asked = 0  # How often it has pulled.
        self._at = 0
        self._has_ended = False
        self._head = 0
        self._network = network
        self._heard_at = 0.0
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._pulls = Pulls(lambda: self._now)
        self._mailbox = Mailbox(pacing, self._pulls, Metrics(), lambda: self._now)
        for sequence, moment in enumerate(sorted(moments), 1):
            self._at_moment(moment, partial(self._grow, sequence))
        self._at_moment(max(moments), lambda: self._put(completed(len(moments))))
        while self._events:
            self._now, _, happens = heapq.heappop(self._events)
            happens()
        assert self._has_ended

    @property
    def is_exact(self) -> bool:
        return self.held == list(range(1, self._head + 1))

    def _at_moment(self, moment: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self._events, (moment, next(self._order), happens))

    # The server

    def _grow(self, sequence: int) -> None:
        self._head = sequence
        self._put(delta(sequence))

    def _put(self, signal: Signal) -> None:
        self._mailbox.put(signal)
        self._send()

    def _send(self) -> None:
        signals, left = self._mailbox.take()
        for signal in signals:
            # One after the other: a stream keeps its order.
            self._heard_at = max(self._heard_at, self._now + self._network.signal())
            self._at_moment(self._heard_at, partial(self._hear, signal))
        if left is not None:
            self._at_moment(self._now + left, self._send)

    def _answer(self, after: int) -> None:
        self._at_moment(self._now + self._network.answer(), partial(self._append, range(after + 1, self._head + 1)))
        self._pulls.note("m", self._head)
        self._send()

    # The client

    def _hear(self, signal: Signal) -> None:
        match signal:
            case ContentDelta() if not self._has_ended:
                self.asked += 1
                self._at_moment(self._now + self._network.request(), partial(self._answer, self._at))
            case MessageCompleted():
                self._has_ended = True

    def _append(self, page: range) -> None:
        if not self._has_ended:  # Who has stopped takes no more.
            self.held += page
            self._at = max(page, default=self._at)


def delta(sequence: int) -> ContentDelta:
    return ContentDelta(context_id="c", message_id="m", current_sequence=sequence, timestamp=AT)


def completed(sequence: int) -> MessageCompleted:
    return MessageCompleted(
        context_id="c",
        message_id="m",
        final_sequence=sequence,
        status=MessageStatus.COMPLETED,
        version=2,
        timestamp=AT,
    )


def reply(dice: random.Random, rate: float, seconds: float = 3.0) -> list[float]:
    """Moments of chunks, at ``rate`` a second on average, and some of them at once."""
    return [dice.uniform(0.1, 0.1 + seconds) for _ in range(int(rate * seconds))]


def trial(seed: int, pacing: Pacing, *, rate: float, there: float, back: float) -> Trial:
    """Signals and requests take up to ``there`` seconds each, answers up to ``back``."""
    dice = random.Random(seed)
    network = Network(*(partial(dice.uniform, 0, most) for most in (there, there, back)))
    return Trial(pacing, network, reply(dice, rate))


@pytest.mark.scenario("signals", "Paced signals")
@pytest.mark.parametrize("rate", [5, 50, 500])
def test_on_a_near_network_a_simple_client_is_exact_with_the_defaults(rate: float) -> None:
    for seed in SEEDS:
        found = trial(seed, DEFAULTS, rate=rate, there=0.002, back=0.009)
        assert found.is_exact, (seed, found.held)
        assert found.asked > 5


@pytest.mark.parametrize("rate", [50, 500])
def test_without_the_pace_it_is_not(rate: float) -> None:
    """The control: the same network, and signals that wait for nothing."""
    assert not any(trial(seed, Pacing(), rate=rate, there=0.002, back=0.009).is_exact for seed in SEEDS)


@pytest.mark.parametrize("rate", [50, 500])
def test_nor_where_answers_are_longer_on_their_way_than_signals_settle(rate: float) -> None:
    assert not any(trial(seed, DEFAULTS, rate=rate, there=0.002, back=0.09).is_exact for seed in SEEDS)
    wider = replace(DEFAULTS, settle=0.1, interval=0.1, completion=0.1)
    assert all(trial(seed, wider, rate=rate, there=0.002, back=0.09).is_exact for seed in SEEDS)


@pytest.mark.scenario("signals", "Paced signals")
def test_requests_may_be_late_by_the_interval_and_no_more() -> None:
    """A pull may be answered beyond its signal, up to the next one, which a simple client then pulls for nothing."""
    there = 0.45 * DEFAULTS.patience  # For a signal, and for a request.
    wider = replace(DEFAULTS, interval=DEFAULTS.patience)
    assert all(trial(seed, wider, rate=50, there=there, back=0.009).is_exact for seed in SEEDS)
    assert not all(trial(seed, DEFAULTS, rate=50, there=there, back=0.009).is_exact for seed in SEEDS)

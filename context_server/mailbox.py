"""What one subscriber has not been sent yet: latest wins.

A mailbox has one slot for the state of each context, one for each open message and one for each ended one, and is not a
queue. A newer signal replaces an unsent one, so a slow client costs constant memory and gets fewer, later signals, and
never a wrong one. Order between slots is the order of what happened: the last ``content_delta`` of a message before its
``message_completed``, and that before the state that followed.

**Pacing.** A careful client keeps one pull in flight and needs none. A simple one pulls at each signal, appends what
comes, and stops at ``message_completed``: it doubles words when a signal overtakes a pull, and loses the last ones when
the ending does. So the next signal of a message waits until a pull has been answered since the last one, and ``settle``
longer, for that answer to arrive. When none comes within ``patience``, nobody pulls this context here (a listener, or a
client whose pulls go to another process): from then on the signals of all its messages keep ``interval`` apart and wait
for nobody, until many signals in a row have been pulled here after all. (Not until one has: where a proxy spreads the
pulls of a context over nodes, some come here, and each would have the next signal wait for all of patience.)

**Nothing twice, nothing back.** Signals come from what is committed here, from what is read of other nodes' work, and
from the snapshot on connect, and may overtake each other. A mailbox knows of each context the version that it has told,
and drops what is older: a second ending of an old message would make a simple client finish its present one.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from context_server.metrics import Metrics
from context_server.records import (
    MAX_INTEGER,
    ContentDelta,
    ContextChanged,
    ContextDeleted,
    MessageCompleted,
    Signal,
    StateChanged,
)

_ANY_TIME = float("-inf")
_NEVER = (_ANY_TIME, -1)
# What one mailbox remembers, also where it follows all contexts of an owner; one forgotten costs one more patience.
_MOST_UNPULLED = 1000
# Pulls of messages that have not been signalled yet, the last ones; one forgotten costs one patience too.
_MOST_EARLY = 1000
_PULLED_AGAIN = 20
"""Signals in a row that were pulled here: then all pulls come here, and signals wait for them again."""
# Also what one mailbox remembers; of a context that is forgotten, something old could be told once more.
_MOST_TOLD = 2000
_GONE = MAX_INTEGER + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Pacing:
    """Times between signals of one message in one mailbox, in seconds; with no patience there is no pacing."""

    settle: float = 0.0
    interval: float = 0.0
    completion: float = 0.0
    patience: float = 0.0


class Pulls:
    """When the messages that are being signalled were last pulled, and which mailboxes wait for it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._followers: dict[str, int] = {}
        self._answered: dict[str, tuple[float, int]] = {}
        self._early: dict[str, tuple[float, int]] = {}
        self._waiting: dict[str, set[Mailbox]] = {}

    def follow(self, message_id: str) -> None:
        """A mailbox has begun to signal the message."""
        self._followers[message_id] = self._followers.get(message_id, 0) + 1
        if message_id in self._early:
            self._answered[message_id] = self._early.pop(message_id)

    def unfollow(self, message_id: str, mailbox: "Mailbox") -> None:
        """A mailbox is done with the message; the last one takes its traces along."""
        self._waiting.get(message_id, set()).discard(mailbox)
        self._followers[message_id] -= 1
        if not self._followers[message_id]:
            del self._followers[message_id]
            self._answered.pop(message_id, None)
            self._waiting.pop(message_id, None)

    def note(self, message_id: str, sequence: int) -> None:
        """A pull was answered up to ``sequence``."""
        if message_id not in self._followers:
            # A pull may wait for the same read that brings the first signal, and be answered before that is sent.
            self._early.pop(message_id, None)
            self._early[message_id] = (self._clock(), sequence)
            if len(self._early) > _MOST_EARLY:
                del self._early[next(iter(self._early))]
            return
        self._answered[message_id] = (self._clock(), sequence)
        for mailbox in self._waiting.pop(message_id, ()):
            mailbox.wake()

    def last(self, message_id: str) -> tuple[float, int]:
        """When a pull of the message was last answered, and up to which sequence."""
        return self._answered.get(message_id, _NEVER)

    def wait(self, message_id: str, mailbox: "Mailbox") -> None:
        """Has the mailbox woken at the next pull of the message."""
        self._waiting.setdefault(message_id, set()).add(mailbox)


@dataclass(slots=True)
class _Sent:
    """The last ``content_delta`` of a message that was sent."""

    context_id: str
    moment: float
    sequence: int


@dataclass(slots=True)
class _Told:
    """What has been told of a context: the version of its state, and the message that ended last."""

    version: int = 0
    ended: str | None = None


class Mailbox:
    """What one subscriber has not been sent yet."""

    def __init__(
        self,
        pacing: Pacing,
        pulls: Pulls,
        metrics: Metrics,
        clock: Callable[[], float],
        types: frozenset[type] | None = None,
    ) -> None:
        self._types = types
        self._slots: dict[tuple[str, str], Signal] = {}
        self._sent: dict[str, _Sent] = {}
        # Messages whose end is not wanted here, and whose last delta is still unsent.
        self._ending: set[str] = set()
        self._told: dict[str, _Told] = {}
        # Contexts for which patience has run out, the oldest first, and how many signals in a row were pulled since.
        self._unpulled: dict[str, int] = {}
        self._pulls = pulls
        self._ready = asyncio.Event()
        self._pacing = pacing
        self._metrics = metrics
        self._clock = clock
        self.closed = False

    def put(self, signal: Signal, as_of: int | None = None) -> None:
        """Takes in a signal, unless something newer has been told; it replaces an unsent older one of its slot.

        ``as_of`` is the context's version at which a ``content_delta`` was read, where that is known.
        """
        if self._is_news(signal, as_of):
            self._insert(signal)

    def begin(self, context_id: str, version: int, newest: str | None, signals: Iterable[Signal]) -> None:
        """Takes in how a context stands at a version, when ``newest`` was its newest reply that holds anything.

        What was put before, since the subscriber came, follows where it is newer.
        """
        since = {key: signal for key, signal in self._slots.items() if signal.context_id == context_id}
        if since:
            self._slots = {key: signal for key, signal in self._slots.items() if key not in since}
        before = self._told.pop(context_id, None) or _Told()
        for signal in signals:
            self._note_told(signal)
            self._insert(signal)
        for signal in since.values():
            if isinstance(signal, ContentDelta):
                completed = since.get(("completed", signal.message_id))
                has_ended = isinstance(completed, MessageCompleted) and completed.version <= version
                if has_ended or (before.version <= version and signal.message_id != newest):
                    continue  # Of a reply that ended before: its ending will not be told either.
            self.put(signal)
        if context_id in self._told:
            self._told[context_id].version = max(self._told[context_id].version, before.version)

    def _is_news(self, signal: Signal, as_of: int | None) -> bool:
        """Whether nothing newer has been told; after that, this has."""
        told = self._told.get(signal.context_id) or _Told()
        match signal:
            case StateChanged() | ContextChanged():
                is_news = signal.version > told.version
            case MessageCompleted():
                is_news = signal.version > told.version and signal.message_id != told.ended
            case ContentDelta():
                is_news = signal.message_id != told.ended and self._reaches_further(signal)
                is_news = is_news and told.version <= (MAX_INTEGER if as_of is None else as_of)
            case ContextDeleted():
                is_news = told.version < _GONE
        if is_news:
            self._note_told(signal)
        return is_news

    def _reaches_further(self, signal: ContentDelta) -> bool:
        """Whether the log has grown since the last signal, or nobody has pulled that much here yet.

        The same is said once more because what is told on connect may be ahead of what a pull gets here then.
        """
        sent = self._sent.get(signal.message_id)
        if sent is None or signal.current_sequence > sent.sequence:
            return True
        return signal.current_sequence == sent.sequence > self._pulls.last(signal.message_id)[1]

    def _note_told(self, signal: Signal) -> None:
        if isinstance(signal, ContentDelta | ContextChanged):
            return
        told = self._told.pop(signal.context_id, None) or _Told()  # To the end, so that the oldest is forgotten.
        self._told[signal.context_id] = told
        match signal:
            case StateChanged():
                told.version = max(told.version, signal.version)
            case MessageCompleted():
                told.ended = signal.message_id
            case ContextDeleted():
                told.version = _GONE
        if len(self._told) > _MOST_TOLD:
            del self._told[next(iter(self._told))]

    def _insert(self, signal: Signal) -> None:
        if self._types is not None and type(signal) not in self._types and not isinstance(signal, ContextDeleted):
            if isinstance(signal, MessageCompleted):
                if ("delta", signal.message_id) in self._slots:
                    self._ending.add(signal.message_id)
                else:
                    self._note_done(signal.message_id)
            return  # What nobody wants is not paced either.
        match signal:
            case StateChanged():
                self._put_state(signal)
            case ContentDelta():
                self._put_delta(signal)
            case MessageCompleted():
                self._slots.setdefault(("completed", signal.message_id), signal)
            case ContextChanged():
                self._slots.pop(("context", signal.context_id), None)
                self._slots[("context", signal.context_id)] = signal
            case ContextDeleted():
                self._forget(signal.context_id)
                self._slots[("deleted", signal.context_id)] = signal
        self._ready.set()

    def _put_state(self, signal: StateChanged) -> None:
        key = ("state", signal.context_id)
        unsent = self._slots.get(key)
        if isinstance(unsent, StateChanged):
            self._metrics.signals_merged.inc()
            if unsent.version >= signal.version:
                return
            # The client still believes in the state before the unsent one, if in any.
            signal = replace(signal, previous_state=unsent.previous_state or signal.previous_state)
            # It moves behind whatever happened in between, so that no ending is overtaken by what followed it.
            del self._slots[key]
        self._slots[key] = signal

    def _put_delta(self, signal: ContentDelta) -> None:
        key = ("delta", signal.message_id)
        if ("completed", signal.message_id) in self._slots:
            return
        unsent = self._slots.get(key)
        if isinstance(unsent, ContentDelta):
            self._metrics.signals_merged.inc()
            if unsent.current_sequence >= signal.current_sequence:
                return
        self._slots[key] = signal

    def _forget(self, context_id: str) -> None:
        """Drops what is unsent of a context, and what is remembered of its messages."""
        self._ending -= {key[1] for key, signal in self._slots.items() if signal.context_id == context_id}
        self._slots = {key: signal for key, signal in self._slots.items() if signal.context_id != context_id}
        for message_id in [key for key, sent in self._sent.items() if sent.context_id == context_id]:
            del self._sent[message_id]
            self._pulls.unfollow(message_id, self)
        self._unpulled.pop(context_id, None)

    def wake(self) -> None:
        """Has ``wait`` return, though there may be nothing to take."""
        self._ready.set()

    def close(self) -> None:
        """Says that nothing more will come; what is unsent can still be taken."""
        self.closed = True
        self._ready.set()

    def take(self) -> tuple[list[Signal], float | None]:
        """The signals that may be sent now, in order, and in how many seconds the next one may, if one is held."""
        if not self._slots:
            self._ready.clear()
            return [], None
        moment = self._clock()
        taken: list[Signal] = []
        held: dict[tuple[str, str], Signal] = {}
        waiting: set[str] = set()
        wake_at = float("inf")
        for key, signal in self._slots.items():
            # What happened later in a context never overtakes what is held of it.
            due = float("inf") if signal.context_id in waiting else self._due(signal, moment)
            if due > moment:
                held[key] = signal
                waiting.add(signal.context_id)
                wake_at = min(wake_at, due)
            else:
                taken.append(signal)
                self._note_sent(signal, moment)
        self._slots = held
        self._ready.clear()
        return taken, wake_at - moment if held else None

    def _due(self, signal: Signal, moment: float) -> float:
        """The earliest moment at which the signal may be sent, as far as is known now."""
        if not isinstance(signal, ContentDelta | MessageCompleted):
            return _ANY_TIME
        sent = self._sent.get(signal.message_id)
        if sent is None or not self._pacing.patience:
            return _ANY_TIME
        ending = isinstance(signal, MessageCompleted)
        settle = self._pacing.completion if ending else self._pacing.settle
        interval = self._pacing.completion if ending else self._pacing.interval
        answered_at, answered_up_to = self._pulls.last(signal.message_id)
        if sent.context_id in self._unpulled:
            return sent.moment + interval
        if answered_up_to >= sent.sequence:
            # An answer that was quicker than its signal: a careful client need not pull again, a simple one will.
            return answered_at + settle if answered_at >= sent.moment else sent.moment + interval
        if moment < sent.moment + self._pacing.patience:
            self._pulls.wait(signal.message_id, self)
            return sent.moment + self._pacing.patience
        self._note_unpulled(sent.context_id)
        return sent.moment + interval

    def _note_unpulled(self, context_id: str) -> None:
        if len(self._unpulled) == _MOST_UNPULLED:
            del self._unpulled[next(iter(self._unpulled))]
        self._unpulled[context_id] = 0

    def _count_pulled(self, message_id: str, sent: _Sent) -> None:
        """Counts whether the last signal of a message was pulled here, where pulls were missed before."""
        if sent.context_id not in self._unpulled:
            return
        _, answered_up_to = self._pulls.last(message_id)
        in_a_row = self._unpulled[sent.context_id] + 1 if answered_up_to >= sent.sequence else 0
        self._unpulled[sent.context_id] = in_a_row
        if in_a_row == _PULLED_AGAIN:
            del self._unpulled[sent.context_id]

    def _note_sent(self, signal: Signal, moment: float) -> None:
        match signal:
            case ContentDelta():
                sent = self._sent.get(signal.message_id)
                if sent is None:
                    self._pulls.follow(signal.message_id)
                    self._sent[signal.message_id] = _Sent(signal.context_id, moment, signal.current_sequence)
                else:
                    self._count_pulled(signal.message_id, sent)
                    sent.moment, sent.sequence = moment, signal.current_sequence
                if signal.message_id in self._ending:
                    self._note_done(signal.message_id)
            case MessageCompleted():
                self._note_done(signal.message_id)

    def _note_done(self, message_id: str) -> None:
        self._ending.discard(message_id)
        if self._sent.pop(message_id, None) is not None:
            self._pulls.unfollow(message_id, self)

    def leave(self) -> None:
        """The subscriber is gone."""
        for message_id in self._sent:
            self._pulls.unfollow(message_id, self)
        self._sent.clear()

    async def wait(self, delay: float | None) -> None:
        """Returns when there may be something to take, or after ``delay`` seconds."""
        if delay is None:
            await self._ready.wait()
            return
        try:
            async with asyncio.timeout(delay):
                # Signals of other contexts need not wait for the one that is held.
                await self._ready.wait()
        except TimeoutError:
            pass

"""Hands signals to the mailboxes of this process's subscribers, and tells readers that a message has grown.

Where other nodes write too, the relay is attached: it learns what is followed here, brings what others have written,
and says whether what was committed here may be told now.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from context_server.mailbox import Mailbox, Pacing, Pulls
from context_server.metrics import Metrics
from context_server.records import (
    ContentDelta,
    ContextDeleted,
    MessageCompleted,
    Signal,
    Snapshot,
    StateChanged,
    Transition,
    now,
)


class Watch:
    """Tells one reader that a message may have grown; clear, read, wait."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self.closed = False

    def close(self) -> None:
        """Says that the reader should come to an end."""
        self.closed = True
        self._changed.set()

    def clear(self) -> None:
        """To be called before the read, so that what happens during it is not missed."""
        self._changed.clear()

    def notify(self) -> None:
        """The message may have grown, ended, or gone."""
        self._changed.set()

    async def wait(self, seconds: float) -> bool:
        """True when the message may have grown since ``clear``; False after ``seconds``."""
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True


class Attached(Protocol):
    """What the hub asks of the relay."""

    def follow(self, context_id: str) -> None:
        """Somebody begins to follow a context."""

    def unfollow(self, context_id: str) -> None:
        """Nobody follows it any more."""

    def follow_owner(self, owner: str) -> None:
        """Somebody begins to follow all contexts of an owner."""

    def unfollow_owner(self, owner: str) -> None:
        """Nobody does any more."""

    def announce(self, owner: str, context_id: str, version: int | None, head: tuple[str, int] | None) -> None:
        """Wakes other nodes for what was committed here: a version of a context, how far a message is."""

    def admits(self, owner: str, signal: Signal) -> bool:
        """Whether what was committed here may be told now; else it is told by the next read."""
        ...

    def admits_transition(self, owner: str, transition: Transition, *, is_whole: bool) -> bool:
        """As ``admits``; ``is_whole``: of the message that ended, if one did, everything was published here."""
        ...

    def released(self, context_id: str) -> None:
        """A message of the context is not written here any more."""


class Hub:
    """Hands signals to the subscribers of this process."""

    def __init__(self, pacing: Pacing, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._pacing = pacing
        self._pulls = Pulls(clock)
        self._metrics = metrics
        self._clock = clock
        self._of_context: defaultdict[str, set[Mailbox]] = defaultdict(set)
        self._of_owner: defaultdict[str, set[Mailbox]] = defaultdict(set)
        self._watches: defaultdict[str, set[Watch]] = defaultdict(set)
        self._heads: dict[str, dict[str, int]] = {}
        self._owners: dict[str, str] = {}
        self._written: set[str] = set()
        self._relay: Attached | None = None
        self.closed = False

    def attach(self, relay: Attached) -> None:
        """Has a relay bring what other nodes write; to be called before anybody subscribes."""
        self._relay = relay

    # Subscribers

    @contextmanager
    def subscribe(
        self, owner: str, context_ids: Iterable[str] | None, types: frozenset[type] | None = None
    ) -> Iterator[Mailbox]:
        """A mailbox for signals of some ``types`` (None: all) of some contexts, or of all of an owner's (None).

        It is filled until it is left.
        """
        mailbox = Mailbox(self._pacing, self._pulls, self._metrics, self._clock, types)
        keys = [(self._of_owner, owner)] if context_ids is None else [(self._of_context, key) for key in context_ids]
        for index, key in keys:
            if key not in index:
                self._begin(index, key)
            index[key].add(mailbox)
        if self.closed:
            mailbox.close()
        try:
            yield mailbox
        finally:
            mailbox.leave()
            for index, key in keys:
                index[key].discard(mailbox)
                if not index[key]:
                    del index[key]
                    self._end(index, key)

    def _begin(self, index: dict[str, set[Mailbox]], key: str) -> None:
        if self._relay is not None:
            (self._relay.follow_owner if index is self._of_owner else self._relay.follow)(key)

    def _end(self, index: dict[str, set[Mailbox]], key: str) -> None:
        """Nobody follows a context, or an owner, any more; so heads of what others write are not kept up."""
        if self._relay is None:
            return
        (self._relay.unfollow_owner if index is self._of_owner else self._relay.unfollow)(key)
        for context_id in list(self._heads) if index is self._of_owner else [key]:
            owner = self._owners.get(context_id)
            if owner is not None and not self.is_followed(owner, context_id):
                self.set_head(owner, context_id, None)

    def is_followed(self, owner: str, context_id: str) -> bool:
        """Whether somebody here is told of a context."""
        return context_id in self._of_context or owner in self._of_owner

    def is_watched(self, message_id: str) -> bool:
        """Whether a reader waits for the message to grow."""
        return message_id in self._watches

    @contextmanager
    def watch(self, message_id: str) -> Iterator[Watch]:
        """A watch on one message, until it is left."""
        watch = Watch()
        watches = self._watches[message_id]
        watches.add(watch)
        try:
            yield watch
        finally:
            watches.discard(watch)
            if not watches and self._watches.get(message_id) is watches:
                del self._watches[message_id]

    def heads(self, owner: str, context_ids: Iterable[str] | None) -> list[tuple[str, str, int]]:
        """``(context_id, message_id, sequence)`` of the messages open in some contexts, or all of an owner's."""
        if context_ids is None:
            context_ids = [context_id for context_id in self._heads if self._owners.get(context_id) == owner]
        return [
            (context_id, message_id, sequence)
            for context_id in context_ids
            for message_id, sequence in self._heads.get(context_id, {}).items()
        ]

    def pulled(self, message_id: str, sequence: int) -> None:
        """A pull of the message was answered up to ``sequence``: its next signal need not wait for that."""
        self._pulls.note(message_id, sequence)

    # Publishers

    def open_message(self, owner: str, context_id: str, message_id: str, sequence: int = 0) -> None:
        """A reply is written here and has not ended: from now on heartbeats carry its head."""
        self._heads.setdefault(context_id, {})[message_id] = sequence
        self._owners[context_id] = owner
        self._written.add(message_id)

    def release_message(self, context_id: str, message_id: str) -> None:
        """A reply is not written here any more, though it may not have ended."""
        if message_id in self._written:
            self._close_messages(context_id, [message_id])
            if self._relay is not None:
                self._relay.released(context_id)

    def written(self, context_id: str) -> dict[str, int]:
        """The replies of a context that are written here and have not ended, and how far each is."""
        return {key: head for key, head in self._heads.get(context_id, {}).items() if key in self._written}

    def publish(self, owner: str, signal: Signal) -> None:
        """Puts a signal about something that was committed here into every mailbox that wants it."""
        self._note(signal)
        if self._relay is not None:
            self._relay.announce(owner, signal.context_id, _version_of(signal), _head_of(signal))
        if not self.is_followed(owner, signal.context_id):
            return
        if self._relay is None or self._relay.admits(owner, signal):
            self._put(owner, signal)

    def publish_transition(self, owner: str, transition: Transition) -> None:
        """Says that a context was moved here: that a message has ended, if one has, and then what state followed."""
        self._publish_one(owner, transition)
        if transition.promoted is not None:
            self._publish_one(owner, transition.promoted)

    def _publish_one(self, owner: str, transition: Transition) -> None:
        ended = transition.ended
        is_whole = ended is None or self.written(transition.context_id).get(ended.id) == ended.final_sequence
        signals = signals_of(transition)
        for signal in signals:
            self._note(signal)
        if self._relay is not None:
            self._relay.announce(owner, transition.context_id, transition.version, _head_of(signals[0]))
        if not self.is_followed(owner, transition.context_id):
            return
        if self._relay is None or self._relay.admits_transition(owner, transition, is_whole=is_whole):
            for signal in signals:
                self._put(owner, signal)

    def relay(self, owner: str, signal: Signal, as_of: int | None) -> int:
        """Puts a signal of what another node has committed into the mailboxes that want it; into how many.

        ``as_of`` is the version of the context as of which it is said, where a later one makes it stale.
        """
        self._note(signal)
        return self._put(owner, signal, as_of)

    def set_head(self, owner: str, context_id: str, head: tuple[str, int] | None) -> None:
        """Which message of a context another node writes, and how far it is; None: none."""
        heads = self.written(context_id)
        if head is not None:
            heads[head[0]] = head[1]
        if heads:
            self._heads[context_id] = heads
            self._owners[context_id] = owner
        else:
            self._heads.pop(context_id, None)
            self._owners.pop(context_id, None)

    def notify(self, message_id: str) -> None:
        """Tells who watches a message that it may have grown."""
        for watch in self._watches.get(message_id, ()):
            watch.notify()

    def _put(self, owner: str, signal: Signal, as_of: int | None = None) -> int:
        mailboxes = (*self._of_context.get(signal.context_id, ()), *self._of_owner.get(owner, ()))
        for mailbox in mailboxes:
            mailbox.put(signal, as_of)
        return len(mailboxes)

    def _note(self, signal: Signal) -> None:
        """Keeps the heads, and tells who watches a message."""
        match signal:
            case ContentDelta():
                heads = self._heads.get(signal.context_id)
                if heads is not None and signal.message_id in heads:
                    heads[signal.message_id] = signal.current_sequence
                self.notify(signal.message_id)
            case MessageCompleted():
                self._close_messages(signal.context_id, [signal.message_id])
            case ContextDeleted():
                self._close_messages(signal.context_id, list(self._heads.get(signal.context_id, ())))

    def _close_messages(self, context_id: str, message_ids: list[str]) -> None:
        heads = self._heads.get(context_id, {})
        for message_id in message_ids:
            heads.pop(message_id, None)
            self._written.discard(message_id)
            self.notify(message_id)
        if not heads:
            self._heads.pop(context_id, None)
            self._owners.pop(context_id, None)

    def close(self) -> None:
        """Ends every stream and every waiting pull; later subscribers are told at once."""
        self.closed = True
        for mailboxes in (*self._of_context.values(), *self._of_owner.values()):
            for mailbox in mailboxes:
                mailbox.close()
        for watches in self._watches.values():
            for watch in watches:
                watch.notify()


def signals_of(transition: Transition) -> list[Signal]:
    """The signals of a transition: which messages have ended, if any, and then the state that followed."""
    at = now()
    signals: list[Signal] = [
        MessageCompleted(
            context_id=transition.context_id,
            message_id=ended.id,
            final_sequence=ended.final_sequence,
            status=ended.status,
            version=transition.version,
            timestamp=at,
        )
        for ended in (transition.ended, *transition.also_ended)
        if ended is not None
    ]
    signals.append(
        StateChanged(
            context_id=transition.context_id,
            new_state=transition.state,
            previous_state=transition.previous_state,
            version=transition.version,
            run_id=transition.run_id,
            timestamp=at,
            tool=transition.tool,
        )
    )
    return signals


def _version_of(signal: Signal) -> int | None:
    return None if isinstance(signal, ContentDelta) else signal.version


def _head_of(signal: Signal) -> tuple[str, int] | None:
    match signal:
        case ContentDelta():
            return signal.message_id, signal.current_sequence
        case MessageCompleted():
            return signal.message_id, signal.final_sequence
    return None


def put_snapshot(mailbox: Mailbox, snapshot: Snapshot) -> None:
    """Tells a new subscriber how things stand; what was published since it subscribed is newer and stays.

    Endings that a returning client has missed come first, so that no event of a later version is sent before them.
    """
    newest = snapshot.newest
    signals: list[Signal] = [
        completed for completed in snapshot.ended if newest is None or completed.message_id != newest.message_id
    ]
    signals.append(
        StateChanged(
            context_id=snapshot.context_id,
            new_state=snapshot.state,
            previous_state=None,
            version=snapshot.version,
            run_id=snapshot.run_id,
            timestamp=snapshot.at,
            tool=snapshot.tool,
        )
    )
    if newest is not None and snapshot.newest_sequence:
        signals.append(
            ContentDelta(
                context_id=snapshot.context_id,
                message_id=newest.message_id,
                current_sequence=snapshot.newest_sequence,
                timestamp=snapshot.at,
            )
        )
    if isinstance(newest, MessageCompleted):
        signals.append(newest)
    mailbox.begin(snapshot.context_id, snapshot.version, None if newest is None else newest.message_id, signals)

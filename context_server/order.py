"""What has been told here of each context that is followed here: nothing is told twice, back to front, or not at all.

News of a context come by two ways: what is committed here is told at once, what other nodes commit is read now and
then. The two overtake each other. So each context has a version up to which everything was told:

* A commit of this node is told at once only where it follows on that version. Otherwise something of another node is
  missing in between, which might be the ending of a reply: then the commit is held back, and told by the next read.
* A read is told as far as it is newer than that version, and endings come before what followed them.

Of a followed context the version is known before a subscriber's snapshot is read (``Since()``): whatever is newer than
the snapshot will be told. Of all of an owner's contexts it is not; one that is seen for the first time is told as it
stands, with what has ended since the owner was followed.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from context_server.records import (
    MAX_INTEGER,
    ContentDelta,
    ContextChanged,
    ContextDeleted,
    Signal,
    State,
    StateChanged,
    Transition,
    now,
)
from context_server.store.following import Movement, Since

_GONE = MAX_INTEGER
_NO_HEAD = ("", 0)
_MOST_OTHERS = 2000
"""Contexts that are remembered because all of their owner's are followed; the ones that moved last."""
_SKEW_MS = 10_000
"""By how much the clocks of nodes may differ: what ended this long before an owner was followed may be told too."""


@dataclass(slots=True)
class _Told:
    """What has been told of a context: everything up to ``version`` (None: nothing, it has not been read yet)."""

    owner: str | None = None
    version: int | None = None
    missed: int = 0  # The greatest version that was committed here and held back.
    ended_after_ms: int | None = None
    state: State | None = None
    run_id: str | None = None
    details: bytes | None = None
    head: tuple[str, int] = _NO_HEAD
    ended: tuple[str, int] = _NO_HEAD
    read_ms: int = 0


@dataclass(frozen=True, slots=True)
class Telling:
    """What is to be told of a read, each with the version as of which it is said.

    ``again``: there is more to be read. ``is_current``: nothing newer is known; then ``head`` is the open message that
    another node writes, and how far it is.
    """

    signals: list[tuple[Signal, int | None]] = field(default_factory=list)
    again: bool = False
    is_current: bool = False
    head: tuple[str, int] | None = None


class Order:
    """What has been told here of each context that somebody here follows.

    ``written(context_id)`` gives the messages that this node itself writes, and how far each is.
    ``on_missed`` is called with a context that has to be read, since something that was committed here is held back.
    """

    def __init__(
        self,
        written: Callable[[str], Mapping[str, int]],
        on_missed: Callable[[str], None],
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._written = written
        self._on_missed = on_missed
        self._clock_ms = clock_ms
        self._followed: dict[str, _Told] = {}
        self._others: dict[str, _Told] = {}
        self._owners: dict[str, int] = {}

    # Interest

    def follow(self, context_id: str) -> None:
        """Somebody here begins to follow a context."""
        if context_id in self._others:
            self._followed[context_id] = self._others.pop(context_id)
        else:
            # Somebody may follow it by its owner already, and is to be told what ends until it is read.
            self._followed[context_id] = _Told(ended_after_ms=min(self._owners.values(), default=None))

    def unfollow(self, context_id: str) -> None:
        """Nobody here follows the context any more, unless by its owner."""
        told = self._followed.pop(context_id)
        if told.owner in self._owners:
            self._others[context_id] = told

    def follow_owner(self, owner: str) -> None:
        """Somebody here begins to follow all contexts of an owner."""
        self._owners[owner] = self._clock_ms() - _SKEW_MS

    def unfollow_owner(self, owner: str) -> None:
        """Nobody here does so any more."""
        del self._owners[owner]
        self._others = {key: told for key, told in self._others.items() if told.owner != owner}

    def notice(self, owner: str, context_id: str, *, as_it_stands: bool) -> None:
        """There is a context of an owner whose contexts are all followed.

        ``as_it_stands``: it is known to be no news, since it was there when the owner began to be followed.
        """
        told = self._find(context_id)
        if told is not None:
            told.owner = owner
        elif owner in self._owners:
            after = None if as_it_stands else self._owners[owner]
            self._remember(context_id, _Told(owner=owner, ended_after_ms=after))

    def contexts(self) -> list[str]:
        """Every context of which something has been told, or will be, and that is not gone."""
        return [key for table in (self._followed, self._others) for key in table if self.since(key) is not None]

    def owners(self) -> list[str]:
        """Whose contexts are all followed."""
        return list(self._owners)

    def is_known(self, context_id: str) -> bool:
        """Whether everything that comes will be told, or nothing because nobody follows it."""
        told = self._find(context_id)
        return told is None or told.version is not None

    def since(self, context_id: str) -> Since | None:
        """From where on the context has to be read; None when it need not be."""
        told = self._find(context_id)
        if told is None or told.version == _GONE:
            return None
        return Since(told.version, told.ended_after_ms if told.version is None else None)

    def signalled(self, context_id: str, message_id: str) -> int:
        """How far a message has been told: the open one, or the one that ended last."""
        told = self._find(context_id)
        if told is None:
            return 0
        return max((sequence for key, sequence in (told.head, told.ended) if key == message_id), default=0)

    def _find(self, context_id: str) -> _Told | None:
        return self._followed.get(context_id) or self._others.get(context_id)

    def _remember(self, context_id: str, told: _Told) -> None:
        """Keeps what was told of a context that is followed by its owner, for one that moved longest ago."""
        told.read_ms = self._clock_ms()
        self._others.pop(context_id, None)
        self._others[context_id] = told
        if len(self._others) > _MOST_OTHERS:
            oldest = self._others.pop(next(iter(self._others)))
            if oldest.owner in self._owners:
                # Should it move again, what ended before has been told.
                self._owners[oldest.owner] = max(self._owners[oldest.owner], oldest.read_ms)

    # What is committed here

    def admits(
        self, owner: str, context_id: str, version: int, previous_version: int | None, *, may_be_told: bool = True
    ) -> bool:
        """Whether a commit of this node that moved a context may be told now; else a read will tell it."""
        told = self._find(context_id)
        if told is None:
            if owner not in self._owners:
                return True
            # Nothing can have been missed of a context that has just moved for the first time.
            version_before = 1 if previous_version == 1 else None
            told = _Told(owner=owner, version=version_before, ended_after_ms=self._owners[owner])
            self._remember(context_id, told)
        if told.version is not None and version <= told.version:
            return False  # It has been read and told already.
        follows_on = previous_version is not None and told.version is not None and previous_version <= told.version
        if follows_on and may_be_told and not told.missed:
            self._note(context_id, told, version)
            return True
        told.missed = max(told.missed, version)
        self._on_missed(context_id)
        return False

    def note_transition(self, transition: Transition) -> None:
        """A transition that was admitted has been told."""
        told = self._find(transition.context_id)
        if told is not None:
            told.state, told.run_id, told.head = transition.state, transition.run_id, _NO_HEAD
            if transition.ended is not None:
                told.ended = (transition.ended.id, transition.ended.final_sequence)

    def note_change(self, context_id: str) -> None:
        """A change of title, mode or metadata that was admitted has been told; what they are now is not known."""
        told = self._find(context_id)
        if told is not None:
            told.details = None

    def note_deletion(self, owner: str, context_id: str) -> bool:
        """A context has been deleted here; whether that is still to be told."""
        told = self._find(context_id) or _Told(owner=owner)
        if told.version == _GONE:
            return False
        self._note(context_id, told, _GONE)
        return True

    def admits_delta(self, delta: ContentDelta) -> bool:
        """Whether how far a reply of this node is may be told now, or waits too until the context has been read."""
        told = self._find(delta.context_id)
        if told is None:
            return True
        if told.version is None or told.missed:
            return False
        told.head = (delta.message_id, delta.current_sequence)
        return True

    def _note(self, context_id: str, told: _Told, version: int) -> None:
        told.version = version
        if version >= told.missed:
            told.missed = 0
        if context_id not in self._followed and told.owner in self._owners:
            self._remember(context_id, told)

    # What is read

    def tell(self, movement: Movement) -> Telling:
        """What is to be told of a read, in order."""
        told = self._find(movement.context_id)
        if told is None or (told.owner is not None and told.owner != movement.owner):
            return Telling()
        if told.version is not None and movement.version < told.version:
            return Telling(again=told.missed > 0)  # Overtaken by a commit of this node.
        if any(message_id != movement.open_id for message_id in self._written(movement.context_id)):
            return Telling(again=True)  # The ledger is about to publish what became of that message, or of the run.
        # Whoever follows a context of which nothing has been told reads a snapshot next.
        is_awaited = told.version is None and told.ended_after_ms is None
        was_held_back = told.missed > 0
        signals = [] if is_awaited else _news(told, movement)
        told.owner, told.state, told.run_id = movement.owner, movement.state, movement.run_id
        told.details = movement.details or told.details
        if movement.ended:
            told.ended = (movement.ended[-1].message_id, movement.ended[-1].final_sequence)
        self._note(movement.context_id, told, movement.version)
        head = self._head(told, movement, was_held_back=was_held_back)
        if head is not None and not is_awaited:
            signals.append(head)
        is_foreign = movement.open_id is not None and movement.open_id not in self._written(movement.context_id)
        return Telling(signals, told.missed > 0, is_current=True, head=told.head if is_foreign else None)

    def _head(self, told: _Told, movement: Movement, *, was_held_back: bool) -> tuple[Signal, int | None] | None:
        """How far the open reply is, unless that has been told."""
        context_id, reply, before = movement.context_id, movement.open, told.head
        if reply is None:
            told.head = _NO_HEAD
            return None
        written = self._written(context_id).get(reply.id)
        if written is not None and not was_held_back:
            return None  # The ledger tells it.
        sequence = reply.sequence if written is None else written
        told.head = (reply.id, max(sequence, before[1] if before[0] == reply.id else 0))
        if not told.head[1] or told.head == before:
            return None
        return _delta(context_id, *told.head), movement.version if written is None else None

    def tell_gone(self, context_id: str) -> tuple[str, Signal, None] | None:
        """What is to be told of a context that a read did not find any more, and to whose followers."""
        told = self._find(context_id)
        if told is None or told.version == _GONE:
            return None
        is_news = told.version is not None or told.ended_after_ms is not None
        version = max(told.version or 0, told.missed) + 1
        self._note(context_id, told, _GONE)
        deleted = ContextDeleted(context_id=context_id, version=version, timestamp=now())
        return (told.owner or "", deleted, None) if is_news else None


def _news(told: _Told, movement: Movement) -> list[tuple[Signal, int | None]]:
    """Endings that have not been told, then what the context has become."""
    is_first = told.version is None
    before = told.version or 0
    signals: list[tuple[Signal, int | None]] = []
    for ended in movement.ended:
        if ended.version > before:
            if ended.final_sequence:
                # Of the last moment before the ending, so that it is dropped where that was told.
                delta = _delta(movement.context_id, ended.message_id, ended.final_sequence)
                signals.append((delta, ended.version - 1))
            signals.append((ended, None))
    if movement.version <= before:
        return signals
    is_same = not signals and (movement.state, movement.run_id) == (told.state, told.run_id)
    # Where it is not known it is said once too often rather than not at all.
    changed = movement.details is not None and movement.details != told.details
    at = now()
    # The same state at another version: the queue, the approvals or the head may have changed.
    if changed or is_first or is_same:
        signals.append((_context_changed(movement, at), None))
    if is_first or not (changed and is_same):
        signals.append((_state_changed(movement, told.state, at), None))
    return signals


def _delta(context_id: str, message_id: str, sequence: int) -> ContentDelta:
    return ContentDelta(context_id=context_id, message_id=message_id, current_sequence=sequence, timestamp=now())


def _context_changed(movement: Movement, at: datetime) -> ContextChanged:
    return ContextChanged(context_id=movement.context_id, version=movement.version, timestamp=at)


def _state_changed(movement: Movement, previous: State | None, at: datetime) -> StateChanged:
    return StateChanged(
        context_id=movement.context_id,
        new_state=movement.state,
        previous_state=previous,
        version=movement.version,
        run_id=movement.run_id,
        timestamp=at,
        tool=movement.tool,
    )

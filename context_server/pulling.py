"""Messages that other nodes write and that are pulled here: their tails in ``recent`` are kept up to date by reads."""

from collections.abc import Callable, Iterable, Mapping

from context_server.bus import Bus
from context_server.hub import Hub
from context_server.recent import RecentChunks, Tail
from context_server.store.following import Growth, Held, Movement


class PulledHere:
    """The messages of other nodes that are pulled here; times in seconds.

    A message counts as pulled for ``lately`` after a pull. What memory holds of it is good for ``fresh`` after a look.
    An open followed tail is always one of these, or it would fall behind unnoticed.
    """

    def __init__(
        self,
        recent: RecentChunks,
        hub: Hub,
        bus: Bus,
        signalled: Callable[[str, str], int],
        clock: Callable[[], float],
        *,
        lately: float,
        fresh: float,
    ) -> None:
        self._recent = recent
        self._hub = hub
        self._bus = bus
        self._signalled = signalled
        self._clock = clock
        self._lately = lately
        self._fresh = fresh
        self._pulled: dict[str, dict[str, float]] = {}

    def __contains__(self, context_id: object) -> bool:
        return context_id in self._pulled

    def contexts(self) -> list[str]:
        """The contexts of these messages."""
        return list(self._pulled)

    def note(self, tail: Tail) -> None:
        """A message has just been pulled."""
        if tail.context_id not in self._pulled:
            self._pulled[tail.context_id] = {}
            self._bus.follow(tail.context_id)
        self._pulled[tail.context_id][tail.message_id] = self._clock()

    def trusts(self, tail: Tail, from_sequence: int, *, is_watched: bool) -> bool:
        """Whether memory may answer a pull without a look at the database.

        Of an open message of another node only where it has something new, for the client may have been told of more
        by another node; but whoever watches the message will be told here.
        """
        if tail.is_written_here:
            return True
        if self._clock() - tail.checked > self._fresh:
            return False
        if tail.final_sequence is not None:
            return True
        has_news = is_watched or from_sequence < tail.sequence
        return has_news and tail.sequence >= self._signalled(tail.context_id, tail.message_id)

    def let_lapse(self) -> None:
        """Forgets messages that nobody has pulled here for a while."""
        before = self._clock() - self._lately
        for context_id, messages in list(self._pulled.items()):
            for message_id, moment in list(messages.items()):
                if moment < before and not self._hub.is_watched(message_id):
                    self._drop(context_id, message_id)

    def _drop(self, context_id: str, message_id: str) -> None:
        self._forget(context_id, message_id)
        tail = self._recent.find(message_id)
        if tail is not None and tail.followed and tail.final_sequence is None:
            self._recent.forget(message_id)

    def _forget(self, context_id: str, message_id: str) -> None:
        messages = self._pulled.get(context_id, {})
        if messages.pop(message_id, None) is not None and not messages:
            del self._pulled[context_id]
            self._bus.unfollow(context_id)

    # Reads

    def wanted(self, context_ids: Iterable[str]) -> dict[str, Held]:
        """How far memory holds the messages of some contexts."""
        wanted = {}
        for context_id in context_ids:
            for message_id in list(self._pulled.get(context_id, ())):
                tail = self._recent.find(message_id)
                if tail is None or tail.is_written_here:
                    self._forget(context_id, message_id)
                else:
                    wanted[message_id] = Held(tail.sequence, tail.content_bytes)
        return wanted

    def take_in(self, wanted: Iterable[str], found: Mapping[str, Growth], checked: float) -> set[str]:
        """Puts what was read at a moment into memory; the contexts of messages of which there is more to read."""
        unfinished = set()
        for message_id in wanted:
            growth = found.get(message_id)
            if growth is None:
                self._recent.forget(message_id)  # It has been deleted.
                self._hub.notify(message_id)
                continue
            self._recent.grow(message_id, growth, checked)
            if growth.chunks or growth.final_sequence is not None:
                self._hub.notify(message_id)
            tail = self._recent.find(message_id)
            if tail is None or tail.final_sequence is not None:
                self._forget(growth.context_id, message_id)
            elif tail.sequence < growth.head:
                unfinished.add(growth.context_id)
        return unfinished

    def forget_lost(self, movement: Movement) -> None:
        """Forgets what memory took for written here and others have ended: it may lack the last words."""
        for ended in movement.ended:
            tail = self._recent.find(ended.message_id)
            is_lost = ended.message_id not in self._hub.written(ended.context_id)
            if tail is not None and tail.is_written_here and is_lost:
                self._recent.forget(ended.message_id)

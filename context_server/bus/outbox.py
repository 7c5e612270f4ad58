"""What a node has to send: merged, so that it does not grow with the number of wake-ups, and bounded."""

from collections.abc import Iterable

from context_server.bus.packets import Gap, Item, Ping
from context_server.bus.wakeups import CancelRequested, Moved, RunDeleted, RunQueued, WakeUp

MAX_CONTEXTS = 4096
"""Contexts whose ``Moved`` wait, about 2 MB: keeps a server that does not take them from filling the memory."""
MAX_RUNS = 4096
MAX_MESSAGES = 4
"""Messages of one context that wait one by one; a context has one open message, so more are rare."""


class _Context:
    """What has moved in one context."""

    __slots__ = ("owner_tag", "sequences", "vague", "version")

    def __init__(self, owner_tag: str) -> None:
        self.owner_tag = owner_tag
        self.version: int | None = None
        self.sequences: dict[str, int | None] = {}
        self.vague = False
        """Whether to say only that anything may have changed."""

    def add(self, moved: Moved) -> None:
        self.version = _larger(self.version, moved.version)
        if moved.message_id is not None:
            self.sequences[moved.message_id] = _larger(self.sequences.get(moved.message_id), moved.sequence)
        elif moved.version is None:
            self.vague = True
        if len(self.sequences) > MAX_MESSAGES:
            self.vague = True
            self.sequences.clear()

    def wake_ups(self, context_id: str) -> list[Moved]:
        """As few as say it: the version goes with the first message."""
        if self.vague or not self.sequences:
            return [Moved(context_id, self.owner_tag, None if self.vague else self.version, None, None)]
        version = self.version
        found = []
        for message_id, sequence in self.sequences.items():
            found.append(Moved(context_id, self.owner_tag, version, message_id, sequence))
            version = None
        return found


class Outbox:
    """Wake-ups to be sent, the newest of each kind, context and message.

    When there are too many they all become one ``Gap``, after which everybody reads everything.
    """

    def __init__(self) -> None:
        self._contexts: dict[str, _Context] = {}
        self._runs: dict[RunQueued | CancelRequested | RunDeleted, None] = {}
        self._gap = False
        self._ping: Ping | None = None

    def __len__(self) -> int:
        """How many contexts and runs wait; a gap or a ping counts as one."""
        return len(self._contexts) + len(self._runs) + self._gap + (self._ping is not None)

    def put(self, wake_up: WakeUp) -> int:
        """Adds or merges a wake-up. How many others became a gap for it, for lack of room; mostly 0."""
        if isinstance(wake_up, Moved):
            context = self._contexts.get(wake_up.context_id)
            if context is None:
                if len(self._contexts) >= MAX_CONTEXTS:
                    return self.lose() + 1
                context = self._contexts[wake_up.context_id] = _Context(wake_up.owner_tag)
            context.add(wake_up)
            return 0
        if len(self._runs) >= MAX_RUNS and wake_up not in self._runs:
            return self.lose() + 1
        self._runs[wake_up] = None
        return 0

    def ping(self, ping: Ping) -> None:
        """Adds a ping, in place of one that waits."""
        self._ping = ping

    def lose(self) -> int:
        """Makes everything that waits one gap, if anything does; how many contexts and runs that were."""
        if lost := len(self._contexts) + len(self._runs):
            self._contexts, self._runs, self._gap = {}, {}, True
        return lost

    def put_back(self, items: Iterable[Item]) -> None:
        """Adds what was taken and not sent."""
        for item in items:
            if isinstance(item, Gap):
                self._gap = True
            elif not isinstance(item, Ping):
                self.put(item)

    def take(self) -> list[Item]:
        """Everything, in the order in which it has to be heard: what concerns runs goes before what moved."""
        contexts, runs = self._contexts, self._runs
        items: list[Item] = [] if self._ping is None else [self._ping]
        if self._gap:
            items.append(Gap())
        self._contexts, self._runs, self._gap, self._ping = {}, {}, False, None
        items += runs
        for context_id, context in contexts.items():
            items += context.wake_ups(context_id)
        return items


def _larger(left: int | None, right: int | None) -> int | None:
    if left is None or right is None:
        return right if left is None else left
    return max(left, right)

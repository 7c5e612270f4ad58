"""What differs between servers that carry packets: how one connects, speaks and hears."""

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from context_server.bus.packets import Item


@dataclass(frozen=True, slots=True, kw_only=True)
class Ears:
    """Whom a connection calls, in the event loop: with each packet that arrives, and after a part was not heard."""

    hear: Callable[[str], None]
    miss: Callable[[], None]


class Connection(Protocol):
    """One connection: it breaks once and is never mended; the line makes another."""

    def works(self) -> Sequence[Coroutine[Any, Any, None]]:
        """What has to run as long as it is used. The connection is broken when one of them returns or raises."""
        ...

    def channel_of(self, item: Item) -> str:
        """Where an item has to be said."""
        ...

    async def send(self, packets: Sequence[tuple[str, str]]) -> None:
        """Sends ``(channel, packet)`` in this order; returns when the server has them.

        Raises:
            Exception: whatever the driver raises; the connection is broken.
        """
        ...

    async def close(self) -> None:
        """Closes it within a second, also when the server hangs; may be called again."""
        ...


class Line(Protocol):
    """A server, and what this node wants to hear from it."""

    kind: str

    async def connect(self, node: str, ears: Ears) -> Connection:
        """A connection that hears from when this returns, within ``connect_seconds``.

        Raises:
            Exception: whatever the driver raises.
        """
        ...

    def follow(self, context_id: str) -> None:
        """See ``Bus.follow``; it outlives connections, as do the others."""
        ...

    def unfollow(self, context_id: str) -> None:
        """See ``Bus.unfollow``."""
        ...

    def follow_all(self) -> None:
        """See ``Bus.follow_all``."""
        ...

    def unfollow_all(self) -> None:
        """See ``Bus.unfollow_all``."""
        ...

"""What a bus is to the rooms that use it."""

from collections.abc import Callable
from enum import StrEnum
from types import TracebackType
from typing import Protocol, Self

from context_server.bus.wakeups import WakeUp

Listener = Callable[[WakeUp, bool], None]
"""Called in the event loop with a wake-up, and whether another node sent it."""


class BusState(StrEnum):
    """Whether the wake-ups of other nodes are heard."""

    CONNECTED = "connected"
    POLLING = "polling"
    """They are not heard now: whoever wants to know has to look."""


class Bus(Protocol):
    """Carries wake-ups to every listener of this node, and to other nodes or not at all. Use it with ``async with``.

    Its methods are called in the event loop. Nothing may break when every wake-up of another node is lost.
    """

    @property
    def kind(self) -> str:
        """``in-process``, ``postgresql`` or ``redis``."""
        ...

    @property
    def state(self) -> BusState:
        """Whether other nodes are heard now. It may take ten seconds until a cut is noticed."""
        ...

    async def __aenter__(self) -> Self:
        """Begins to connect, and waits for that a little; goes on without other nodes when it takes longer."""
        ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Sends what waits, if that goes at once, and closes, also when the server hangs."""
        ...

    def publish(self, wake_up: WakeUp) -> None:
        """Calls the listeners of this node at once; other nodes hear of it later, merged with others, or never.

        It never waits and never raises.
        """
        ...

    def subscribe(self, listener: Listener) -> None:
        """Has ``listener`` called for each wake-up, for the life of the bus."""
        ...

    def on_gap(self, listener: Callable[[], None]) -> None:
        """Has ``listener`` called whenever wake-ups of others may have been missed: everything has to be read again.

        That is after each connect and reconnect, when another node could not send for a while, and when interest in
        some contexts has begun.
        """
        ...

    def follow(self, context_id: str) -> None:
        """Begins interest in ``Moved`` of a context; it counts, and ends with as many ``unfollow``.

        Without interest a ``Moved`` may be heard or not.
        """
        ...

    def unfollow(self, context_id: str) -> None:
        """Ends one ``follow``."""
        ...

    def follow_all(self) -> None:
        """Begins interest in ``Moved`` of every context; it counts too."""
        ...

    def unfollow_all(self) -> None:
        """Ends one ``follow_all``."""
        ...

"""The bus of a single process."""

from collections.abc import Callable
from types import TracebackType
from typing import Self

from context_server.bus.contract import BusState, Listener
from context_server.bus.listeners import Listeners
from context_server.bus.wakeups import WakeUp


class InProcessBus:
    """Calls its listeners at once. There are no other nodes, so there is never a gap."""

    kind = "in-process"
    state = BusState.CONNECTED

    def __init__(self) -> None:
        self._listeners = Listeners()

    async def __aenter__(self) -> Self:
        """There is nothing to open."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """There is nothing to close."""

    def publish(self, wake_up: WakeUp) -> None:
        """Calls each listener."""
        self._listeners.tell(wake_up, remote=False)

    def subscribe(self, listener: Listener) -> None:
        """Adds a listener for the life of the bus."""
        self._listeners.subscribe(listener)

    def on_gap(self, listener: Callable[[], None]) -> None:
        """Adds a listener that is never called."""
        self._listeners.on_gap(listener)

    def follow(self, context_id: str) -> None:
        """Everything is heard."""

    def unfollow(self, context_id: str) -> None:
        """Everything is heard."""

    def follow_all(self) -> None:
        """Everything is heard."""

    def unfollow_all(self) -> None:
        """Everything is heard."""

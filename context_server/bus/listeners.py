"""Who listens on this node."""

from collections.abc import Callable

import structlog

from context_server.bus.contract import Listener
from context_server.bus.wakeups import WakeUp
from context_server.errors import without_words

log = structlog.get_logger("context_server.bus")


class Listeners:
    """The listeners of one bus. One that raises keeps neither the others nor the publisher from going on."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []
        self._gap_listeners: list[Callable[[], None]] = []

    def subscribe(self, listener: Listener) -> None:
        """Adds a listener of wake-ups."""
        self._listeners.append(listener)

    def on_gap(self, listener: Callable[[], None]) -> None:
        """Adds a listener of gaps."""
        self._gap_listeners.append(listener)

    def tell(self, wake_up: WakeUp, remote: bool) -> None:
        """Calls each listener of wake-ups."""
        for listener in self._listeners:
            try:
                listener(wake_up, remote)
            except Exception as error:
                _log_defect(error)

    def tell_gap(self) -> None:
        """Calls each listener of gaps."""
        for listener in self._gap_listeners:
            try:
                listener()
            except Exception as error:
                _log_defect(error)


def _log_defect(error: Exception) -> None:
    log.error("bus_listener_failed", **without_words(error))

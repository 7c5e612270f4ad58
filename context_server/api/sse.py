"""How a stream of server-sent events is held open, and let go of."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from typing import cast

import anyio
import structlog
from sse_starlette import EventSourceResponse
from sse_starlette.sse import SendTimeoutError
from starlette.types import Message, Receive, Scope, Send

from context_server.api import signals
from context_server.api.problems import TooManyStreams
from context_server.api.requests import Rooms
from context_server.errors import ShuttingDown

log = structlog.get_logger("context_server.api")

_FAREWELL_SECONDS = 5.0
_RETRY_MS = (500, 5000)
"""Clients come back after a time between these: not all at once."""

HEADERS = {
    # Exactly this: some clients compare the media type with the whole header.
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-store, no-transform",
}


class _OnShutdown:
    """Stands where sse-starlette expects an event: it is set when a server that is not ours begins to stop."""

    def __init__(self, close: Callable[[], None]) -> None:
        self._close = close

    def set(self) -> None:
        self._close()


class EventStream(EventSourceResponse):
    """An SSE answer that lets go of what it holds when it ends, however it ends and even if it never began."""

    def __init__(
        self,
        rooms: Rooms,
        events: AsyncIterator[bytes],
        holds: ExitStack,
        *,
        on_shutdown: Callable[[], None],
    ) -> None:
        super().__init__(
            events,
            headers=HEADERS,
            ping=0,  # Heartbeats are among the events: a task of their own would cost each stream some KiB.
            send_timeout=rooms.limits.send_timeout,
            shutdown_event=cast("anyio.Event", _OnShutdown(on_shutdown)),
            shutdown_grace_period=_FAREWELL_SECONDS,
        )
        self._holds = holds

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        """As the library's, without its cancel scope where no send is timed: that cost a tenth of a busy server."""
        if self.send_timeout is None:
            await send(message)
        else:
            await super()._send_with_timeout(send, message)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Streams until the client leaves, stalls, or the events end."""
        try:
            with self._holds:
                await super().__call__(scope, receive, send)
        except SendTimeoutError:
            log.info("stalled_stream_cut")  # Under a server that is not ours: ours cuts the connection before.


def admit(rooms: Rooms, holds: ExitStack) -> None:
    """Counts one more open stream until ``holds`` is left.

    Raises:
        ShuttingDown, TooManyStreams.
    """
    if rooms.hub.closed or rooms.commands.draining:
        raise ShuttingDown
    gauge = rooms.metrics.open_streams
    if rooms.open_streams.count >= rooms.limits.max_streams:
        raise TooManyStreams(f"The server has {rooms.limits.max_streams} streams open, as many as it takes.")
    rooms.open_streams.count += 1
    gauge.inc()
    holds.callback(_let_go, rooms)


def _let_go(rooms: Rooms) -> None:
    rooms.open_streams.count -= 1
    rooms.metrics.open_streams.dec()


def goodbye_in_ms() -> int:
    """A random time after which a client may come back, in milliseconds."""
    return random.randint(*_RETRY_MS)  # noqa: S311  # Spreads reconnects; it guards nothing.


def goodbye(*, named: bool = False) -> bytes:
    """The last event of a stream that ends because the server does, with a random time to come back after."""
    retry_ms = goodbye_in_ms()
    return signals.encode_event(signals.goodbye_fields(retry_ms), named=named, retry_ms=retry_ms)


class Heart:
    """Beats for one stream: a timer and a flag, from the stream's first to its last moment."""

    __slots__ = ("_due", "_seconds", "_timer", "_wake")

    def __init__(self, seconds: float, wake: Callable[[], None], holds: ExitStack) -> None:
        self._seconds = seconds
        self._wake = wake
        self._due = False
        self._start()
        holds.callback(self._stop)

    def _start(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._beat)

    def _stop(self) -> None:
        self._timer.cancel()

    def _beat(self) -> None:
        self._due = True
        self._wake()
        self._start()

    def take(self) -> bool:
        """Whether a heartbeat is due; it is not, then, until the next one."""
        due, self._due = self._due, False
        return due

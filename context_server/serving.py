"""uvicorn, set for this server: bounded headers, stalled peers let go, and a shutdown in the right order."""

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Generator
from typing import Any, cast

import structlog
import uvicorn
from sse_starlette.sse import AppStatus
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from context_server.api.problems import MEDIA_TYPE, problem_body
from context_server.errors import AddressNotAvailable
from context_server.settings import Settings

log = structlog.get_logger("context_server.serving")

MAX_HEADER_BYTES = 32_768
"""Request line and headers of one request: httptools itself has no cap, and took a header of 30 MB."""
HEADER_SECONDS = 5.0
"""Time for the headers of a request to arrive: a peer that drips them would hold a connection for ever."""
SEND_BUFFER_BYTES = 131_072
"""Kernel buffer of a connection, so that a peer that stops reading is noticed while little is on its way."""
USER_TIMEOUT_MS = 20_000
"""How long sent bytes may stay unacknowledged before the kernel gives the connection up."""
FAREWELL_SECONDS = 3.0
"""Time for streams to take their goodbye; whoever has not by then does not read."""


class Cork:
    """A transport that writes once for everything that one turn of the event loop has to say.

    uvicorn writes the head of an answer and its body one after the other, and each would be a system call: half of what
    a pull costs.
    """

    __slots__ = ("_loop", "_parts", "_transport")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        """Everything but writing and closing is the transport's own."""
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Writes when the loop comes round."""
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)

    def close(self) -> None:
        """Writes what is left, and closes."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        parts, self._parts = self._parts, []
        if parts and not self._transport.is_closing():
            self._transport.write(parts[0] if len(parts) == 1 else b"".join(parts))


class Protocol(HttpToolsProtocol):
    """One connection, with what httptools leaves unbounded bounded."""

    stall_seconds = 10.0
    """How long the peer may leave an answer unread; then the connection is cut, and its memory and descriptor freed."""

    _stall_timer: asyncio.TimerHandle | None = None
    _header_bytes = 0
    _in_body = False
    _idle_bytes = 0
    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Sets the socket so that a dead or stalled peer is let go."""
        super().connection_made(cast("asyncio.Transport", Cork(transport, self.loop)))
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
                if hasattr(socket, "TCP_USER_TIMEOUT"):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the connection."""
        self._stop_timer()
        self._stop_stall_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The peer does not read: from now on it has a while to begin."""
        super().pause_writing()
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(self.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The peer reads again."""
        self._stop_stall_timer()
        super().resume_writing()

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def data_received(self, data: bytes) -> None:
        """Counts and times what arrives before the headers are complete."""
        if not self._in_body:
            end = data.find(b"\r\n\r\n")
            if self._header_bytes + (len(data) if end < 0 else end) > MAX_HEADER_BYTES:
                detail = f"The request line and headers may have {MAX_HEADER_BYTES} bytes."
                self._refuse(431, "Request header fields too large", "headers-too-large", detail)
                return
            self._header_bytes += len(data)
        else:
            # Chunk sizes and trailers are no body: they are bounded as headers are. A piece of body clears the count.
            self._idle_bytes += len(data)
        super().data_received(data)
        if self._in_body and self._idle_bytes > MAX_HEADER_BYTES:
            self._refuse(431, "Request header fields too large", "headers-too-large", "The trailers are too large.")
        elif self._header_bytes and self._header_timer is None:
            self._expect_headers()

    def on_headers_complete(self) -> None:
        """The headers of a request are complete."""
        self._in_body = True
        self._idle_bytes = 0
        self._header_bytes = 0
        self._stop_timer()
        super().on_headers_complete()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; trailers, which come after the body, are dropped."""
        if self._in_body:
            self._idle_bytes += len(name) + len(value)
        else:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._idle_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The body is complete too, whether it was read or refused; what comes now is another request."""
        self._in_body = False
        super().on_message_complete()

    def _expect_headers(self) -> None:
        self._header_timer = self.loop.call_later(HEADER_SECONDS, self._headers_late)

    def _headers_late(self) -> None:
        self._header_timer = None
        if self._header_bytes:
            self._refuse(408, "Request timeout", "request-timeout", "The headers of the request came too slowly.")
        elif not self.is_answering:
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    @property
    def is_answering(self) -> bool:
        """Whether an answer has been begun and is not complete."""
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is not None and not cycle.response_complete

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP with a problem document."""
        self._refuse(400, "Bad request", "bad-request", msg)

    def _refuse(self, status: int, title: str, code: str, detail: str) -> None:
        body = problem_body(status, title, code, detail)
        head = (
            f"HTTP/1.1 {status} {title}\r\ncontent-type: {MEDIA_TYPE}\r\ncontent-length: {len(body)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode("ascii") + body)
        self.transport.close()


class Server(uvicorn.Server):
    """Stops in this order: replies finish, streams say goodbye, the stalled are cut, connections close."""

    def __init__(self, config: uvicorn.Config, app: Starlette, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._app = app
        self._on_started = on_started
        self.failed = False

    def fail(self) -> None:
        """Has the process end at once: nothing may be acknowledged any more."""
        self.failed = True
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handles SIGINT and SIGTERM as uvicorn does, but ends normally: the rooms have still to be closed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen, then says so."""
        await super().startup(sockets)
        self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drains while the server still answers, then closes what is open."""
        if not self.failed:
            drain = asyncio.ensure_future(self._app.state.drain())
            while not drain.done() and not self.force_exit:
                await asyncio.wait({drain}, timeout=0.1)
            drain.cancel()  # A second Ctrl-C does not wait for replies: they end as interrupted.
        await self._cut_stalled()
        await super().shutdown(sockets)

    async def _cut_stalled(self) -> None:
        """Waits for streams to take their goodbye, then aborts connections that still do not read."""
        deadline = asyncio.get_running_loop().time() + FAREWELL_SECONDS
        while self._writing() and asyncio.get_running_loop().time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # uvicorn has no event for a connection's end
        stalled = self._writing()
        for connection in stalled:
            connection.transport.abort()
        if stalled:
            log.info("stalled_connections_cut", connections=len(stalled))

    def _writing(self) -> list[Protocol]:
        """Connections with an answer that is not complete."""
        return [
            connection
            for connection in self.server_state.connections
            if isinstance(connection, Protocol) and connection.is_answering
        ]


def listen(settings: Settings) -> socket.socket:
    """A listening socket, opened before anything else so that a taken port is a clear error.

    Raises:
        AddressNotAvailable: the address is taken, not ours, or none.
    """
    return _listen(settings.host, settings.port, shared=False)


def _listen(host: str, port: int, *, shared: bool) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048, reuse_port=shared)
    except OSError as error:
        raise AddressNotAvailable(f"cannot listen on {host} port {port}: {error.strerror or error}") from None


def listen_apart(settings: Settings, sockets: int) -> list[socket.socket]:
    """Listening sockets on one port, for as many processes, among which the kernel deals connections out evenly.

    Raises:
        AddressNotAvailable: the address is taken, not ours, or none.
    """
    # Tried without sharing first: a second server of the same user would share the port with this one, in silence.
    probe = listen(settings)
    probe.close()
    opened = [listen_beside(settings, settings.port)]
    port: int = opened[0].getsockname()[1]
    opened += [listen_beside(settings, port) for _ in range(sockets - 1)]
    return opened


def listen_beside(settings: Settings, port: int) -> socket.socket:
    """One more listening socket on a port that others share.

    Raises:
        AddressNotAvailable: a process that does not share it has the port.
    """
    return _listen(settings.host, port, shared=True)


def build_server(app: Starlette, stall_seconds: float, on_started: Callable[[], None]) -> Server:
    """A server for the application, whose lifespan must be open; ``await server.serve([socket])`` runs it."""
    # Streams end when replies have: this server tells them, and not the library at the moment of the signal.
    AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]  # untyped in the library
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=type("Protocol", (Protocol,), {"stall_seconds": stall_seconds}),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=75,
    )
    return Server(config, app, on_started)

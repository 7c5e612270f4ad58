"""The load's sockets: HTTP/1.1 and SSE parsed by hand, so that the load is not what is measured.

It understands what this server sends and no more: ``Content-Length`` or ``Transfer-Encoding: chunked`` without
trailers, one request in flight on a connection, server-sent events whose ``data`` is one JSON object.
"""

import asyncio
import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, cast


class LoadError(Exception):
    """The server answered what a benchmark cannot go on with, or closed a connection that was needed."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer; ``received_ns`` is the wall clock when its last byte arrived."""

    status: int
    body: bytes
    received_ns: int

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


class ChunkedDecoder:
    """Takes chunked transfer encoding (RFC 9112, section 7.1) apart as it arrives."""

    __slots__ = ("_buffer", "ended")

    def __init__(self) -> None:
        self._buffer = b""
        self.ended = False

    def feed(self, data: bytes) -> bytes:
        """The payload of the transfer chunks that ``data`` completes."""
        buffer = self._buffer + data if self._buffer else data
        parts = []
        at = 0
        while not self.ended:
            line_end = buffer.find(b"\r\n", at)
            if line_end < 0:
                break
            size = int(buffer[at:line_end].partition(b";")[0], 16)
            stop = line_end + 2 + size + 2
            if len(buffer) < stop:
                break
            parts.append(buffer[line_end + 2 : stop - 2])
            self.ended = size == 0
            at = stop
        self._buffer = buffer[at:]
        return parts[0] if len(parts) == 1 else b"".join(parts)


@dataclass(frozen=True, slots=True)
class _Head:
    status: int
    length: int | None
    """Bytes of the body; None when it is chunked."""
    size: int
    """Bytes of the head, its empty line included."""


def _parse_head(buffer: bytes) -> _Head | None:
    """The head that ``buffer`` begins with, or None while it is incomplete."""
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        return None
    status = int(buffer[9:12])
    head = buffer[:end].lower()
    if b"\r\ntransfer-encoding: chunked" in head:
        return _Head(status, None, end + 4)
    at = head.find(b"\r\ncontent-length:")
    length = int(head[at + 17 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
    return _Head(status, length, end + 4)


async def _connected(host: str, port: int, receive_buffer_bytes: int | None) -> socket.socket:
    """A connected socket; ``receive_buffer_bytes`` makes it fill early when nobody reads."""
    connection = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        connection.setblocking(False)
        if receive_buffer_bytes is not None:  # Before the handshake, or the window is already wide.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        await asyncio.get_running_loop().sock_connect(connection, (host, port))
    except BaseException:
        connection.close()
        raise
    return connection


class Connection(asyncio.Protocol):
    """A keep-alive connection with one request in flight; ``send`` is the quick way, ``request`` the easy one."""

    def __init__(self, authority: str) -> None:
        self._host_line = f"Host: {authority}\r\n"
        self._buffer = b""
        self._head: _Head | None = None
        self._decoder: ChunkedDecoder | None = None
        self._body: list[bytes] = []
        self._on_answer: Callable[[Answer | None], None] | None = None
        self.transport: asyncio.Transport | None = None

    @classmethod
    async def open(cls, host: str, port: int, receive_buffer_bytes: int | None = None) -> Self:
        """A new connection to the server."""
        connected = await _connected(host, port, receive_buffer_bytes)
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: cls(f"{host}:{port}"), sock=connected)
        return connection

    def send(
        self, method: str, path: str, on_answer: Callable[[Answer | None], None], body: dict[str, Any] | None = None
    ) -> None:
        """Send a request; ``on_answer`` gets the answer, or None when the connection ends before it."""
        if self.transport is None or self._on_answer is not None:
            raise LoadError(f"{method} {path}: the connection is closed or busy")
        self._on_answer = on_answer
        payload = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\n{self._host_line}"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
        self.transport.write(f"{head}\r\n".encode() + payload)

    async def request(self, method: str, path: str, body: dict[str, Any] | None = None, expect: int = 200) -> Any:
        """The answer's JSON; raises ``LoadError`` for any status but ``expect``."""
        future: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()
        self.send(method, path, lambda answer: None if future.done() else future.set_result(answer), body)
        answer = await future
        if answer is None:
            raise LoadError(f"{method} {path}: the connection ended before the answer")
        if answer.status != expect:
            raise LoadError(f"{method} {path}: {answer.status} {answer.body[:300]!r}")
        return answer.json()

    def stall(self) -> None:
        """Stop reading, and keep the connection."""
        if self.transport is not None:
            self.transport.pause_reading()

    def close(self) -> None:
        """Close at once."""
        if self.transport is not None:
            self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Gather one answer and hand it on."""
        received_ns = time.time_ns()
        self._buffer = self._buffer + data if self._buffer else data
        if self._head is None:
            self._head = _parse_head(self._buffer)
            if self._head is None:
                return
            self._buffer = self._buffer[self._head.size :]
            self._decoder = ChunkedDecoder() if self._head.length is None else None
        if self._decoder is not None:
            self._body.append(self._decoder.feed(self._buffer))
            self._buffer = b""
            if self._decoder.ended:
                self._finish(b"".join(self._body), received_ns)
        elif len(self._buffer) >= cast("int", self._head.length):
            self._finish(self._buffer, received_ns)

    def _finish(self, body: bytes, received_ns: int) -> None:
        head, on_answer = self._head, self._on_answer
        self._buffer, self._head, self._on_answer, self._body = b"", None, None, []
        if head is not None and on_answer is not None:
            on_answer(Answer(head.status, body, received_ns))

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever waits that no answer will come."""
        self.transport = None
        on_answer, self._on_answer = self._on_answer, None
        if on_answer is not None:
            on_answer(None)


class SignalStream(asyncio.Protocol):
    """One subscriber: every signal goes to ``on_signal``; ``ended`` is done when the stream is over.

    ``farewell`` is the ``retry`` of the last ``goodbye`` in ms, ``clean`` whether the transfer encoding was finished.
    """

    def __init__(self, request: bytes, on_signal: Callable[[dict[str, Any]], None]) -> None:
        loop = asyncio.get_running_loop()
        self._request = request
        self._on_signal = on_signal
        self._head: _Head | None = None
        self._raw = b""
        self._text = b""
        self._decoder = ChunkedDecoder()
        self.transport: asyncio.Transport | None = None
        self.signals = 0
        self.farewell: int | None = None
        self.ended: asyncio.Future[None] = loop.create_future()
        self.first: asyncio.Future[None] = loop.create_future()

    @classmethod
    async def open(
        cls,
        host: str,
        port: int,
        path: str,
        on_signal: Callable[[dict[str, Any]], None],
        receive_buffer_bytes: int | None = None,
    ) -> Self:
        """A stream that has its first signal."""
        request = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nAccept: text/event-stream\r\n\r\n".encode()
        connected = await _connected(host, port, receive_buffer_bytes)
        loop = asyncio.get_running_loop()
        _, stream = await loop.create_connection(lambda: cls(request, on_signal), sock=connected)
        await stream.first
        return stream

    @property
    def clean(self) -> bool:
        """Whether the server ended the stream itself, to the last byte of the transfer encoding."""
        return self._decoder.ended

    @property
    def local_port(self) -> int:
        """This side's TCP port."""
        if self.transport is None:
            raise LoadError("the stream is closed")
        return int(self.transport.get_extra_info("sockname")[1])

    def stall(self) -> None:
        """Stop reading, and keep the connection."""
        if self.transport is not None:
            self.transport.pause_reading()

    def close(self) -> None:
        """Close at once."""
        if self.transport is not None:
            self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the stream."""
        self.transport = cast("asyncio.Transport", transport)
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Take transfer encoding and events apart."""
        if self._head is None:
            self._raw += data
            self._head = _parse_head(self._raw)
            if self._head is None:
                return
            if self._head.status != 200 or self._head.length is not None:
                self._fail(LoadError(f"no stream: {self._head.status} {self._raw[-300:]!r}"))
                return
            data, self._raw = self._raw[self._head.size :], b""
        text = self._text + self._decoder.feed(data)
        if b"\r" in text:
            text = text.replace(b"\r\n", b"\n")
        *blocks, self._text = text.split(b"\n\n")
        for block in blocks:
            self._event(block)

    def _event(self, block: bytes) -> None:
        signal: dict[str, Any] | None = None
        retry: int | None = None
        for line in block.split(b"\n"):
            if line.startswith(b"data:"):
                signal = json.loads(line[5:])
            elif line.startswith(b"retry:"):
                retry = int(line[6:])
        if signal is None:
            return
        self.signals += 1
        if signal["type"] == "goodbye":
            self.farewell = retry
        self._on_signal(signal)
        if not self.first.done():
            self.first.set_result(None)

    def _fail(self, error: LoadError) -> None:
        if not self.first.done():
            self.first.set_exception(error)
        self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the end."""
        self.transport = None
        if not self.first.done():
            self.first.set_exception(LoadError("the stream ended before its first signal"))
        if not self.ended.done():
            self.ended.set_result(None)

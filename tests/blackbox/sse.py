"""Server-sent events read from a raw socket, so that tests see the very bytes that the server sent."""

import json
import select
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

DEADLINE_SECONDS = 60.0


class StreamEnded(Exception):
    """The server ended the stream."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event: its bytes without the empty line, its fields, and when it was read (``time.monotonic``)."""

    raw: bytes
    id: str | None
    name: str | None
    retry: str | None
    data: dict[str, Any]
    at: float

    @property
    def type(self) -> str:
        return str(self.data["type"])


@dataclass(slots=True)
class EventStream:
    """An open stream of events. ``status`` and ``headers`` (names in lower case) are those of the answer.

    ``seen`` is every event so far, ``body`` every byte of the body. With another status than 200, ``body`` is whole.
    """

    port: int
    path: str
    headers_sent: Mapping[str, str] = field(default_factory=dict)
    receive_buffer_bytes: int | None = None
    method: str = "GET"
    content: bytes = b""
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    seen: list[Event] = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)
    _socket: socket.socket = field(init=False)
    _bytes: bytearray = field(init=False, default_factory=bytearray)
    _parsed: int = 0
    _ended: bool = False

    def __enter__(self) -> Self:
        self._socket = socket.socket()
        if self.receive_buffer_bytes is not None:
            # Before connecting: the window that the kernel offers is settled then.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.receive_buffer_bytes)
        self._socket.settimeout(DEADLINE_SECONDS)
        self._socket.connect(("127.0.0.1", self.port))
        lines = [f"{self.method} {self.path} HTTP/1.1", f"Host: 127.0.0.1:{self.port}"]
        lines += [f"{name}: {value}" for name, value in self.headers_sent.items()]
        if self.content:
            lines += ["Content-Type: application/json", f"Content-Length: {len(self.content)}"]
        self._socket.sendall("\r\n".join([*lines, "", ""]).encode() + self.content)
        self._read_head()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cuts the connection."""
        self._socket.close()

    def next(self, seconds: float = DEADLINE_SECONDS) -> Event:
        """The next event.

        Raises:
            StreamEnded: there is none, and never will be.
            TimeoutError: none came in time.
        """
        deadline = time.monotonic() + seconds
        while (end := self.body.find(b"\n\n", self._parsed)) < 0:
            self._receive(deadline)
        event = _parse(bytes(self.body[self._parsed : end]))
        self._parsed = end + 2
        self.seen.append(event)
        return event

    def until(self, kind: str, seconds: float = DEADLINE_SECONDS, **fields: Any) -> Event:
        """The next event of a type whose fields have these values; what comes before it is read too."""
        deadline = time.monotonic() + seconds
        while True:
            event = self.next(max(0.0, deadline - time.monotonic()))
            if event.type == kind and all(event.data.get(name) == value for name, value in fields.items()):
                return event

    def rest(self, seconds: float = DEADLINE_SECONDS) -> list[Event]:
        """Every further event, up to the end of the stream."""
        deadline = time.monotonic() + seconds
        return list(self._until_ended(deadline))

    def _until_ended(self, deadline: float) -> Iterator[Event]:
        while True:
            try:
                yield self.next(max(0.0, deadline - time.monotonic()))
            except StreamEnded:
                return

    def of_type(self, kind: str) -> list[Event]:
        """The events of a type among those seen."""
        return [event for event in self.seen if event.type == kind]

    def _read_head(self) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while (end := self._bytes.find(b"\r\n\r\n")) < 0:
            self._bytes += self._receive_bytes(deadline)
        first, *lines = bytes(self._bytes[:end]).decode("latin-1").split("\r\n")
        del self._bytes[: end + 4]
        self.status = int(first.split(" ")[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if "content-length" in self.headers:
            while len(self._bytes) < int(self.headers["content-length"]):
                self._bytes += self._receive_bytes(deadline)
            self.body += self._bytes
            self._ended = True
        elif self.headers.get("transfer-encoding") == "chunked":
            self._decode()
        else:
            self._ended = True

    def _receive(self, deadline: float) -> None:
        if self._ended:
            raise StreamEnded
        self._bytes += self._receive_bytes(deadline)
        self._decode()

    def _receive_bytes(self, deadline: float) -> bytes:
        if not select.select([self._socket], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError(f"nothing came from {self.path}; seen: {[event.data for event in self.seen[-5:]]}")
        data = self._socket.recv(65536)
        if not data:
            raise StreamEnded
        return data

    def _decode(self) -> None:
        """Moves what is complete of the chunked transfer coding (RFC 9112, section 7.1) into the body."""
        while (end := self._bytes.find(b"\r\n")) >= 0 and not self._ended:
            size = int(bytes(self._bytes[:end]), 16)
            if len(self._bytes) < end + 2 + size + 2:
                return
            self.body += self._bytes[end + 2 : end + 2 + size]
            del self._bytes[: end + 2 + size + 2]
            self._ended = size == 0


def _parse(raw: bytes) -> Event:
    """An event by its lines; the server writes each field once, and nothing but JSON in ASCII as data."""
    fields = dict(line.split(": ", 1) for line in raw.decode("ascii").split("\n"))
    assert set(fields) <= {"id", "event", "retry", "data"}, fields
    return Event(
        raw, fields.get("id"), fields.get("event"), fields.get("retry"), json.loads(fields["data"]), time.monotonic()
    )

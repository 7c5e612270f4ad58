"""A raw HTTP and SSE client: it does nothing by itself, so that a test sees exactly what the server did."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

HOST = "127.0.0.1"
ANSWER_SECONDS = 30.0
REACHED_SECONDS = 120.0
"""A safety net, on a machine that may be busy with other tests."""
BROKEN = (OSError, EOFError, TimeoutError)
"""What a client meets when the server is killed: a refused or reset connection, or an answer that stops half-way."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer; header names are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event: its JSON, and its other fields where it has them."""

    data: dict[str, Any]
    id: str | None
    retry: int | None

    @property
    def type(self) -> str:
        return str(self.data["type"])


def request_bytes(method: str, target: str, body: Any = None, headers: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a request; ``body`` is sent as JSON unless it is bytes."""
    fields = {"Host": "localhost"} | dict(headers or {})
    content = b""
    if body is not None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {"Content-Type": "application/json"} | fields | {"Content-Length": str(len(content))}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
    return f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + content


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers of an answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    status, *lines = head.split("\r\n")
    pairs = (line.partition(":") for line in lines if line)
    return int(status.split(" ")[1]), {name.lower(): value.strip() for name, _, value in pairs}


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """A whole answer that says how long it is, or has no body."""
    status, headers = await read_head(reader)
    return Answer(status, headers, await reader.readexactly(int(headers.get("content-length", "0"))))


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A TCP connection to the server."""
    reader, writer = await asyncio.open_connection(HOST, port, limit=2**22)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(*BROKEN):
            await writer.wait_closed()


async def call(
    port: int,
    method: str,
    target: str,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
    seconds: float = ANSWER_SECONDS,
) -> Answer:
    """One request on a connection of its own.

    Raises:
        One of ``BROKEN``: there was no whole answer within ``seconds``.
    """
    async with asyncio.timeout(seconds), connected(port) as (reader, writer):
        writer.write(request_bytes(method, target, body, {"Connection": "close"} | dict(headers or {})))
        return await read_answer(reader)


class Stream:
    """An open stream of server-sent events; iterate over it, it ends when the server ends it.

    A stream that says nothing for ``silence_seconds`` raises TimeoutError.
    """

    def __init__(
        self, reader: asyncio.StreamReader, headers: Mapping[str, str], silence_seconds: float | None = None
    ) -> None:
        self.headers = headers
        self._reader = reader
        self._silence_seconds = silence_seconds
        self._unread = b""

    def __aiter__(self) -> AsyncIterator[Event]:
        return self._events()

    async def next(self) -> Event:
        """The next event, within ``ANSWER_SECONDS``."""
        async with asyncio.timeout(ANSWER_SECONDS):
            return await anext(self._events())

    async def until(self, kind: str) -> Event:
        """The next event of a type."""
        while (event := await self.next()).type != kind:
            pass
        return event

    async def _events(self) -> AsyncIterator[Event]:
        while True:
            while b"\n\n" in self._unread:
                block, _, self._unread = self._unread.partition(b"\n\n")
                event = _parse(block.decode())
                if event is not None:
                    yield event
            async with asyncio.timeout(self._silence_seconds):
                size = int((await self._reader.readuntil(b"\r\n")).strip(), 16)
                piece = await self._reader.readexactly(size + 2)
            if not size:
                return
            self._unread += piece[:-2]


def _parse(block: str) -> Event | None:
    fields: dict[str, str] = {}
    for line in block.split("\n"):
        name, _, value = line.partition(":")
        fields[name] = fields.get(name, "") + value.removeprefix(" ")
    if "data" not in fields:
        return None
    return Event(json.loads(fields["data"]), fields.get("id"), int(fields["retry"]) if "retry" in fields else None)


@asynccontextmanager
async def stream(
    port: int, target: str, headers: Mapping[str, str] | None = None, silence_seconds: float | None = None
) -> AsyncIterator[Stream]:
    """An open stream, left by closing its connection.

    Raises:
        ConnectionRefusedError: the server answered that it cannot now, with 503.
    """
    async with asyncio.timeout(silence_seconds or ANSWER_SECONDS) as opening, connected(port) as (reader, writer):
        writer.write(request_bytes("GET", target, headers=headers))
        status, given = await read_head(reader)
        opening.reschedule(None)
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            raise ConnectionRefusedError(f"GET {target} answered {status}")
        assert status == 200, f"GET {target} answered {status}"
        yield Stream(reader, given, silence_seconds)


def message(content: str) -> dict[str, Any]:
    """The body of a post."""
    return {"payload": {"type": "text", "content": content}}


async def new_context(port: int) -> str:
    """The id of a new context."""
    return str((await call(port, "POST", "/contexts", {})).json["id"])


async def post(port: int, context_id: str, content: str) -> dict[str, Any]:
    """What the server says of a message that it accepted."""
    answer = await call(port, "POST", f"/contexts/{context_id}/messages", message(content))
    assert answer.status == 202, answer.body
    receipt: dict[str, Any] = answer.json
    return receipt


async def pull(port: int, context_id: str, message_id: str, after: int = 0, wait: int = 0) -> dict[str, Any]:
    """One pull."""
    target = f"/contexts/{context_id}/messages/{message_id}/content?from_sequence={after}"
    answer = await call(port, "GET", f"{target}&wait={wait}" if wait else target)
    assert answer.status == 200, answer.body
    content: dict[str, Any] = answer.json
    return content


async def follow(port: int, receipt: Mapping[str, Any], until: int | None = None) -> dict[str, Any]:
    """The last pull of a reply, with the whole ``content``: of the ended one, or of the first ``until`` sequences."""
    text, sequence = "", 0
    async with asyncio.timeout(ANSWER_SECONDS):
        while True:
            page = await pull(port, receipt["context_id"], receipt["reply_message_id"], sequence, wait=10)
            text, sequence = text + page["content"], page["sequence"]
            if sequence == page["final_sequence"] or (until is not None and sequence >= until):
                return page | {"content": text}


async def state_of(port: int, context_id: str) -> str:
    """The state that a context is in."""
    return str((await call(port, "GET", f"/contexts/{context_id}")).json["state"])


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = REACHED_SECONDS) -> None:
    """Returns once the condition holds; asks again and again, since what it asks about is another process."""
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110  # Nothing in this process is told when it changes.
            await asyncio.sleep(0.01)


async def reached(port: int, context_id: str, state: str, seconds: float = REACHED_SECONDS) -> None:
    """Returns once the context is in the state."""

    async def there() -> bool:
        return await state_of(port, context_id) == state

    await until(there, seconds)

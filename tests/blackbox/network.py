"""Clients of a real server, and the networks that tests put between the two."""

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Self

import httpx2

from context_server.client import ContextClient
from tests.server import Server

Forward = Callable[[httpx2.Request], Awaitable[httpx2.Response]]
Meddle = Callable[[httpx2.Request, Forward], Awaitable[httpx2.Response]]


class MeddlingTransport(httpx2.AsyncBaseTransport):
    """Hands each request to ``meddle``, which forwards it to the server, or not, and answers."""

    def __init__(self, meddle: Meddle) -> None:
        self._meddle = meddle
        self._inner = httpx2.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        return await self._meddle(request, self._inner.handle_async_request)

    async def aclose(self) -> None:
        await self._inner.aclose()


class UnsteadyNetwork:
    """A TCP proxy in which every connection is soon cut, reset or stalled, in the middle of a byte stream."""

    def __init__(self, port: int, seed: int) -> None:
        self._target = port
        self._dice = random.Random(seed)
        self._tasks: set[asyncio.Task[None]] = set()
        self.fates = {"cut": 0, "reset": 0, "stall": 0}

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, client: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        server, requests = await asyncio.open_connection("127.0.0.1", self._target)
        up = asyncio.create_task(_pump(client, requests))
        try:
            await _pump(server, answers, at_most=self._dice.randrange(500, 9000))
            fate = self._dice.choice(list(self.fates))
            self.fates[fate] += 1
            if fate == "stall":
                await up  # Nothing comes back any more; this ends when the client has had enough.
            elif fate == "reset":
                no_linger = struct.pack("ii", 1, 0)  # Closing sends RST and drops what is on its way.
                with contextlib.suppress(OSError):  # The client was quicker, and has closed it.
                    answers.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
        finally:
            up.cancel()
            requests.transport.abort()
            answers.transport.abort()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, at_most: int | None = None) -> None:
    """Passes bytes on until the source ends, or ``at_most`` have passed."""
    passed = 0
    try:
        while data := await source.read(4096 if at_most is None else min(4096, at_most - passed)):
            sink.write(data)
            await sink.drain()
            passed += len(data)
    except OSError:
        return


@contextlib.asynccontextmanager
async def connected(server: Server, meddle: Meddle | None = None, **options: Any) -> AsyncIterator[ContextClient]:
    transport = None if meddle is None else MeddlingTransport(meddle)
    async with (
        httpx2.AsyncClient(transport=transport, trust_env=False) as http,
        ContextClient(server.url, http=http, **options) as client,
    ):
        yield client


def numbers(text: str) -> list[int]:
    """``0:<ns> 1:<ns> `` → 0, 1."""
    return [int(word.partition(":")[0]) for word in text.split(" ") if word]


async def read(
    texts: AsyncIterator[str], parts: list[str], events: Mapping[int, Callable[[], Awaitable[Any] | None]] | None = None
) -> None:
    """Adds each text to ``parts``; with the n-th one there, ``events[n]`` happens."""
    async for text in texts:
        parts.append(text)
        happening = (events or {}).get(len(parts), lambda: None)()
        if happening is not None:
            await happening


def is_pull(request: httpx2.Request) -> bool:
    return request.url.path.endswith("/content")


def is_post(request: httpx2.Request) -> bool:
    return request.method == "POST" and request.url.path.endswith("/messages")


def rewritten(response: httpx2.Response, **changes: Any) -> httpx2.Response:
    return httpx2.Response(response.status_code, json=response.json() | changes)

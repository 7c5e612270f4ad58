"""The client itself: everything that a server can be asked, by call, and replies by following them."""

import contextlib
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Any, Self

import httpx2

from context_server.client.approvals import ApprovalCalls
from context_server.client.commands import CommandCalls
from context_server.client.connection import Connection, ConnectionListener
from context_server.client.contexts import ContextCalls
from context_server.client.files import FileCalls
from context_server.client.following import Following
from context_server.client.messages import MessageCalls
from context_server.client.watch import SignalListener


class ContextClient(ContextCalls, MessageCalls, ApprovalCalls, FileCalls, CommandCalls, Following):
    """The contexts of one server; ``url`` includes the path prefix, if there is one.

    ``http`` is used, and left open, when it is given. One request is tried again for ``retry_seconds``, a follow goes
    on for ``give_up_seconds`` without a success. ``request_seconds`` is how long an answer may take,
    ``silence_seconds`` how long the signals may be silent (2.5 heartbeats and a bit), ``poll_seconds`` how long a pull
    waits for news when there are no signals (at most 30).

    Besides the errors that each method names, every one raises ``ProblemError`` when the server refuses,
    ``UnavailableError`` when it stays unable, and ``ServerUnreachable`` when it does not answer.
    """

    def __init__(
        self,
        url: str,
        *,
        http: httpx2.AsyncClient | None = None,
        request_seconds: float = 10.0,
        retry_seconds: float = 30.0,
        give_up_seconds: float = 60.0,
        silence_seconds: float = 40.0,
        poll_seconds: float = 20.0,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is not an address such as http://127.0.0.1:8000")
        self._owns_http = http is None
        # A follow holds a stream and a pull: with the usual 100 connections the 51st would stall without a word.
        self._http = http or httpx2.AsyncClient(limits=httpx2.Limits(max_connections=None))
        connection = Connection(self._http, url.rstrip("/"), request_seconds, silence_seconds)
        Following.__init__(self, connection, retry_seconds, give_up_seconds, poll_seconds)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An iteration that its reader left with ``break`` is closed by the event loop, perhaps after this.
        for watch in tuple(self._open_watches):
            await watch.close()
        if self._owns_http:
            await self._http.aclose()

    async def reply(
        self,
        context_id: str,
        text: str,
        *,
        on_signal: SignalListener | None = None,
        on_connection: ConnectionListener | None = None,
        raise_on_failure: bool = True,
        **options: Any,
    ) -> AsyncGenerator[str]:
        """Posts ``text``, with the options of ``post``, and yields the reply as it grows. Raises what both do."""
        posted = await self.post(context_id, text, **options)
        pieces = self.follow(
            context_id,
            posted.reply_message_id,
            on_signal=on_signal,
            on_connection=on_connection,
            raise_on_failure=raise_on_failure,
        )
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                yield piece

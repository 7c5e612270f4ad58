"""The client itself: contexts and messages by call, replies by following them."""

import contextlib
import hashlib
import time
from collections.abc import AsyncGenerator, Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx2

from context_server.client.connection import Connection, ConnectionListener, Patience
from context_server.client.errors import (
    DigestMismatch,
    HistoryChanged,
    IncompleteReply,
    ProblemError,
    ReplyCancelled,
    ReplyFailed,
    UnexpectedAnswer,
)
from context_server.client.records import ContextInfo, MessageInfo, Page, Posted, Signal, parse
from context_server.client.watch import SignalListener, Watch


class ContextClient:
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
        self._retry_seconds = retry_seconds
        self._give_up_seconds = give_up_seconds
        self._poll_seconds = poll_seconds
        self._owns_http = http is None
        # A follow holds a stream and a pull: with the usual 100 connections the 51st would stall without a word.
        self._http = http or httpx2.AsyncClient(limits=httpx2.Limits(max_connections=None))
        self._connection = Connection(self._http, url.rstrip("/"), request_seconds, silence_seconds)
        self._open_watches: set[Watch] = set()

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

    async def create_context(
        self, title: str | None = None, mode: str | None = None, metadata: Mapping[str, Any] | None = None
    ) -> ContextInfo:
        """A new context."""
        given = {"title": title, "mode": mode, "metadata": metadata}
        body = {name: value for name, value in given.items() if value is not None}
        return parse(ContextInfo, await self._request("POST", "/contexts", body=body))

    async def get_context(self, context_id: str) -> ContextInfo:
        """The context as it is now."""
        return parse(ContextInfo, await self._request("GET", _path(context_id)))

    async def delete_context(self, context_id: str) -> None:
        """Deletes the context.

        Raises:
            NotFoundError: there is none; after a broken connection perhaps because the first attempt did it.
        """
        await self._request("DELETE", _path(context_id))

    async def cancel(self, context_id: str) -> ContextInfo:
        """Cancels what runs or waits in the context, if anything does."""
        return parse(ContextInfo, await self._request("POST", f"{_path(context_id)}/cancel"))

    async def get_message(self, context_id: str, message_id: str) -> MessageInfo:
        """One message, with its whole text."""
        return parse(MessageInfo, await self._request("GET", _path(context_id, message_id)))

    async def list_messages(self, context_id: str, include_content: bool = True) -> list[MessageInfo]:
        """All messages, oldest first. A text too long for a page stops at its ``sequence``: follow it from there."""
        params: dict[str, Any] = {"limit": 200}
        if include_content:
            params["include"] = "content"
        messages: list[MessageInfo] = []
        while True:
            page = await self._request("GET", f"{_path(context_id)}/messages", params=params)
            items, cursor = (page.get("items"), page.get("next_cursor")) if isinstance(page, dict) else (None, None)
            messages += [parse(MessageInfo, item) for item in items or ()]
            if not items or cursor is None:
                return messages
            params["cursor"] = cursor

    async def post(
        self,
        context_id: str,
        text: str,
        *,
        idempotency_key: str | None = None,
        client_metadata: Mapping[str, Any] | None = None,
    ) -> Posted:
        """Posts a message of the user's, which starts a reply. However often it is tried, it is posted once.

        Raises:
            NotAllowedError: the context is busy.
        """
        body = {"payload": {"type": "text", "content": text}, "client_metadata": dict(client_metadata or {})}
        path = f"{_path(context_id)}/messages"
        return parse(Posted, await self._request("POST", path, body=body, idempotency_key=idempotency_key))

    async def reply(
        self,
        context_id: str,
        text: str,
        *,
        on_signal: SignalListener | None = None,
        on_connection: ConnectionListener | None = None,
        raise_on_failure: bool = True,
    ) -> AsyncGenerator[str]:
        """Posts ``text`` and yields the reply as it grows. Raises what ``post`` and ``follow`` do."""
        posted = await self.post(context_id, text)
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

    async def follow(
        self,
        context_id: str,
        message_id: str,
        from_sequence: int = 0,
        *,
        epoch: str | None = None,
        on_signal: SignalListener | None = None,
        on_connection: ConnectionListener | None = None,
        raise_on_failure: bool = True,
    ) -> AsyncGenerator[str]:
        """Yields the text after ``from_sequence`` as it grows, until the message has ended. Raises what ``pages`` does.

        Raises:
            ReplyFailed, ReplyCancelled: after all the text was yielded, unless ``raise_on_failure`` is False.
        """
        pages = self.pages(
            context_id, message_id, from_sequence, epoch=epoch, on_signal=on_signal, on_connection=on_connection
        )
        async with contextlib.aclosing(pages):
            async for page in pages:
                if page.content:
                    yield page.content
        if raise_on_failure and page.status == "cancelled":
            raise ReplyCancelled(message_id, page.sequence)
        if raise_on_failure and page.status == "failed":
            error = (await self.get_message(context_id, message_id)).error or {}
            raise ReplyFailed(message_id, page.sequence, str(error.get("code", "unknown")), error.get("detail"))

    async def pages(
        self,
        context_id: str,
        message_id: str,
        from_sequence: int = 0,
        *,
        epoch: str | None = None,
        on_signal: SignalListener | None = None,
        on_connection: ConnectionListener | None = None,
    ) -> AsyncGenerator[Page]:
        """Yields what each pull brought; the last page is the one that ends the message, perhaps without text.

        Keep ``sequence`` and ``epoch`` of a page beside its text, and hand them in to go on, in any process. Breaks of
        the connection are mended here. ``on_signal`` and ``on_connection`` are for showing what goes on.

        Raises:
            NotFoundError: there is no such message, or it was deleted meanwhile.
            HistoryChanged: the log is of another ``epoch``, or shorter than what is held.
            IncompleteReply: the message has ended, and the server does not have all of it.
            DigestMismatch: followed from 0, the text is not what was written.
        """
        path = f"{_path(context_id, message_id)}/content"
        stream_path = f"{_path(context_id)}/stream"
        held = from_sequence
        digest = hashlib.sha256()
        # The task that listens is in no TaskGroup: a group must not be held open over a yield.
        async with Watch(
            self._connection, stream_path, message_id, on_signal, on_connection, self._open_watches
        ) as watch:
            while True:
                wait_seconds = self._poll_seconds if watch.begin_pull() else 0.0
                began = time.monotonic()
                page = await self._pull(path, message_id, held, wait_seconds)
                if epoch is not None and page.epoch is not None and page.epoch != epoch:
                    raise HistoryChanged(message_id, held, "the server's epoch has changed")
                epoch = page.epoch or epoch
                grew, held = page.sequence > held, page.sequence
                digest.update(page.content.encode())
                ended = _has_ended(page, message_id)
                if ended and from_sequence == 0 and page.digest not in (None, digest.hexdigest()):
                    raise DigestMismatch(message_id, str(page.digest), digest.hexdigest())
                if grew or ended:
                    yield page
                if ended:
                    return
                if page.up_to_date:
                    await watch.until_more_than(held)
                if not grew and wait_seconds and time.monotonic() - began < 1:
                    await Patience(0).rest(1.0)  # A server that does not wait must not be asked in a circle.

    async def signals(
        self, context_id: str, *, on_connection: ConnectionListener | None = None
    ) -> AsyncGenerator[Signal]:
        """Yields the signals of the context, connecting again after breaks; ends when the context is deleted."""
        signals = self._connection.signals(
            f"{_path(context_id)}/stream", give_up_seconds=self._give_up_seconds, on_connection=on_connection
        )
        async with contextlib.aclosing(signals):
            async for signal in signals:
                yield signal

    async def _request(self, method: str, path: str, **rest: Any) -> Any:
        return await self._connection.request(method, path, give_up_seconds=self._retry_seconds, **rest)

    async def _pull(self, path: str, message_id: str, held: int, wait_seconds: float) -> Page:
        params = {"from_sequence": held} | ({"wait": f"{wait_seconds:g}"} if wait_seconds else {})
        try:
            answer = await self._connection.request(
                "GET", path, params=params, wait_seconds=wait_seconds, give_up_seconds=self._give_up_seconds
            )
        except ProblemError as error:
            if error.code == "sequence-ahead":
                raise HistoryChanged(message_id, held, f"the server's log does not reach sequence {held}") from error
            raise
        page = parse(Page, answer)
        if page.sequence < held:
            raise UnexpectedAnswer(f"a pull after sequence {held} was answered up to {page.sequence}")
        return page


def _has_ended(page: Page, message_id: str) -> bool:
    """Whether ``page`` is the last one of its message.

    Raises:
        IncompleteReply: it ends elsewhere than the message.
    """
    final = page.final_sequence
    if final is None or page.sequence == final:
        return final is not None
    if page.up_to_date or page.sequence > final:
        raise IncompleteReply(message_id, page.sequence, final)
    return False


def _path(context_id: str, message_id: str | None = None) -> str:
    path = f"/contexts/{quote(context_id, safe='')}"
    return path if message_id is None else f"{path}/messages/{quote(message_id, safe='')}"

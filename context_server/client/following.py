"""Following: a reply as it grows, by text or by chunks of every kind, over whatever breaks."""

import contextlib
import hashlib
import time
from collections.abc import AsyncGenerator
from typing import Literal

from context_server.client.caller import Caller, path_of
from context_server.client.connection import Connection, ConnectionListener, Patience
from context_server.client.errors import (
    DigestMismatch,
    HistoryChanged,
    IncompleteReply,
    ProblemError,
    ReplyCancelled,
    ReplyFailed,
)
from context_server.client.parsing import parse, parse_page
from context_server.client.records import Chunk, MessageInfo, Page, Signal
from context_server.client.watch import SignalListener, Watch

View = Literal["content", "chunks"]


class Following(Caller):
    """Messages and signals, followed. A reply that waits for its turn or for a person is followed all the same."""

    def __init__(
        self, connection: Connection, retry_seconds: float, give_up_seconds: float, poll_seconds: float
    ) -> None:
        super().__init__(connection, retry_seconds)
        self._give_up_seconds = give_up_seconds
        self._poll_seconds = poll_seconds
        self._open_watches: set[Watch] = set()

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
        if raise_on_failure:
            await self._raise_if_ended_early(context_id, message_id, page)

    async def follow_chunks(
        self,
        context_id: str,
        message_id: str,
        from_sequence: int = 0,
        *,
        epoch: str | None = None,
        on_signal: SignalListener | None = None,
        on_connection: ConnectionListener | None = None,
        raise_on_failure: bool = True,
    ) -> AsyncGenerator[Chunk]:
        """As ``follow``, but yields every chunk: text, reasoning, tool calls and their results, steps, errors.

        The digest is of the ``text`` chunks; that no other one is missing is proved by their sequences. A call that
        waits for a person is a ``tool_call`` with ``approval`` in its data, and the next chunk comes once it was
        decided on.
        """
        pages = self.pages(
            context_id,
            message_id,
            from_sequence,
            view="chunks",
            epoch=epoch,
            on_signal=on_signal,
            on_connection=on_connection,
        )
        async with contextlib.aclosing(pages):
            async for page in pages:
                for chunk in page.chunks:
                    yield chunk
        if raise_on_failure:
            await self._raise_if_ended_early(context_id, message_id, page)

    async def pages(
        self,
        context_id: str,
        message_id: str,
        from_sequence: int = 0,
        *,
        view: View = "content",
        epoch: str | None = None,
        on_signal: SignalListener | None = None,
        on_connection: ConnectionListener | None = None,
    ) -> AsyncGenerator[Page]:
        """Yields what each pull brought; the last page is the one that ends the message, perhaps without text.

        Keep ``sequence`` and ``epoch`` of a page beside its text, and hand them in to go on, in any process. Breaks of
        the connection are mended here. ``on_signal`` and ``on_connection`` are for showing what goes on. With the view
        ``chunks`` a page has its chunks too.

        Raises:
            NotFoundError: there is no such message, or it was deleted meanwhile.
            HistoryChanged: the log is of another ``epoch``, or shorter than what is held.
            IncompleteReply: the message has ended, and the server does not have all of it.
            DigestMismatch: followed from 0, the text is not what was written.
        """
        path = path_of("contexts", context_id, "messages", message_id, "content")
        stream_path = path_of("contexts", context_id, "stream")
        held = from_sequence
        digest = hashlib.sha256()
        # The task that listens is in no TaskGroup: a group must not be held open over a yield.
        async with Watch(
            self._connection, stream_path, message_id, on_signal, on_connection, self._open_watches
        ) as watch:
            while True:
                wait_seconds = self._poll_seconds if watch.begin_pull() else 0.0
                began = time.monotonic()
                page = await self._pull(path, message_id, held, wait_seconds, view)
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
            path_of("contexts", context_id, "stream"),
            give_up_seconds=self._give_up_seconds,
            on_connection=on_connection,
        )
        async with contextlib.aclosing(signals):
            async for signal in signals:
                yield signal

    async def _pull(self, path: str, message_id: str, held: int, wait_seconds: float, view: View) -> Page:
        params: dict[str, str | int] = {"from_sequence": held}
        params |= {"wait": f"{wait_seconds:g}"} if wait_seconds else {}
        params |= {"view": view} if view != "content" else {}
        try:
            answer = await self._connection.request(
                "GET", path, params=params, wait_seconds=wait_seconds, give_up_seconds=self._give_up_seconds
            )
        except ProblemError as error:
            if error.code == "sequence-ahead":
                raise HistoryChanged(message_id, held, f"the server's log does not reach sequence {held}") from error
            raise
        return parse_page(answer, held)

    async def _raise_if_ended_early(self, context_id: str, message_id: str, page: Page) -> None:
        if page.status == "cancelled":
            raise ReplyCancelled(message_id, page.sequence)
        if page.status == "failed":
            path = path_of("contexts", context_id, "messages", message_id)
            error = parse(MessageInfo, await self._request("GET", path)).error or {}
            raise ReplyFailed(message_id, page.sequence, str(error.get("code", "unknown")), error.get("detail"))


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

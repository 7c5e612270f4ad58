"""The conversation itself: sends what is said, and shows what is replied."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import EllipsisType

from context_server.chat.asking import Asker
from context_server.chat.display import Display
from context_server.chat.keyboard import Keyboard
from context_server.chat.reply import STATES, ShownReply
from context_server.chat.wording import ending, short
from context_server.client import (
    ClientError,
    CommandCarriedOut,
    ContextClient,
    ContextInfo,
    MessageInfo,
    NotAllowedError,
    Posted,
    ProblemError,
)

DEFAULT_URL = "http://127.0.0.1:8000"


class Conversation:
    """A person and a context. Raises ``ClientError`` when the server stays away, ``Leaving`` when the person goes."""

    def __init__(
        self, client: ContextClient, url: str, context: ContextInfo, display: Display, keyboard: Keyboard
    ) -> None:
        self.client = client
        self.context_id = context.id
        self.display = display
        self.keyboard = keyboard
        self.shows_reasoning = True
        self._url = url
        self._files: list[str] = []
        self._is_replying = False
        self._posted = asyncio.Event()
        self._posted.set()
        self._cancelling: asyncio.Task[None] | None = None

    @property
    def how_to_resume(self) -> str:
        """The command that continues here."""
        where = "" if self._url.rstrip("/") == DEFAULT_URL else f" --url {self._url}"
        return f"Resume with: context-server chat{where} --context {self.context_id}"

    def enter(self, context_id: str) -> None:
        """Goes on in another context."""
        self.context_id = context_id
        self.display.notice(f"Context {context_id}. {self.how_to_resume}")

    def attach(self, file_id: str) -> None:
        """Adds an uploaded file to the next message."""
        self._files.append(file_id)

    async def talk(
        self,
        text: str,
        *,
        parent_id: str | EllipsisType | None = ...,
        if_busy: str | None = None,
        files: Sequence[str] = (),
    ) -> None:
        """Posts a message, with the files that were attached, and shows its reply."""

        async def post() -> Posted:
            attached = [*files, *self._files]
            posted = await self.client.post(self.context_id, text, files=attached, parent_id=parent_id, if_busy=if_busy)
            self._files.clear()
            return posted

        await self.exchange(post)

    async def exchange(self, begin: Callable[[], Awaitable[Posted]]) -> None:
        """Begins a reply, and shows it."""
        outcome = None
        async with self._reply():
            self.display.status("sending…")
            self._posted.clear()
            try:
                posted = await begin()
            except NotAllowedError as error:
                outcome = (
                    f"Not sent: the context is {error.state}. Cancel that with /cancel, "
                    "have your message wait with /queue TEXT, or wait yourself."
                )
            except CommandCarriedOut as error:
                outcome = error.answer.message
            except ProblemError as error:
                outcome = f"Not sent: {error.detail}"
            else:
                self._posted.set()
                outcome = await self._attend(posted.reply_message_id)
        if outcome is not None:
            self.display.notice(outcome)

    async def show_history(self, from_message_id: str | None = None) -> None:
        """Shows what was said before, or what of it is from a message on; a reply that is being written to its end."""
        shown = from_message_id is None
        for message in await self.client.list_messages(self.context_id):
            shown = shown or message.id == from_message_id
            if not shown:
                continue
            if message.role == "user":
                self.display.said(await self._said(message))
                continue
            async with self._reply():
                if message.sequence == message.final_sequence:
                    self.display.write(message.content or "")
                    outcome = ending(message)
                else:
                    outcome = await self._attend(message.id)
            if outcome is not None:
                self.display.notice(outcome)

    async def cancel(self) -> None:
        """Cancels what runs or waits."""
        self.display.status(STATES["cancelling"])
        await self._posted.wait()  # What is not yet there cannot be cancelled.
        try:
            await self.client.cancel(self.context_id)
        except ClientError as error:
            self.display.notice(f"Not cancelled: {error}")

    def interrupt(self) -> bool:
        """Cancels the reply that is shown, without waiting for that; False when there is none, or it was told so."""
        if not self._is_replying or self._cancelling is not None:
            return False
        self._cancelling = asyncio.create_task(self.cancel())
        return True

    @contextlib.asynccontextmanager
    async def _reply(self) -> AsyncIterator[None]:
        """A reply is shown inside, and can be interrupted."""
        self._is_replying = True
        try:
            with self.keyboard.quiet(), self.display.reply():
                yield
        finally:
            self._is_replying = False
            self._posted.set()
            if self._cancelling is not None:
                self._cancelling.cancel()
                await asyncio.wait({self._cancelling})
                self._cancelling = None

    async def _attend(self, message_id: str) -> str | None:
        """Shows a reply to its end; what is to be said about the end."""
        asker = Asker(self.client, self._url, self.context_id, message_id, self.display, self.keyboard)
        reply = ShownReply(
            self.client, self.context_id, message_id, self.display, asker, shows_reasoning=self.shows_reasoning
        )
        return await reply.show()

    async def _said(self, message: MessageInfo) -> str:
        """All that a user's message says; a list cuts texts where its page is full."""
        pieces = [message.content or ""]
        if message.sequence != message.final_sequence:
            pieces += [piece async for piece in self.client.follow(self.context_id, message.id, message.sequence)]
        payload = message.payload or {}
        if payload.get("type") == "workflow":
            pieces.append(f"[the workflow {short(str(payload.get('name')))}]")
        pieces += [f"\n[{short(str(file.get('name')))}]" for file in payload.get("files") or ()]
        return "".join(pieces)

"""The conversation itself: sends what is typed, shows what is replied, until the person leaves."""

import asyncio
import contextlib
import io
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

from rich.console import Console

from context_server.chat.display import Display, PlainDisplay, TerminalDisplay
from context_server.chat.keyboard import Keyboard
from context_server.client import (
    ClientError,
    ContextClient,
    ContextInfo,
    MessageInfo,
    NotAllowedError,
    NotFoundError,
    ProblemError,
    ReplyCancelled,
    ReplyFailed,
    Signal,
    TransportError,
)

DEFAULT_URL = "http://127.0.0.1:8000"

HELP = """\
/new      begin a new context
/cancel   cancel what runs in this context, for another client perhaps
/help     show this list
/quit     leave, as Ctrl-D and Ctrl-C do
//text    send a message that begins with a slash
Ctrl-C while a reply is being written cancels the reply."""

STATES = {
    "queued": "waiting for its turn",
    "thinking": "thinking…",
    "streaming": "writing…",
    "calling_tool": "calling a tool…",
    "awaiting_approval": "waiting for an approval",
    "cancelling": "cancelling…",
}


def run_chat(url: str, context_id: str | None) -> int:
    """Talks in a new context, or in ``context_id``, until the person leaves.

    The exit code: 0, or 1 when there is no server, no such context, or the server is lost for good.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # A terminal that cannot show a character must not end the chat.
    interactive = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    console = Console(highlight=False)
    display: Display = TerminalDisplay(console) if interactive and not console.is_dumb_terminal else PlainDisplay()
    keyboard = Keyboard(interactive)
    try:
        with keyboard.restored():
            return asyncio.run(_chat(url, context_id, display, keyboard))
    except KeyboardInterrupt:  # Before the conversation had begun to listen for it.
        return 130
    except BrokenPipeError:  # The reader of our output has gone; Python would complain once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


async def _chat(url: str, context_id: str | None, display: Display, keyboard: Keyboard) -> int:
    try:
        async with ContextClient(url, retry_seconds=0) as first:  # Whoever mistyped the address is told at once.
            context = await (first.create_context() if context_id is None else first.get_context(context_id))
    except (ClientError, ValueError) as error:
        display.notice(_refusal(url, context_id, error))
        return 1
    async with ContextClient(url) as client:
        conversation = Conversation(client, url, context, display, keyboard)
        try:
            await conversation.run(resumed=context_id is not None)
        except ClientError as error:
            display.notice(f"Lost: {error}. {conversation.how_to_resume}")
            return 1
    display.notice(f"Bye. {conversation.how_to_resume}")
    return 0


class Conversation:
    """A person and a context. Raises ``ClientError`` when the server stays away."""

    def __init__(
        self, client: ContextClient, url: str, context: ContextInfo, display: Display, keyboard: Keyboard
    ) -> None:
        self._client = client
        self._url = url
        self._context_id = context.id
        self._display = display
        self._keyboard = keyboard
        self._state = ""
        self._replying = False
        self._posted = asyncio.Event()
        self._posted.set()
        self._cancelling: asyncio.Task[None] | None = None
        self._leaving = False

    @property
    def how_to_resume(self) -> str:
        """The command that continues here."""
        where = "" if self._url.rstrip("/") == DEFAULT_URL else f" --url {self._url}"
        return f"Resume with: context-server chat{where} --context {self._context_id}"

    async def run(self, resumed: bool) -> None:
        """Shows what was said before, then talks until there is no more input, /quit or Ctrl-C."""
        main = asyncio.current_task()
        with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C raises KeyboardInterrupt there.
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self._interrupted, main)
        try:
            self._display.notice(f"Context {self._context_id}; /help lists what you can do. {self.how_to_resume}")
            if resumed:
                await self._show_history()
            going_on = True
            while going_on and (line := await self._keyboard.line()) is not None:
                try:
                    going_on = await self._obey(line.strip())
                except ProblemError as error:
                    self._display.notice(f"Refused: {error.detail}")
        except asyncio.CancelledError:
            if not self._leaving or main is None:
                raise
            main.uncancel()

    def _interrupted(self, main: asyncio.Task[Any] | None) -> None:
        """Ctrl-C: at the prompt it leaves, during a reply it cancels it, and when that is not soon enough it leaves."""
        if self._keyboard.abandon():
            return
        if self._replying and self._cancelling is None:
            self._cancelling = asyncio.create_task(self._cancel())
        elif main is not None:
            self._leaving = True
            main.cancel()

    async def _obey(self, line: str) -> bool:
        """Does what a line says; False to leave."""
        match line:
            case "":
                pass
            case "/quit" | "/exit":
                return False
            case "/help":
                self._display.notice(HELP)
            case "/new":
                self._context_id = (await self._client.create_context()).id
                self._display.notice(f"Context {self._context_id}. {self.how_to_resume}")
            case "/cancel":
                await self._cancel()
                state = (await self._client.get_context(self._context_id)).state
                self._display.notice(f"The context is {state}.")
            case _ if line.startswith("/") and not line.startswith("//"):
                self._display.notice(f"There is no command {line.split()[0]}; /help lists them.")
            case _:
                await self._talk(line[1:] if line.startswith("//") else line)
        return True

    async def _talk(self, text: str) -> None:
        outcome = None
        async with self._reply():
            self._display.status("sending…")
            self._posted.clear()
            try:
                posted = await self._client.post(self._context_id, text)
            except NotAllowedError as error:
                outcome = f"Not sent: the context is {error.state}. Cancel that with /cancel, or wait."
            except ProblemError as error:
                outcome = f"Not sent: {error.detail}"
            else:
                self._posted.set()
                outcome = await self._attend(posted.reply_message_id, 0)
        if outcome is not None:
            self._display.notice(outcome)

    @contextlib.asynccontextmanager
    async def _reply(self) -> AsyncIterator[None]:
        """A reply is shown inside, and Ctrl-C cancels it."""
        self._replying = True
        try:
            with self._keyboard.quiet(), self._display.reply():
                yield
        finally:
            self._replying = False
            self._posted.set()
            if self._cancelling is not None:
                self._cancelling.cancel()
                await asyncio.wait({self._cancelling})
                self._cancelling = None

    async def _attend(self, message_id: str, from_sequence: int) -> str | None:
        """Shows a reply from there to its end; what is to be said about the end."""
        pieces = self._client.follow(
            self._context_id,
            message_id,
            from_sequence,
            on_signal=self._signalled,
            on_connection=self._connection_changed,
        )
        try:
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    self._display.write(piece)
                    self._display.status(self._state)
        except ReplyCancelled:
            return "(cancelled)"
        except ReplyFailed as error:
            return _failure(error.code)
        except TransportError:
            raise
        except ClientError as error:
            return f"({error})"
        return None

    async def _cancel(self) -> None:
        self._display.status(STATES["cancelling"])
        await self._posted.wait()  # What is not yet there cannot be cancelled.
        try:
            await self._client.cancel(self._context_id)
        except ClientError as error:
            self._display.notice(f"Not cancelled: {error}")

    async def _show_history(self) -> None:
        for message in await self._client.list_messages(self._context_id):
            if message.role == "user":
                self._display.said(await self._whole_text(message))
                continue
            async with self._reply():
                self._display.write(message.content or "")
                outcome = _outcome(message)
                if message.sequence != message.final_sequence:
                    outcome = await self._attend(message.id, message.sequence)
            if outcome is not None:
                self._display.notice(outcome)

    async def _whole_text(self, message: MessageInfo) -> str:
        """A list cuts texts where its page is full."""
        pieces = [message.content or ""]
        if message.sequence != message.final_sequence:
            pieces += [piece async for piece in self._client.follow(self._context_id, message.id, message.sequence)]
        return "".join(pieces)

    def _signalled(self, told: Signal) -> None:
        if told.type == "state_changed" and told.new_state is not None:
            self._state = STATES.get(told.new_state, "")
            self._display.status(self._state)

    def _connection_changed(self, connected: bool) -> None:
        if connected:
            self._display.status(self._state)
        else:
            self._display.status("connection lost, resuming…", trouble=True)


def _failure(code: str) -> str:
    return f"(the reply failed: {code}; what was written is kept)"


def _outcome(message: MessageInfo) -> str | None:
    if message.status == "cancelled":
        return "(cancelled)"
    return _failure(str((message.error or {}).get("code", "unknown"))) if message.status == "failed" else None


def _refusal(url: str, context_id: str | None, error: Exception) -> str:
    match error:
        case ProblemError(code="context-not-found") if isinstance(error, NotFoundError):
            return f"There is no context {context_id} on {url}."
        case ProblemError(status=404):
            return f"There is no context server at {url}, but something else answers there."
        case TransportError():
            return f"There is no context server at {url}; start one with: context-server serve"
        case _:
            return f"{url} cannot be used: {error}"

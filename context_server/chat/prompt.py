"""Where a person types: each line is a message or a command, until there are no more."""

import asyncio
import contextlib
import io
import os
import signal
import sys
from typing import Any

from rich.console import Console

from context_server.chat import commands
from context_server.chat.asking import Leaving
from context_server.chat.conversation import Conversation
from context_server.chat.display import Display, PlainDisplay
from context_server.chat.keyboard import Keyboard
from context_server.chat.terminal import TerminalDisplay
from context_server.client import ClientError, ContextClient, NotFoundError, ProblemError, TransportError


def run_chat(url: str, context_id: str | None) -> int:
    """Talks in a new context, or in ``context_id``, until the person leaves.

    The exit code: 0; 1 when there is no server, no such context, or the server is lost for good; 3 when a reply waits
    for an approval and there is nobody to ask.
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
            exit_code = await Prompt(conversation).run(resumed=context_id is not None)
        except ClientError as error:
            display.notice(f"Lost: {error}. {conversation.how_to_resume}")
            return 1
    display.notice(f"Bye. {conversation.how_to_resume}")
    return exit_code


class Prompt:
    """Reads line by line, and listens for Ctrl-C. Raises ``ClientError`` when the server stays away."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._is_leaving = False

    async def run(self, resumed: bool) -> int:
        """Shows what was said before, then talks until there is no more input, /quit or Ctrl-C; the exit code."""
        conversation = self._conversation
        main = asyncio.current_task()
        with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C raises KeyboardInterrupt there.
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self._interrupted, main)
        try:
            told = f"Context {conversation.context_id}; /help lists what you can do. {conversation.how_to_resume}"
            conversation.display.notice(told)
            if resumed:
                await conversation.show_history()
            while (line := await conversation.keyboard.line()) is not None:
                try:
                    await self._obey(line.strip())
                except ProblemError as error:
                    conversation.display.notice(f"Refused: {error.detail}")
        except Leaving as leaving:
            return leaving.exit_code
        except asyncio.CancelledError:
            if not self._is_leaving or main is None:
                raise
            main.uncancel()
        return 0

    async def _obey(self, line: str) -> None:
        """Does what a line says."""
        if line.startswith("/") and not line.startswith("//"):
            await commands.obey(self._conversation, line)
        elif line.startswith("//"):
            await self._conversation.talk(await commands.unescaped(self._conversation, line))
        elif line:
            await self._conversation.talk(line)

    def _interrupted(self, main: asyncio.Task[Any] | None) -> None:
        """Ctrl-C: at the prompt it leaves, during a reply it cancels it, and when that is not soon enough it leaves."""
        if self._conversation.keyboard.abandon() or self._conversation.interrupt():
            return
        if main is not None:
            self._is_leaving = True
            main.cancel()


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

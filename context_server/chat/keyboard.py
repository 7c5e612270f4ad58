"""Lines from a person or a pipe, without blocking the event loop."""

import asyncio
import contextlib
import os
import queue
import sys
import threading
from collections.abc import Iterator
from typing import BinaryIO

if sys.platform != "win32":
    import termios

PROMPT = "> "

_Request = tuple["asyncio.Future[str | None]", str, str]


class Keyboard:
    """Reads a line whenever one is asked for.

    The reading thread is a daemon: nothing can wake a thread that waits for a key, so leaving must not wait for it. For
    the same reason a pipe is read through a file object of its own: the interpreter flushes ``sys.stdin`` as it exits,
    and would wait for the lock that the thread holds. Questions that may settle themselves are read without the thread.
    """

    def __init__(self, interactive: bool) -> None:
        self.interactive = interactive
        self._requests: queue.SimpleQueue[_Request] = queue.SimpleQueue()
        self._answer: asyncio.Future[str | None] | None = None
        self._thread: threading.Thread | None = None

    async def line(self, prompt: str = PROMPT, prefill: str = "") -> str | None:
        """The next line without its end, which a person finds begun with ``prefill``.

        None when there are no more, or when it was abandoned: then the chat has to end.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._read, name="keyboard", daemon=True)
            self._thread.start()
        self._answer = asyncio.get_running_loop().create_future()
        self._requests.put((self._answer, prompt, prefill))
        try:
            line = await self._answer
        finally:
            self._answer = None
        if line is None and self.interactive:
            sys.stdout.write("\n")  # Whatever comes next is not to stand behind the prompt.
        return line

    async def answer(self, prompt: str) -> str | None:
        """A line that was typed as an answer to ``prompt``; None when there are no more.

        What was typed before the question is dropped, since it was meant for something else. A cancelled question takes
        with it what was typed of an answer.
        """
        if sys.platform == "win32":
            return await self.line(prompt)
        loop, terminal = asyncio.get_running_loop(), sys.stdin.fileno()
        answered: asyncio.Future[str | None] = loop.create_future()
        typed = bytearray()

        def take() -> None:
            try:
                data = os.read(terminal, 4096)
            except OSError:  # The terminal is closed.
                data = b""
            typed.extend(data)
            if (not data or data.endswith(b"\n")) and not answered.done():
                answered.set_result(typed.decode(errors="replace").rstrip("\r\n") if data else None)

        with self._mode(echo=True):
            termios.tcflush(terminal, termios.TCIFLUSH)
            sys.stdout.write(prompt)
            sys.stdout.flush()
            loop.add_reader(terminal, take)
            try:
                line = await answered
            except asyncio.CancelledError:
                termios.tcflush(terminal, termios.TCIFLUSH)
                sys.stdout.write("\n")
                raise
            finally:
                loop.remove_reader(terminal)
        if line is None:
            sys.stdout.write("\n")
        return line

    def abandon(self) -> bool:
        """Ends the wait for a line, as if there were no more; whether anybody waited."""
        if self._answer is None or self._answer.done():
            return False
        self._answer.set_result(None)
        return True

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Leaves the terminal as it was, even when the thread is left behind in the middle of a line."""
        with self._mode(echo=None):
            yield

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Keys are kept for the next prompt, and not shown: they would be written into the reply."""
        with self._mode(echo=False):
            yield

    @contextlib.contextmanager
    def aloud(self) -> Iterator[None]:
        """Keys are shown again, for a line that is asked for in a reply."""
        with self._mode(echo=True):
            yield

    @contextlib.contextmanager
    def _mode(self, echo: bool | None) -> Iterator[None]:
        if not self.interactive or sys.platform == "win32":
            yield
            return
        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
        if echo is not None:
            after = list(before)
            after[3] = after[3] | termios.ECHO | termios.ICANON if echo else after[3] & ~termios.ECHO
            termios.tcsetattr(terminal, termios.TCSADRAIN, after)
        try:
            yield
        finally:
            termios.tcsetattr(terminal, termios.TCSADRAIN, before)

    def _read(self) -> None:
        with contextlib.ExitStack() as stack:
            pipe = None
            if not self.interactive and sys.stdin is not None:
                pipe = stack.enter_context(open(sys.stdin.fileno(), "rb", closefd=False))
            while True:
                answer, prompt, prefill = self._requests.get()
                line = _typed_line(prompt, prefill) if self.interactive else _piped_line(pipe)
                with contextlib.suppress(RuntimeError):  # The loop is closed: nobody waits any more.
                    answer.get_loop().call_soon_threadsafe(_settle, answer, line)


def _typed_line(prompt: str, prefill: str) -> str | None:
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):
            import readline  # Importing it gives input() its line editing and history.

            if prefill:
                readline.set_startup_hook(lambda: readline.insert_text(prefill))
                stack.callback(readline.set_startup_hook, None)
        try:
            return input(prompt)
        except EOFError:
            return None
        except UnicodeDecodeError:
            return ""


def _piped_line(pipe: BinaryIO | None) -> str | None:
    line = pipe.readline() if pipe is not None else b""
    return line.decode(errors="replace").rstrip("\r\n") if line else None


def _settle(answer: asyncio.Future[str | None], line: str | None) -> None:
    if not answer.done():
        answer.set_result(line)

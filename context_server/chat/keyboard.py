"""Lines from a person or a pipe, without blocking the event loop."""

import asyncio
import contextlib
import queue
import sys
import threading
from collections.abc import Iterator
from typing import BinaryIO

if sys.platform != "win32":
    import termios

PROMPT = "> "


class Keyboard:
    """Reads a line whenever one is asked for.

    The reading thread is a daemon: nothing can wake a thread that waits for a key, so leaving must not wait for it. For
    the same reason a pipe is read through a file object of its own: the interpreter flushes ``sys.stdin`` as it exits,
    and would wait for the lock that the thread holds.
    """

    def __init__(self, interactive: bool) -> None:
        self._interactive = interactive
        self._requests: queue.SimpleQueue[asyncio.Future[str | None]] = queue.SimpleQueue()
        self._answer: asyncio.Future[str | None] | None = None
        self._thread: threading.Thread | None = None

    async def line(self) -> str | None:
        """The next line without its end; None when there are no more, or when it was abandoned."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._read, name="keyboard", daemon=True)
            self._thread.start()
        self._answer = asyncio.get_running_loop().create_future()
        self._requests.put(self._answer)
        try:
            line = await self._answer
        finally:
            self._answer = None
        if line is None and self._interactive:
            sys.stdout.write("\n")  # Whatever comes next is not to stand behind the prompt.
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
        with self._mode(echo=True):
            yield

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Keys are kept for the next prompt, and not shown: they would be written into the reply."""
        with self._mode(echo=False):
            yield

    @contextlib.contextmanager
    def _mode(self, echo: bool) -> Iterator[None]:
        if not self._interactive or sys.platform == "win32":
            yield
            return
        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
        if not echo:
            after = list(before)
            after[3] &= ~termios.ECHO
            termios.tcsetattr(terminal, termios.TCSADRAIN, after)
        try:
            yield
        finally:
            termios.tcsetattr(terminal, termios.TCSADRAIN, before)

    def _read(self) -> None:
        if self._interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - importing it gives input() its line editing and history
        with contextlib.ExitStack() as stack:
            pipe = None
            if not self._interactive and sys.stdin is not None:
                pipe = stack.enter_context(open(sys.stdin.fileno(), "rb", closefd=False))
            while True:
                answer = self._requests.get()
                line = _typed_line() if self._interactive else _piped_line(pipe)
                with contextlib.suppress(RuntimeError):  # The loop is closed: nobody waits any more.
                    answer.get_loop().call_soon_threadsafe(_settle, answer, line)


def _typed_line() -> str | None:
    try:
        return input(PROMPT)
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

"""The terminal chat as a child process: between pipes, or on a terminal of its own."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

SECONDS = 60.0
ROOT = str(Path(__file__).resolve().parents[2])
# The terminal that a child is given becomes its own, so that ^C typed there interrupts it.
TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)
CONTEXT = re.compile(r"--context ([0-9a-f-]{36})")


def command(server_url: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "context_server", "chat", "--url", server_url, *options]


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CONTEXT_SERVER_")}
    return kept | {"PYTHONPATH": ROOT, "PYTHONUTF8": "1"} | more


class Output:
    """What a child has written to a file descriptor so far."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._bytes = b""

    @property
    def text(self) -> str:
        return self._bytes.decode(errors="replace")

    def until(self, pattern: str, after: int = 0) -> re.Match[str]:
        """Reads until ``pattern`` is found in what came ``after`` so many characters."""
        deadline = time.monotonic() + SECONDS
        while (found := re.compile(pattern).search(self.text, after)) is None:
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.text[after:]!r}"
            assert self._more(), f"ended without {pattern!r}: {self.text[after:]!r}"
        return found

    def rest(self) -> str:
        while self._more():
            pass
        return self.text

    def _more(self) -> bool:
        ready, _, _ = select.select([self._descriptor], [], [], SECONDS)
        assert ready, f"nothing more after {self.text!r}"
        try:
            data = os.read(self._descriptor, 65536)
        except OSError:  # A terminal whose other end is closed.
            return False
        self._bytes += data
        return bool(data)


class Piped:
    """The chat between pipes."""

    def __init__(self, server_url: str, *options: str) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command(server_url, *options), stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, env=environment()
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.output = Output(self.process.stdout.fileno())
        self.notices = Output(self.process.stderr.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.process:
            self.process.kill()

    def type(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())

    def end(self) -> int:
        """Closes its input; its exit code."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.output.rest()
        self.notices.rest()
        return self.process.wait(SECONDS)


class Terminal:
    """The chat on a terminal of 60 columns."""

    def __init__(self, server_url: str, *options: str, kind: str = "xterm") -> None:
        with ExitStack() as stack:
            self._keys, screen = pty.openpty()
            stack.callback(os.close, screen)
            self.process = subprocess.Popen(
                [sys.executable, "-c", TAKE_TERMINAL, *command(server_url, *options)],
                stdin=screen,
                stdout=screen,
                stderr=screen,
                start_new_session=True,
                env=environment(TERM=kind, COLUMNS="60", LINES="30"),
            )
        self.screen = Output(self._keys)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.process:
            self.process.kill()
        os.close(self._keys)

    def type(self, text: str) -> None:
        os.write(self._keys, text.encode())

"""How a conversation is shown: what a display does, and the one that writes plain text."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Protocol

from context_server.chat.keyboard import PROMPT
from context_server.chat.wording import harmless


class Display(Protocol):
    """Where the conversation is shown."""

    def said(self, text: str) -> None:
        """What the user said earlier."""
        ...

    def notice(self, text: str) -> None:
        """Lines of the chat's own."""
        ...

    def question(self, text: str) -> None:
        """What a person is to decide on."""
        ...

    def reply(self) -> contextlib.AbstractContextManager[None]:
        """A reply is shown inside."""
        ...

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """The reply keeps still inside, so that a person can be asked."""
        ...

    def write(self, piece: str) -> None:
        """The next piece of the reply."""
        ...

    def reason(self, piece: str) -> None:
        """The next piece of what the agent thinks."""
        ...

    def note(self, line: str) -> None:
        """A line about a step or a tool, in the reply."""
        ...

    def status(self, text: str, trouble: bool = False, since: float | None = None) -> None:
        """What the reply waits for; ``since`` that time of the monotonic clock."""
        ...


class PlainDisplay:
    """The conversation on standard output, byte by byte as it was said; everything else on standard error."""

    def __init__(self) -> None:
        self._safe = sys.stdout.isatty()
        self._at_line_start = True
        self._thought = ""

    def said(self, text: str) -> None:
        """A line that begins as a prompt does."""
        self.write(f"{PROMPT}{text}\n")

    def notice(self, text: str) -> None:
        """Lines on standard error."""
        self._end_thought()
        self._tell(text)

    def question(self, text: str) -> None:
        """Lines on standard error, as any notice."""
        self.notice(text)

    @contextlib.contextmanager
    def reply(self) -> Iterator[None]:
        """Ends with the end of a line."""
        try:
            yield
        finally:
            self.write("\n")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """It never moves by itself."""
        self._end_thought()
        yield

    def write(self, piece: str) -> None:
        """At once, since a pipe's reader waits for it."""
        self._end_thought()
        sys.stdout.write(harmless(piece) if self._safe else piece)
        sys.stdout.flush()
        self._at_line_start = piece.endswith("\n") if piece else self._at_line_start

    def reason(self, piece: str) -> None:
        """Whole lines on standard error."""
        *lines, self._thought = (self._thought + piece).split("\n")
        for line in lines:
            self._tell(f"reasoning: {line}")

    def note(self, line: str) -> None:
        """A line on standard error."""
        self.notice(line)

    def status(self, text: str, trouble: bool = False, since: float | None = None) -> None:
        """Only troubles are worth a line."""
        if trouble:
            self.notice(text)

    def _end_thought(self) -> None:
        if self._thought:
            self._thought, line = "", self._thought
            self._tell(f"reasoning: {line}")

    def _tell(self, text: str) -> None:
        if self._safe and not self._at_line_start:  # Both go to one terminal.
            sys.stdout.write("\n")
            sys.stdout.flush()
            self._at_line_start = True
        sys.stderr.write(harmless(text) + "\n")
        sys.stderr.flush()

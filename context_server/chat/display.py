"""How a conversation is shown: growing in place on a terminal, or as plain text."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Protocol

from rich.cells import chop_cells
from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from context_server.chat.keyboard import PROMPT

# What an agent wrote must not steer the terminal: control characters are shown as U+FFFD.
_CONTROLS = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)], "\N{REPLACEMENT CHARACTER}")
_HARMLESS = str.maketrans(_CONTROLS | {ord("\n"): "\n", ord("\t"): "    ", ord("\r"): None})


class Display(Protocol):
    """Where the conversation is shown."""

    def said(self, text: str) -> None:
        """What the user said earlier."""
        ...

    def notice(self, text: str) -> None:
        """A line of the chat's own."""
        ...

    def reply(self) -> contextlib.AbstractContextManager[None]:
        """A reply is shown inside."""
        ...

    def write(self, piece: str) -> None:
        """The next piece of the reply."""
        ...

    def status(self, text: str, trouble: bool = False) -> None:
        """What the reply waits for."""
        ...


class PlainDisplay:
    """The conversation on standard output, byte by byte as it was said; notices and troubles on standard error."""

    def __init__(self) -> None:
        self._safe = sys.stdout.isatty()

    def said(self, text: str) -> None:
        """A line that begins as a prompt does."""
        self.write(f"{PROMPT}{text}\n")

    def notice(self, text: str) -> None:
        """A line on standard error."""
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    @contextlib.contextmanager
    def reply(self) -> Iterator[None]:
        """Ends with the end of a line."""
        try:
            yield
        finally:
            self.write("\n")

    def write(self, piece: str) -> None:
        """At once, since a pipe's reader waits for it."""
        sys.stdout.write(piece.translate(_HARMLESS) if self._safe else piece)
        sys.stdout.flush()

    def status(self, text: str, trouble: bool = False) -> None:
        """Only troubles are worth a line."""
        if trouble:
            self.notice(text)


class TerminalDisplay:
    """The reply as it grows: whole rows are printed for good, the last row and the state are drawn again and again."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._spinner = Spinner("dots", style="dim")
        self._row = ""

    def said(self, text: str) -> None:
        """As it looked when it was typed."""
        self._console.print(Text(PROMPT + text.translate(_HARMLESS), style="bold"))

    def notice(self, text: str) -> None:
        """A dim line."""
        self._console.print(Text(text, style="dim"), soft_wrap=True)  # A command stays whole for copying.

    @contextlib.contextmanager
    def reply(self) -> Iterator[None]:
        """The row that grows and the state below it are there only inside."""
        self._row = ""
        self.status("")
        live = Live(console=self._console, get_renderable=self._drawn, transient=True, refresh_per_second=12)
        try:
            with live:
                yield
        finally:
            if self._row:
                self._console.print(Text(self._row))
            self._row = ""

    def write(self, piece: str) -> None:
        """Prints the rows that are full; a row breaks at its last space, as long as it has one."""
        *lines, self._row = (self._row + piece.translate(_HARMLESS)).split("\n")
        rows = [row for line in lines for row in _rows(line, self._console.width)]
        *full, self._row = _rows(self._row, self._console.width)
        if rows or full:
            self._console.print(Text("\n".join(rows + full)), soft_wrap=True)

    def status(self, text: str, trouble: bool = False) -> None:
        """Beside a spinner."""
        self._spinner.update(text=Text(text, style="yellow" if trouble else "dim"))

    def _drawn(self) -> Group | Spinner:
        return Group(Text(self._row), self._spinner) if self._row else self._spinner


def _rows(line: str, width: int) -> list[str]:
    """``line`` in rows of at most ``width`` cells; the space at which a row breaks is on neither."""
    rows: list[str] = []
    while True:
        fitting = (chop_cells(line[: width + 1], width) or [""])[0]
        if len(fitting) == len(line):
            return [*rows, line]
        space = line.rfind(" ", 0, len(fitting) + 1)
        rows.append(line[:space] if space > 0 else fitting)
        line = line[space + 1 :] if space > 0 else line[len(fitting) :]

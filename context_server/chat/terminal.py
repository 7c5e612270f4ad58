"""A conversation on a terminal: the reply grows in place, with its state below it."""

import contextlib
import time
from collections.abc import Iterator

from rich.cells import chop_cells
from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from context_server.chat.keyboard import PROMPT
from context_server.chat.wording import harmless

SAID = ""
THOUGHT = "dim italic"
REDRAWN_PER_SECOND = 12


class TerminalDisplay:
    """The reply as it grows: whole rows are printed for good, the last row and the state are drawn again and again."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._spinner = Spinner("dots", style="dim")
        self._live: Live | None = None
        self._row = ""
        self._style = SAID
        self._status = ""
        self._status_style = "dim"
        self._since: float | None = None

    def said(self, text: str) -> None:
        """As it looked when it was typed."""
        self._console.print(Text(PROMPT + harmless(text), style="bold"))

    def notice(self, text: str) -> None:
        """Dim lines."""
        self._end_row()
        self._console.print(Text(harmless(text), style="dim"), soft_wrap=True)  # A command stays whole for copying.

    def question(self, text: str) -> None:
        """As bright as it gets: it must not be overlooked."""
        self._end_row()
        self._console.print(Text(harmless(text), style="bold"), soft_wrap=True)

    @contextlib.contextmanager
    def reply(self) -> Iterator[None]:
        """The row that grows and the state below it are there only inside."""
        self._row, self._style = "", SAID
        self.status("")
        try:
            with self._drawing():
                yield
        finally:
            self._end_row()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is drawn inside."""
        self._end_row()
        live, self._live = self._live, None
        if live is None:
            yield
            return
        live.stop()
        yield
        self._live = self._new_live()
        self._live.start()

    def write(self, piece: str) -> None:
        """Prints the rows that are full; a row breaks at its last space, as long as it has one."""
        self._grow(piece, SAID)

    def reason(self, piece: str) -> None:
        """The same, dim."""
        self._grow(piece, THOUGHT)

    def note(self, line: str) -> None:
        """A dim row, cut where the terminal ends."""
        self._end_row()
        self._console.print(Text(harmless(line), style="dim"), no_wrap=True, overflow="ellipsis")

    def status(self, text: str, trouble: bool = False, since: float | None = None) -> None:
        """Beside a spinner, with the seconds that it has lasted."""
        self._status, self._since = text, since
        self._status_style = "yellow" if trouble else "dim"

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        self._live = self._new_live()
        self._live.start()
        try:
            yield
        finally:
            if self._live is not None:
                self._live.stop()
            self._live = None

    def _new_live(self) -> Live:
        return Live(
            console=self._console,
            get_renderable=self._drawn,
            transient=True,
            refresh_per_second=REDRAWN_PER_SECOND,
        )

    def _grow(self, piece: str, style: str) -> None:
        if style != self._style:
            self._end_row()
            self._style = style
        *lines, self._row = (self._row + harmless(piece)).split("\n")
        rows = [row for line in lines for row in _rows(line, self._console.width)]
        *full, self._row = _rows(self._row, self._console.width)
        if rows or full:
            self._console.print(Text("\n".join(rows + full), style=style), soft_wrap=True)

    def _end_row(self) -> None:
        if self._row:
            self._row, row = "", self._row
            self._console.print(Text(row, style=self._style))

    def _drawn(self) -> Group | Spinner:
        lasted = "" if self._since is None else f" {time.monotonic() - self._since:.0f} s"
        room = max(10, self._console.width - len(lasted) - 3)
        shown = self._status if len(self._status) <= room else self._status[: room - 1] + "…"
        self._spinner.update(text=Text(harmless(shown) + lasted, style=self._status_style))
        return Group(Text(self._row, style=self._style), self._spinner) if self._row else self._spinner


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

"""What wakes a follow: the signals of its context, listened to by a task of its own.

The reader pulls; the watch only says when. Its whole state is how far a signal said that the log reaches since the last
pull began, and whether a pull is wished for without a number. Whatever happens while a pull is under way is kept for
the next one, and signals that a pull has overtaken cost nothing.
"""

import asyncio
import contextlib
from collections.abc import Callable, MutableSet
from types import TracebackType
from typing import Self

from context_server.client.connection import Connection, ConnectionListener
from context_server.client.errors import ClientError
from context_server.client.records import Signal

SignalListener = Callable[[Signal], None]


class Watch:
    """The signals of one context for the follower of one message; ``async with`` owns the task that listens.

    It is in ``open_watches`` as long as that task lives.
    """

    def __init__(
        self,
        connection: Connection,
        stream_path: str,
        message_id: str,
        on_signal: SignalListener | None,
        on_connection: ConnectionListener | None,
        open_watches: "MutableSet[Watch]",
    ) -> None:
        self._connection = connection
        self._stream_path = stream_path
        self._message_id = message_id
        self._on_signal = on_signal
        self._on_connection = on_connection
        self._open_watches = open_watches
        self._changed = asyncio.Event()
        self._connected: bool | None = None  # None: the first attempt is under way.
        self._target = 0
        self._wished = True

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._listen(), name=f"signals for {self._message_id}")
        self._open_watches.add(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the task and its connection; more than once is fine."""
        self._open_watches.discard(self)
        self._task.cancel()
        await asyncio.wait({self._task})

    def begin_pull(self) -> bool:
        """Forgets what was wished for, since the pull that begins now answers it.

        True when that pull should wait for news itself, because no signal would tell.
        """
        should_wait = self._connected is False and not self._wished
        self._wished = False
        self._target = 0
        return should_wait

    async def until_more_than(self, held: int) -> None:
        """Returns when a pull after ``held`` may bring something, or when there are no signals to wait for."""
        while not (self._wished or self._target > held or self._connected is False):
            self._changed.clear()
            await self._changed.wait()
        if self._task.done() and not self._task.cancelled():
            self._task.result()  # What a listener of the caller's raised, it wants to see.

    async def _listen(self) -> None:
        try:
            signals = self._connection.signals(
                self._stream_path, give_up_seconds=float("inf"), on_connection=self._note_connection
            )
            async with contextlib.aclosing(signals):
                async for signal in signals:
                    self._note(signal)
                    if self._on_signal is not None:
                        self._on_signal(signal)
        except ClientError:
            pass  # The stream is refused for good: without signals the pulls wait, and meet the reason themselves.
        finally:
            self._connected = False
            self._changed.set()

    def _note_connection(self, connected: bool) -> None:
        if self._on_connection is not None and connected is not self._connected:
            self._on_connection(connected)
        self._connected = connected
        self._wished = self._wished or connected  # What was signalled while nobody listened is to be pulled.
        self._changed.set()

    def _note(self, signal: Signal) -> None:
        ours = signal.message_id == self._message_id
        match signal.type:
            case "content_delta" if ours:
                self._target = max(self._target, signal.current_sequence or 0)
            case "message_completed" if ours:
                self._wished = True
            case "context_deleted":
                self._wished = True
            case "heartbeat" if signal.heads is not None:
                heads = [head for head in signal.heads if head.get("message_id") == self._message_id]
                self._wished = self._wished or not heads  # It has ended, and the signal of that was lost.
                self._target = max([self._target, *(int(head.get("current_sequence", 0)) for head in heads)])
        self._changed.set()

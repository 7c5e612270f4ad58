"""A network that can be broken: TCP from a free port to another, which a trial cuts, stalls, delays and mends.

It has an event loop in a thread of its own, so that it goes on whatever the trial waits for, and so that a trial that
is not asynchronous may use it too.
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from types import TracebackType
from typing import Self

HOST = "127.0.0.1"
_PIECE_BYTES = 65_536
_MAX_PIECES = 256
_RESET_AT_CLOSE = struct.pack("ii", 1, 0)


class Network(Enum):
    """What happens to connections."""

    WHOLE = "whole"
    CUT = "cut"
    """Nothing arrives and nobody is told; new connections open and stay silent. What was sent arrives once it is whole
    again, as when TCP sends lost packets once more."""
    REFUSING = "refusing"
    """Every connection is reset, and every new one."""


class Proxy:
    """Forwards ``port`` to ``target_port``; use it with ``with``. Its methods may be called from any thread."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy")
        self._links: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._network = Network.WHOLE
        self._whole = asyncio.Event()
        self._whole.set()
        self._answer_delay = 0.0
        self._losing: bytes | None = None
        self._server: asyncio.Server | None = None
        self.port = 0
        self.connections = 0
        """How many were ever opened."""

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._accept, HOST, 0), self._loop
        ).result()
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def mend(self) -> None:
        """Forwards again, first of all what was held back."""
        self._call(lambda: self._become(Network.WHOLE))

    def cut(self) -> None:
        """Lets nothing pass in either direction, without a word to anybody."""
        self._call(lambda: self._become(Network.CUT))

    def refuse(self) -> None:
        """Resets every connection, and every new one."""
        self._call(lambda: self._become(Network.REFUSING))

    def reset(self) -> None:
        """Resets the connections that are open; new ones may be opened."""
        self._call(self._reset)

    def delay_answers(self, seconds: float) -> None:
        """Has all that the target says arrive later from now on; what is under way at a reset never arrives."""
        self._call(lambda: setattr(self, "_answer_delay", seconds))

    def lose_answers_to(self, request: bytes) -> None:
        """Has every connection that from now on carries this request carry no answer any more, until it is reset."""
        self._call(lambda: setattr(self, "_losing", request))

    def lose_nothing(self) -> None:
        """Has connections carry all answers again, but for those that have lost one."""
        self._call(lambda: setattr(self, "_losing", None))

    def _call(self, change: Callable[[], None]) -> None:
        """Changes something in the loop's thread; it has happened when this returns."""

        async def work() -> None:
            change()

        asyncio.run_coroutine_threadsafe(work(), self._loop).result()

    def _become(self, network: Network) -> None:
        self._network = network
        if network is Network.CUT:
            self._whole.clear()
            return
        if network is Network.REFUSING:
            self._reset()
        self._whole.set()

    def _reset(self) -> None:
        for task in self._links:
            task.cancel()
        for writer in self._writers:
            _reset(writer)

    async def _close(self) -> None:
        assert self._server is not None
        self._server.close()
        self._reset()
        await asyncio.gather(*self._links, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self._network is Network.REFUSING:
            _reset(writer)
            return
        self._writers.add(writer)
        task = asyncio.ensure_future(self._link(reader, writer))
        self._links.add(task)
        task.add_done_callback(self._links.discard)

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from its first byte to its last."""
        far: asyncio.StreamWriter | None = None
        try:
            await self._whole.wait()
            with suppress(OSError):
                far_reader, far = await asyncio.open_connection(HOST, self._target_port)
                self._writers.add(far)
                deaf = asyncio.Event()
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._forward(reader, far, deaf, answers=False))
                    both.create_task(self._forward(far_reader, writer, deaf, answers=True))
        except* OSError:
            pass  # One side broke; the other shall see a break too.
        finally:
            for side in (writer, far):
                if side is not None:
                    self._writers.discard(side)
                    _reset(side)

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, deaf: asyncio.Event, *, answers: bool
    ) -> None:
        """One direction; each piece arrives when it is due, however many are under way.

        ``deaf`` is set by a request whose answer is to be lost, and has all further answers dropped.
        """
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_MAX_PIECES)
        async with asyncio.TaskGroup() as both:
            both.create_task(self._deliver(under_way, writer))
            piece = b"?"
            while piece:
                piece = await reader.read(_PIECE_BYTES)
                if answers and deaf.is_set() and piece:
                    continue
                if not answers and self._losing is not None and self._losing in piece:
                    deaf.set()
                due = self._loop.time() + (self._answer_delay if answers else 0.0)
                await under_way.put((due, piece))

    async def _deliver(self, under_way: "asyncio.Queue[tuple[float, bytes]]", writer: asyncio.StreamWriter) -> None:
        while True:
            due, piece = await under_way.get()
            if (early := due - self._loop.time()) > 0:
                await asyncio.sleep(early)
            await self._whole.wait()
            if not piece:
                writer.write_eof()
                return
            writer.write(piece)
            await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Closes a connection so that the other side sees a reset."""
    connection = writer.get_extra_info("socket")
    if connection is not None and not writer.transport.is_closing():
        with suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
    writer.transport.abort()

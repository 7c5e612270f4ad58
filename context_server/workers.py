"""Several processes on one port: a supervisor starts them, replaces those that die, and ends when all have ended.

1. A worker is a fresh interpreter. A fork would copy locks that other threads hold, and buffers half written.
2. Each worker has a listening socket of its own on the one port (``SO_REUSEPORT``), among which the kernel deals
   connections out evenly. From one socket that all inherit, whoever wakes first takes them: of 100 connections to three
   workers one got 78 and another 3. The supervisor holds the sockets open too. So a connection that waits at a worker
   that dies is not lost: it is accepted by the successor.
3. A pair of connected sockets, the channel, joins each worker with the supervisor. Down goes what the worker is to do,
   up goes that it is ready, or why it cannot begin. It closes when the supervisor is gone, however that ended, and then
   the worker ends at once: it would hold the port that the next supervisor needs.
4. Each worker has a session of its own, so that Ctrl-C reaches the supervisor alone, which passes it on.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from context_server.errors import WorkerNotStarted
from context_server.metrics import forget_worker

log = structlog.get_logger("context_server.workers")

EXIT_STORAGE_BROKEN = 70
STEADY_SECONDS = 10.0
"""A worker that served for less has had a short life; after the second one in a row, the next has to wait."""
FIRST_PAUSE_SECONDS = 1.0
"""The rest after two short lives in a row; each further one doubles it."""
LONGEST_PAUSE_SECONDS = 30.0
BROKEN_LIVES = 3
"""After so many short lives in a row that a broken storage ended, nobody believes in the next."""
LAST_WORDS_SECONDS = 1.0
"""Time to read what a dead worker has written; a process that it left behind may hold its end open for ever."""
_READY = b"ready\n"
_FAILED = b"failed "
_ABANDONED = 1
_MEMORY = Path("/dev/shm")  # noqa: S108  # The directory that is made there has a name of its own, and is private.
_MEMORY_BYTES = 16_777_216


@contextlib.contextmanager
def values_directory() -> Iterator[Path]:
    """A directory for the workers' metrics, gone afterwards: in memory where there is room.

    The files are mapped, and a write to a mapped file waits while a busy disk takes its page: the event loop would.
    """
    parent = None
    with contextlib.suppress(OSError):
        if os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free >= _MEMORY_BYTES:
            parent = _MEMORY
    with tempfile.TemporaryDirectory(prefix="context-server-", dir=parent, ignore_cleanup_errors=True) as name:
        yield Path(name)


# The worker's side


class Assignment:
    """What a worker was started for: its number, its settings, its socket, and the channel to its supervisor."""

    def __init__(self, channel: int, listener: int) -> None:
        """Takes over two inherited descriptors, and waits for what the supervisor says on the first."""
        self._channel = _owned(channel)
        self.listener = _owned(listener)
        with self._channel.makefile("rb") as lines:
            orders = lines.readline()
        if not orders:
            os._exit(_ABANDONED)
        given = json.loads(orders)
        self.number: int = given["number"]
        self.settings: dict[str, Any] = given["settings"]
        self.values = Path(given["values"])
        """The directory of every worker's metrics."""

    def watch(self) -> None:
        """From here on the process ends with its supervisor."""
        threading.Thread(target=self._end_when_alone, name="context-server-watch", daemon=True).start()

    def _end_when_alone(self) -> None:
        with contextlib.suppress(OSError):
            self._channel.recv(1)
        shutil.rmtree(self.values, ignore_errors=True)  # The supervisor cannot any more.
        os._exit(_ABANDONED)

    def ready(self) -> None:
        """Tells the supervisor that this worker serves."""
        self._channel.sendall(_READY)

    def failed(self, reason: str) -> None:
        """Tells the supervisor why this worker cannot begin, in one line."""
        self._channel.sendall(_FAILED + " ".join(reason.split()).encode() + b"\n")


def _owned(descriptor: int) -> socket.socket:
    """An inherited socket, which processes that an agent starts do not inherit in turn."""
    os.set_inheritable(descriptor, False)
    return socket.socket(fileno=descriptor)


# The supervisor's side


@dataclass(slots=True)
class Place:
    """One worker's place: who holds it now, and the socket that stays when its holder changes."""

    number: int
    listener: socket.socket
    process: subprocess.Popen[bytes] | None = None
    ready_since: float | None = None
    reason: str | None = None
    """Why the last holder could not begin, by its own words."""

    def send(self, number: int) -> None:
        """Sends a signal, if the place is held. Who is not ready yet has nothing to finish, and knows only SIGTERM."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM if self.ready_since is None else number)


class Supervisor:
    """Keeps as many workers as there are listeners; ``await supervisor.run()`` until SIGTERM or SIGINT ends them.

    ``program`` is the command line of a worker, to which two descriptors are added. ``listen_again`` opens one more
    socket on the port. ``patience_seconds`` is how long workers may take to stop; those that take longer are killed.
    ``on_ready`` is called once, when every worker serves.
    """

    def __init__(
        self,
        program: Sequence[str],
        listeners: Sequence[socket.socket],
        *,
        settings: Mapping[str, Any],
        values: Path,
        listen_again: Callable[[], socket.socket],
        patience_seconds: float,
        on_ready: Callable[[], None],
    ) -> None:
        self._program = program
        self._places = [Place(number, listener) for number, listener in enumerate(listeners, start=1)]
        self._settings = settings
        self._values = values
        self._listen_again = listen_again
        self._patience_seconds = patience_seconds
        self._on_ready = on_ready
        self._complete = False
        self._stopping = asyncio.Event()
        self._failure: WorkerNotStarted | None = None
        self._code = 0

    async def run(self) -> int:
        """The exit code of them all, once every worker has ended.

        Raises:
            WorkerNotStarted: a worker could not begin, before all of them served; the others were stopped.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop, number)
        async with asyncio.TaskGroup() as group:
            for place in self._places:
                group.create_task(self._keep(place))
        if self._failure is not None:
            raise self._failure
        return self._code

    def _stop(self, number: int) -> None:
        """Passes a signal on, and gives the workers a while to end. A second SIGINT has them end at once."""
        if not self._stopping.is_set():
            self._stopping.set()
            asyncio.get_running_loop().call_later(self._patience_seconds, self._kill)
        for place in self._places:
            place.send(number)

    def _kill(self) -> None:
        for place in self._places:
            if place.process is not None and place.process.returncode is None:
                log.error("worker_killed", worker=place.number, pid=place.process.pid)
                place.process.kill()

    async def _keep(self, place: Place) -> None:
        """Keeps a place held until everything stops."""
        short_lives = 0
        while not self._stopping.is_set():
            code = await self._live(place)
            lived = 0.0 if place.ready_since is None else time.monotonic() - place.ready_since
            place.process = place.ready_since = None
            forget_worker(self._values, place.number)
            short_lives = short_lives + 1 if lived < STEADY_SECONDS else 0
            if code == EXIT_STORAGE_BROKEN and (self._stopping.is_set() or short_lives >= BROKEN_LIVES):
                self._code = code
                self._stop(signal.SIGTERM)
            if not self._stopping.is_set():
                await self._replace(place, code, short_lives)

    async def _replace(self, place: Place, code: int, short_lives: int) -> None:
        """Says how a worker ended, and rests before the next; while all are starting, it gives up instead."""
        if not self._complete:
            reason = place.reason or f"worker {place.number} {how_it_ended(code)} before it was ready"
            self._failure = self._failure or WorkerNotStarted(reason)
            self._stop(signal.SIGTERM)
            return
        pause = min(FIRST_PAUSE_SECONDS * 2 ** (short_lives - 2), LONGEST_PAUSE_SECONDS) if short_lives > 1 else 0.0
        if place.reason is not None:
            log.warning("worker_not_started", worker=place.number, reason=place.reason, next_in_seconds=pause)
        else:
            log.warning("worker_died", worker=place.number, how=how_it_ended(code), next_in_seconds=pause)
        await self._rest(place, pause)

    async def _rest(self, place: Place, pause: float) -> None:
        """Waits, with the place's socket closed if others serve: whoever comes meanwhile gets to them."""
        if pause and any(other.ready_since is not None for other in self._places):
            place.listener.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await self._stopping.wait()
        if place.listener.fileno() < 0 and not self._stopping.is_set():
            place.listener = self._listen_again()

    async def _live(self, place: Place) -> int:
        """Starts a worker in its place, and waits until it has ended; its exit code, or minus a signal."""
        place.reason = None
        ours, theirs = socket.socketpair()
        with theirs:
            descriptors = (theirs.fileno(), place.listener.fileno())
            try:
                place.process = process = subprocess.Popen(  # noqa: ASYNC220, S603  # It takes no time; it is ours.
                    [*self._program, *map(str, descriptors)],
                    pass_fds=descriptors,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except OSError as error:  # No memory, or too many processes: later there may be room.
                place.reason = f"no process could be started: {error.strerror}"
                ours.close()
                return _ABANDONED
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        orders = {"number": place.number, "settings": self._settings, "values": str(self._values)}
        writer.write(json.dumps(orders).encode() + b"\n")
        hearing = asyncio.ensure_future(self._hear(place, process, reader))
        try:
            code = await exit_code(process)
            await asyncio.wait({hearing}, timeout=LAST_WORDS_SECONDS)
        finally:
            hearing.cancel()
            writer.close()  # Should the supervisor fail, its workers end by this.
        return code

    async def _hear(self, place: Place, process: "subprocess.Popen[bytes]", reader: asyncio.StreamReader) -> None:
        """Listens to what a worker says, until it is gone."""
        with contextlib.suppress(ConnectionError):  # It went without reading what it was to do.
            async for line in reader:
                if line == _READY:
                    place.ready_since = time.monotonic()
                    log.info("worker_ready", worker=place.number, pid=process.pid)
                    self._see_whether_all_are_ready()
                elif line.startswith(_FAILED):
                    place.reason = line.removeprefix(_FAILED).decode().strip()

    def _see_whether_all_are_ready(self) -> None:
        if not self._complete and all(place.ready_since is not None for place in self._places):
            self._complete = True
            self._on_ready()


async def exit_code(process: "subprocess.Popen[bytes]") -> int:
    """Waits for a process to end, in a thread: asyncio's way loses the code of one that gets a signal as it ends."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def tell(code: int) -> None:
        if not ended.done():
            ended.set_result(code)

    def wait() -> None:
        code = process.wait()
        with contextlib.suppress(RuntimeError):  # The loop is closed: nobody waits any more.
            loop.call_soon_threadsafe(tell, code)

    threading.Thread(target=wait, name="context-server-wait", daemon=True).start()
    return await ended


def how_it_ended(code: int) -> str:
    """``ended with exit code 1``, ``was ended by SIGKILL``."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"

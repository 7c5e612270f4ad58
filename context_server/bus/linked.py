"""The bus of a node among several: one connection to a server that carries packets, made again whenever it breaks.

A connection may be deaf without being broken: a pooler gives it another backend for each transaction, a network drops
packets without a word, a client library reconnects without its subscriptions. Only hearing oneself proves that it
hears. So each new connection begins with a ping, which comes back by the way that the wake-ups of others come; when
nothing of its own has come back for a while the bus pings again, and in the end takes another connection.
"""

import asyncio
import random
import secrets
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import structlog

from context_server.bus.contract import BusState, Listener
from context_server.bus.line import Connection, Ears, Line
from context_server.bus.listeners import Listeners
from context_server.bus.outbox import Outbox
from context_server.bus.packets import Gap, Item, Malformed, Ping, encode_item, head_of, pack, unpack
from context_server.bus.wakeups import WakeUp
from context_server.metrics import Metrics

log = structlog.get_logger("context_server.bus")

_PART = 500
"""Items encoded and sent at once: a millisecond of the event loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How patient a bus is, in seconds."""

    rest: float = 0.01
    """Between two sends, so that more is merged into one when much moves; the first does not wait."""
    ping: float = 3.0
    """Without hearing itself for so long it pings."""
    deaf: float = 10.0
    """Without hearing itself for so long it takes another connection."""
    connect: float = 2.5
    """For one attempt to connect: with the longest rest between attempts, less than the 5 s after a server's return."""
    first_retry: float = 0.1
    last_retry: float = 2.0
    start: float = 2.0
    """How long opening waits to hear itself before it goes on without."""
    flush: float = 1.0
    """How long closing waits for what has to be sent."""


class Deaf(Exception):
    """The connection is there, and nothing of its own came back over it."""


class LinkedBus:
    """A bus over a ``Line``."""

    def __init__(self, line: Line, metrics: Metrics, timing: Timing) -> None:
        self.kind = line.kind
        self.state = BusState.POLLING
        self._line = line
        self._timing = timing
        # For each bus anew: what an earlier process sent is not ours, whatever its node was called.
        self._node = secrets.token_hex(8)
        self._own = head_of(self._node)
        self._listeners = Listeners()
        self._outbox = Outbox()
        self._open = False
        self._ping = Ping("")
        self._echoed_at = 0.0
        self._lost_at: float | None = None
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._tried = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._sent = metrics.wake_ups_sent.labels(self.kind)
        self._received = metrics.wake_ups_received.labels(self.kind)
        self._dropped = {
            reason: metrics.wake_ups_dropped.labels(self.kind, reason)
            for reason in ("disconnected", "overflow", "unsendable", "malformed")
        }
        self._reconnects = metrics.bus_reconnects.labels(self.kind)
        self._connected = metrics.bus_connected.labels(self.kind)
        self._connected.set(0)

    async def __aenter__(self) -> Self:
        """Connects in the background; returns when it hears itself, or the first attempt has failed, or time is up."""
        self._task = asyncio.create_task(self._keep_connected(), name=f"bus {self.kind}")
        with suppress(TimeoutError):
            async with asyncio.timeout(self._timing.start):
                await self._tried.wait()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Sends what waits, within ``flush``, and closes."""
        if self._task is None:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(self._timing.flush):
                if self._open:
                    await self._idle.wait()
        self._task.cancel()
        await asyncio.wait({self._task})
        self._become(BusState.POLLING)

    # What the rooms call

    def publish(self, wake_up: WakeUp) -> None:
        """Tells this node's listeners, and has it sent, or dropped while there is no connection."""
        self._listeners.tell(wake_up, remote=False)
        if lost := self._outbox.put(wake_up):
            self._dropped["overflow"].inc(lost)
        if not self._open:
            self._dropped["disconnected"].inc(self._outbox.lose())
            return
        self._idle.clear()
        self._work.set()

    def subscribe(self, listener: Listener) -> None:
        """Adds a listener for the life of the bus."""
        self._listeners.subscribe(listener)

    def on_gap(self, listener: Callable[[], None]) -> None:
        """Adds a listener of gaps for the life of the bus."""
        self._listeners.on_gap(listener)

    def follow(self, context_id: str) -> None:
        """See ``Bus.follow``."""
        self._line.follow(context_id)

    def unfollow(self, context_id: str) -> None:
        """See ``Bus.unfollow``."""
        self._line.unfollow(context_id)

    def follow_all(self) -> None:
        """See ``Bus.follow_all``."""
        self._line.follow_all()

    def unfollow_all(self) -> None:
        """See ``Bus.unfollow_all``."""
        self._line.unfollow_all()

    # The connection

    async def _keep_connected(self) -> None:
        """One connection after another, at growing distances as long as none is heard."""
        retry = self._timing.first_retry
        while True:
            try:
                await self._connect_and_use()
            except Exception as error:
                if self.state is BusState.CONNECTED:
                    retry = self._timing.first_retry
                self._lose(type(error).__name__)
            # Jitter: the nodes lose a server all at once, and shall not all come back at once.
            await asyncio.sleep(retry * random.uniform(0.5, 1.0))  # noqa: S311  # It spreads, it hides nothing.
            retry = min(2 * retry, self._timing.last_retry)

    async def _connect_and_use(self) -> None:
        """Returns never: raises why the connection was not made, or broke."""
        ears = Ears(hear=self._hear, miss=self._listeners.tell_gap)
        connection = await self._line.connect(self._node, ears)
        self._echoed_at = asyncio.get_running_loop().time()
        self._ping = Ping(secrets.token_hex(4))
        self._outbox.ping(self._ping)
        self._work.set()
        self._open = True
        works = (*connection.works(), self._send_forever(connection), self._watch())
        try:
            await _until_one_ends(works, connection)
        finally:
            self._open = False
            self._idle.set()
            self._dropped["disconnected"].inc(self._outbox.lose())

    async def _watch(self) -> None:
        """Pings when nothing was heard for a while.

        Raises:
            Deaf: nothing was heard for too long.
        """
        clock = asyncio.get_running_loop().time
        silence = 0.0
        while True:
            await asyncio.sleep(min(self._timing.ping, self._timing.deaf - silence))
            silence = clock() - self._echoed_at
            if silence >= self._timing.deaf:
                raise Deaf
            if silence >= self._timing.ping:
                self._outbox.ping(self._ping)
                self._work.set()

    def _lose(self, reason: str) -> None:
        self._tried.set()
        self._become(BusState.POLLING)
        if self._lost_at is None:
            self._lost_at = asyncio.get_running_loop().time()
            log.warning("bus_lost", bus=self.kind, reason=reason)

    def _regain(self) -> None:
        """The connection hears: what was said before is to be read."""
        self._become(BusState.CONNECTED)
        self._tried.set()
        if self._lost_at is not None:
            seconds = asyncio.get_running_loop().time() - self._lost_at
            self._lost_at = None
            self._reconnects.inc()
            log.info("bus_regained", bus=self.kind, seconds=round(seconds, 1))
        self._listeners.tell_gap()

    def _become(self, state: BusState) -> None:
        self.state = state
        self._connected.set(state is BusState.CONNECTED)

    # Hearing

    def _hear(self, packet: str) -> None:
        """Takes whatever stands on the channel; never raises."""
        if packet.startswith(self._own):
            if self._open and encode_item(self._ping) in packet:
                self._echoed_at = asyncio.get_running_loop().time()
                if self.state is not BusState.CONNECTED:
                    self._regain()
            return
        try:
            items = unpack(packet)
        except Malformed:
            self._dropped["malformed"].inc()
            return
        for item in items:
            if isinstance(item, Gap):
                self._listeners.tell_gap()
            elif not isinstance(item, Ping):
                self._received.inc()
                self._listeners.tell(item, remote=True)

    # Sending

    async def _send_forever(self, connection: Connection) -> None:
        """The only one who sends; while it does, what comes is merged."""
        while True:
            await self._work.wait()
            self._work.clear()
            items = self._outbox.take()
            for begin in range(0, len(items), _PART):
                try:
                    await self._send(connection, items[begin : begin + _PART])
                except BaseException:
                    # Whether they were sent is not known. Now they are lost with what else waits.
                    self._outbox.put_back(items[begin:])
                    raise
            if not self._outbox:
                self._idle.set()
            await asyncio.sleep(self._timing.rest)

    async def _send(self, connection: Connection, items: list[Item]) -> None:
        channels: dict[str, list[str]] = {}
        wake_ups = 0
        for item in items:
            try:
                encoded = encode_item(item)
            except Exception:  # Whatever is wrong with one wake-up, the others are to be sent.
                self._dropped["unsendable"].inc()
                continue
            channels.setdefault(connection.channel_of(item), []).append(encoded)
            wake_ups += not isinstance(item, Gap | Ping)
        packets = [(channel, packet) for channel, said in channels.items() for packet in pack(self._node, said)]
        await connection.send(packets)
        self._sent.inc(wake_ups)


async def _until_one_ends(works: tuple[Coroutine[Any, Any, None], ...], connection: Connection) -> None:
    """Runs all until one ends, then closes the connection and ends the others.

    Raises:
        Exception: what the first one raised.
        ConnectionError: it just returned.
    """
    tasks = [asyncio.create_task(work) for work in works]
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        # Before the tasks are cancelled: asyncpg answers a cancelled command by connecting to a server that may hang.
        await connection.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await connection.close()
    for task in ended:
        task.result()
    raise ConnectionError

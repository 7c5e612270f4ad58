"""Two nodes in one process, on one store and a bus of the test's own, each with the rooms that follow the other.

The bus loses what it is told to lose. A node has no runner: a test writes replies in place of an agent.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from context_server.bus import BusState, Listener, Moved, WakeUp
from context_server.commands import Commands
from context_server.hub import Hub, put_snapshot
from context_server.ledger import Ledger
from context_server.mailbox import Mailbox, Pacing
from context_server.metrics import Metrics
from context_server.reader import Reader
from context_server.recent import RecentChunks
from context_server.records import ChunkKind, Delta, Outcome, Page, Receipt, Run, Signal
from context_server.relay import Relay, RelayLimits
from context_server.reply import OpenReply
from context_server.store import Store
from context_server.store.exchanges import Post
from context_server.store.reading import Subscription
from tests.unit.rooms import DEADLINE_SECONDS, OWNER, ledger_limits

QUICK = RelayLimits(distance=0.001, distance_per_signal=0.0, max_distance=0.001)
"""Without a distance between reads to wait for."""


class Wire:
    """Carries wake-ups between the buses of two nodes, unless it is cut."""

    def __init__(self) -> None:
        self.ends: list[LinkedBus] = []
        self.is_cut = False

    def carry(self, sender: "LinkedBus", wake_up: WakeUp) -> None:
        if self.is_cut:
            return
        for end in self.ends:
            if end is not sender:
                asyncio.get_running_loop().call_soon(end.tell, wake_up)


class LinkedBus:
    """One end of a wire. It counts interest, and hands on only what somebody is interested in, as some buses do."""

    kind = "wire"

    def __init__(self, wire: Wire) -> None:
        self.state = BusState.CONNECTED
        self.followed: dict[str, int] = {}
        self.followed_all = 0
        self.heard: list[WakeUp] = []
        self._wire = wire
        self._listeners: list[Listener] = []
        self._gap_listeners: list[Callable[[], None]] = []
        wire.ends.append(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def publish(self, wake_up: WakeUp) -> None:
        for listener in self._listeners:
            listener(wake_up, False)
        self._wire.carry(self, wake_up)

    def tell(self, wake_up: WakeUp) -> None:
        if isinstance(wake_up, Moved) and not self.followed_all and wake_up.context_id not in self.followed:
            return
        self.heard.append(wake_up)
        for listener in self._listeners:
            listener(wake_up, True)

    def tell_gap(self) -> None:
        for listener in self._gap_listeners:
            listener()

    def subscribe(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def on_gap(self, listener: Callable[[], None]) -> None:
        self._gap_listeners.append(listener)

    def follow(self, context_id: str) -> None:
        self.followed[context_id] = self.followed.get(context_id, 0) + 1

    def unfollow(self, context_id: str) -> None:
        self.followed[context_id] -= 1
        if not self.followed[context_id]:
            del self.followed[context_id]

    def follow_all(self) -> None:
        self.followed_all += 1

    def unfollow_all(self) -> None:
        self.followed_all -= 1


@dataclass
class Node:
    """The rooms of one node."""

    store: Store
    bus: LinkedBus
    hub: Hub
    recent: RecentChunks
    metrics: Metrics
    relay: Relay
    ledger: Ledger
    reader: Reader
    commands: Commands
    fenced: list[str] = field(default_factory=list)

    def reads(self) -> int:
        """How many reads the relay has made."""
        return int(self.metrics.registry.get_sample_value("context_server_relay_read_seconds_count") or 0)

    def pulls(self, source: str) -> int:
        """How many pulls were answered from a source."""
        return int(self.metrics.registry.get_sample_value("context_server_pulls_total", {"source": source}) or 0)

    async def post(self, context_id: str | None = None) -> Receipt:
        """Posts a message here, in a new context unless one is named."""
        if context_id is None:
            context_id = (await self.store.create_context(OWNER)).id
        return await self.commands.post_message(OWNER, context_id, Post(text="Hello"), if_match=None, once=None)

    async def claim(self) -> OpenReply:
        """Claims the oldest queued run here, as the runner does."""
        ((run, transition),) = await self.store.claim_runs(1)
        reply = self.ledger.begin(run, on_fenced=lambda: self.fenced.append(run.id))
        self.hub.publish_transition(run.owner, transition)
        return reply

    async def begin(self, context_id: str | None = None) -> OpenReply:
        """A reply that is written here."""
        await self.post(context_id)
        return await self.claim()

    async def write(self, reply: OpenReply, *texts: str) -> None:
        """Writes a chunk for each text; they are durable, and told here, when this returns."""
        for text in texts:
            expected = reply.sequence + 1
            await self.ledger.append(reply, Delta(ChunkKind.TEXT, text))
            async with asyncio.timeout(DEADLINE_SECONDS):
                with self.hub.watch(reply.run.message_id) as watch:
                    while self.hub.written(reply.run.context_id)[reply.run.message_id] < expected:
                        watch.clear()
                        await watch.wait(1.0)

    async def end(self, reply: OpenReply, outcome: Outcome = Outcome.SUCCEEDED) -> None:
        """Ends a reply."""
        await self.ledger.end(reply, outcome)

    async def pull(self, run: Run, from_sequence: int = 0, to_sequence: int | None = None) -> Page:
        """The answer of a pull here."""
        return await self.reader.page(OWNER, run.context_id, run.message_id, from_sequence, to_sequence)

    @asynccontextmanager
    async def subscribe(self, *context_ids: str, types: frozenset[type] | None = None) -> AsyncIterator["Subscriber"]:
        """A subscriber of some contexts, or of all, as a stream has it."""
        with self.hub.subscribe(OWNER, context_ids or None, types) as mailbox:
            await self.relay.ready(OWNER, context_ids or None)
            followed = context_ids or await self.store.followed_contexts(OWNER, recent=100, limit=100)
            for snapshot in await self.store.snapshots(OWNER, [Subscription(key) for key in followed]):
                put_snapshot(mailbox, snapshot)
            yield Subscriber(mailbox)


@dataclass
class Subscriber:
    """What a client of a stream has been sent."""

    mailbox: Mailbox
    told: list[Signal] = field(default_factory=list)

    def take(self) -> list[Signal]:
        """What can be sent now."""
        taken, _ = self.mailbox.take()
        self.told += taken
        return taken

    async def until(self, reached: Callable[[list[Signal]], object]) -> list[Signal]:
        """Takes what comes until what has been told fulfils a condition; everything that has been told."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not reached(self.told):
                await self.mailbox.wait(None)
                self.take()
        return self.told

    def of(self, kind: type) -> list[Signal]:
        """What has been told of one kind."""
        return [signal for signal in self.told if type(signal) is kind]


@contextmanager
def cut(wire: Wire) -> Iterator[None]:
    """Loses every wake-up."""
    wire.is_cut = True
    try:
        yield
    finally:
        wire.is_cut = False


@asynccontextmanager
async def open_nodes(
    database_url: str, *, limits: RelayLimits = QUICK, recent_bytes: int = 1_000_000
) -> AsyncIterator[tuple[Node, Node, Wire]]:
    """Two nodes and the wire between them."""
    wire = Wire()
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(Store.open(database_url, connections=6))
        store.shared = True  # A file is shared here too, by rooms of one process.
        nodes = [await _open_node(stack, store, wire, limits, recent_bytes) for _ in range(2)]
        yield nodes[0], nodes[1], wire


async def _open_node(stack: AsyncExitStack, store: Store, wire: Wire, limits: RelayLimits, recent_bytes: int) -> Node:
    metrics = Metrics()
    bus = LinkedBus(wire)
    hub = Hub(Pacing(), metrics, asyncio.get_running_loop().time)
    recent = RecentChunks(recent_bytes, metrics)
    relay = await stack.enter_async_context(Relay(store, hub, recent, bus, metrics, limits))
    ledger = await stack.enter_async_context(Ledger(store, hub, recent, metrics, ledger_limits()))
    reader = Reader(store, recent, metrics, max_page_bytes=1_048_576, relay=relay)
    return Node(
        store, bus, hub, recent, metrics, relay, ledger, reader, Commands(store, recent, hub, bus, max_waiting=20)
    )

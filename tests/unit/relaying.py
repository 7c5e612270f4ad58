"""A world of two nodes in which everything that can overtake something does: commits, publishing, reads, snapshots.

The rooms of one node, *here*, are real: relay, hub, mailboxes. The database is a model, on which the other node works
too. What happens next is chosen by numbers, so that a run can be repeated, and made smaller when it fails.
"""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast

from context_server.bus import Moved, owner_tag
from context_server.hub import Hub, put_snapshot
from context_server.mailbox import Mailbox, Pacing
from context_server.metrics import Metrics
from context_server.recent import RecentChunks
from context_server.records import (
    Chunk,
    ChunkKind,
    ContentDelta,
    ContextChanged,
    ContextDeleted,
    EndedMessage,
    MessageCompleted,
    MessageStatus,
    Page,
    Signal,
    Snapshot,
    State,
    StateChanged,
    Transition,
)
from context_server.relay import Relay
from context_server.store import Store
from context_server.store.following import Growth, Held, Movement, Movements, Opening, OpenMessage, Since
from tests.unit.nodes import LinkedBus, Wire

OWNER = "local"
AT = datetime(2026, 1, 1, tzinfo=UTC)
ON_CONNECT = datetime(2026, 1, 2, tzinfo=UTC)
HERE, THERE = "here", "there"


def chunks(after: int, until: int) -> tuple[Chunk, ...]:
    """The chunks after a sequence, up to another."""
    return tuple(Chunk(number, ChunkKind.TEXT, "x") for number in range(after + 1, until + 1))


@dataclass
class Reply:
    """A message of the model."""

    id: str
    sequence: int = 0
    writer: str | None = None
    is_begun: bool = False  # At its writer, where that is here: before, nothing is written.
    ended_version: int | None = None


@dataclass
class Row:
    """A context of the model."""

    id: str
    version: int = 1
    state: State = State.IDLE
    replies: list[Reply] = field(default_factory=list)
    details: int = 0
    changed_version: int = 0
    is_gone: bool = False

    @property
    def open(self) -> Reply | None:
        reply = self.replies[-1] if self.replies else None
        return reply if reply is not None and reply.ended_version is None else None

    @property
    def run_id(self) -> str | None:
        return None if self.open is None else f"run of {self.open.id}"

    def completed(self, reply: Reply) -> MessageCompleted:
        return MessageCompleted(
            context_id=self.id,
            message_id=reply.id,
            final_sequence=reply.sequence,
            status=MessageStatus.COMPLETED,
            version=reply.ended_version or 0,
            timestamp=AT,
        )

    def growth(self, reply: Reply, held: Held) -> Growth:
        """What a read finds now of a message: at most two new chunks."""
        until = min(reply.sequence, held.sequence + 2)
        return Growth(
            context_id=self.id,
            owner=OWNER,
            status=MessageStatus.STREAMING if reply.ended_version is None else MessageStatus.COMPLETED,
            head=reply.sequence,
            content_bytes=reply.sequence,
            final_sequence=None if reply.ended_version is None else reply.sequence,
            digest=None if reply.ended_version is None else "digest",
            chunks=tuple(chunks(held.sequence, until)),
        )

    def opening(self, reply: Reply) -> Opening:
        """What the first pull of a message finds now."""
        page = Page(
            context_id=self.id,
            message_id=reply.id,
            from_sequence=0,
            sequence=reply.sequence,
            chunks=chunks(0, reply.sequence),
            status=MessageStatus.STREAMING if reply.ended_version is None else MessageStatus.COMPLETED,
            head=reply.sequence,
            final_sequence=None if reply.ended_version is None else reply.sequence,
            digest=None if reply.ended_version is None else "digest",
            closed=False,
        )
        return Opening(page, page.chunks if reply.ended_version is None else None, reply.sequence)

    def movement(self, since: Since) -> Movement:
        """What a read finds now."""
        after = since.version if since.version is not None else 0 if since.ended_after_ms is not None else 10**9
        ended = [reply for reply in self.replies if reply.ended_version is not None and reply.ended_version > after]
        return Movement(
            context_id=self.id,
            owner=OWNER,
            state=self.state,
            version=self.version,
            run_id=self.run_id,
            open=None if self.open is None else OpenMessage(self.open.id, self.open.sequence),
            ended=tuple(map(self.completed, ended)),
            details=None if self.version == since.version else str(self.details).encode(),
        )

    def snapshot(self) -> Snapshot:
        """What a subscriber is told on connect now."""
        newest: MessageCompleted | ContentDelta | None = None
        reply = self.replies[-1] if self.replies else None
        if reply is not None and reply.ended_version is not None:
            newest = self.completed(reply)
        elif reply is not None and reply.sequence:
            newest = ContentDelta(
                context_id=self.id, message_id=reply.id, current_sequence=reply.sequence, timestamp=AT
            )
        return Snapshot(
            context_id=self.id,
            state=self.state,
            version=self.version,
            run_id=self.run_id,
            newest=newest,
            newest_sequence=0 if reply is None else reply.sequence,
            ended=(),
            at=ON_CONNECT,
        )


@dataclass
class Client:
    """A subscriber of the node that is looked at, and what it has been sent."""

    mailbox: Mailbox
    context_ids: list[str] | None
    close: Callable[[], None]
    snapshots: dict[str, Snapshot] | None = None
    is_connected: bool = False
    told: dict[str, list[Signal]] = field(default_factory=dict)

    def take(self) -> None:
        for signal in self.mailbox.take()[0]:
            self.told.setdefault(signal.context_id, []).append(signal)


class World:
    """The database of the model, the node here, and its clients."""

    def __init__(self, contexts: int = 2) -> None:
        metrics = Metrics()
        self.hub = Hub(Pacing(), metrics, lambda: 0.0)
        bus = LinkedBus(Wire())
        self.recent = RecentChunks(10**6, metrics)
        self.relay = Relay(cast("Store", None), self.hub, self.recent, bus, metrics)
        self.hub.attach(self.relay)
        self.rows = {f"c{number}": Row(f"c{number}") for number in range(contexts)}
        self.clients: list[Client] = []
        self.unpublished: dict[str, list[Callable[[], None]]] = {}
        self.read: tuple[dict[str, Since], dict[str, Held], Movements, float] | None = None
        self.openings: list[tuple[Opening, float]] = []

    # Choices

    def step(self, choice: int) -> None:
        """Does one of the things that can happen now."""
        options = list(self.options())
        options[choice % len(options)]()
        for client in self.clients:
            check_pullable(client, self)

    def options(self) -> Iterable[Callable[[], Any]]:
        """What can happen now, the frequent things more than once."""
        for row in self.rows.values():
            if not row.is_gone:
                yield from self.commits(row)
                yield from [lambda row=row: self.wake(row)] * 2
        for queue in self.unpublished:
            yield from [lambda queue=queue: self.publish(queue)] * 3
        yield from [self.start_read if self.read is None else self.finish_read] * 4
        for row in self.rows.values():
            if row.open is not None and not row.is_gone:
                yield from [lambda row=row: self.open(row, row.open)] * 2
        for opening in self.openings:
            yield from [lambda opening=opening: self.opened(*opening)] * 3
        if len(self.clients) < 4:
            for row in self.rows.values():
                if not row.is_gone:
                    yield lambda row=row: self.connect([row.id])
            yield lambda: self.connect(None)
        for client in self.clients:
            yield from [lambda client=client: self.go_on(client)] * 3
            yield lambda client=client: self.leave(client)

    def commits(self, row: Row) -> Iterable[Callable[[], Any]]:
        """What either node can do to a context."""
        reply = row.open
        for node in (HERE, THERE):
            yield lambda node=node: self.change(row, node)
            if row.version > 12:
                yield lambda node=node: self.delete(row, node)
            if reply is None:
                yield from [lambda node=node: self.post(row, node)] * 3
            elif reply.writer is None:
                yield from [lambda node=node: self.claim(row, reply, node)] * 3
                yield lambda node=node: self.end(row, reply, node, steps=1)
            elif reply.id not in self.unpublished:  # A lease is longer than a node takes to publish what it wrote.
                yield lambda node=node: self.expire(row, reply, node)
        if reply is not None and (reply.writer is THERE or reply.is_begun):
            for is_known in (True, True, True, False):
                yield lambda is_known=is_known: self.append(row, reply, is_known=is_known)
                yield lambda is_known=is_known: self.end(row, reply, reply.writer, steps=1, is_known=is_known)
            yield lambda: self.end(row, reply, reply.writer, steps=3)

    # Commits, each published later where it is one of this node

    def move(self, row: Row, state: State, *, steps: int = 1, ended: Reply | None = None) -> Callable[..., Transition]:
        previous_state, previous_version = row.state, row.version
        run_id = row.run_id
        row.version += steps
        row.state = state
        if ended is not None:
            ended.ended_version = row.version
        version = row.version

        def transition(*, is_known: bool = True) -> Transition:
            """What the commit is known to have done; when its outcome had to be read, how the context stands then."""
            return Transition(
                context_id=row.id,
                run_id=run_id,
                previous_state=previous_state if is_known else None,
                previous_version=previous_version if is_known else None,
                state=state if is_known else row.state,
                version=version if is_known else row.version,
                ended=None
                if ended is None
                else EndedMessage(id=ended.id, status=MessageStatus.COMPLETED, final_sequence=ended.sequence),
            )

        return transition

    def later(self, queue: str, *publications: Callable[[], Any]) -> None:
        self.unpublished.setdefault(queue, []).append(lambda: [publication() for publication in publications])

    def command(self, *publications: Callable[[], Any]) -> None:
        self.later(f"command {len(self.unpublished)} {id(publications)}", *publications)

    def post(self, row: Row, node: str) -> None:
        row.replies.append(Reply(f"{row.id}m{len(row.replies)}"))
        moved = self.move(row, State.QUEUED)
        if node is HERE:
            self.command(lambda: self.hub.publish_transition(OWNER, moved()))

    def claim(self, row: Row, reply: Reply, node: str) -> None:
        reply.writer = node
        moved = self.move(row, State.THINKING)
        if node is HERE:
            self.later(
                reply.id,
                lambda: self.begin(row, reply),
                lambda: self.hub.publish_transition(OWNER, moved()),
            )

    def begin(self, row: Row, reply: Reply) -> None:
        reply.is_begun = True
        self.recent.open(OWNER, row.id, reply.id, 0)
        self.hub.open_message(OWNER, row.id, reply.id)

    def write(self, delta: ContentDelta) -> None:
        """What the ledger does with a durable chunk: memory first, then the signal."""
        self.recent.add(delta.message_id, chunks(delta.current_sequence - 1, delta.current_sequence))
        self.hub.publish(OWNER, delta)

    def append(self, row: Row, reply: Reply, *, is_known: bool) -> None:
        reply.sequence += 1
        moved = self.move(row, State.STREAMING) if row.state is State.THINKING else None
        delta = ContentDelta(context_id=row.id, message_id=reply.id, current_sequence=reply.sequence, timestamp=AT)
        if reply.writer is HERE:
            publications: list[Callable[[], Any]] = [lambda: self.write(delta)]
            if moved is not None:
                publications.insert(0, lambda: self.hub.publish_transition(OWNER, moved(is_known=is_known)))
            self.later(reply.id, *publications)

    def end(self, row: Row, reply: Reply, node: str | None, *, steps: int, is_known: bool = True) -> None:
        if reply.writer is not None and steps == 3:
            reply.sequence += 1
        delta = ContentDelta(context_id=row.id, message_id=reply.id, current_sequence=reply.sequence, timestamp=AT)
        moved = self.move(row, State.IDLE, steps=steps, ended=reply)
        if node is HERE:
            publications: list[Callable[[], Any]] = [
                lambda: self.hub.publish_transition(OWNER, moved(is_known=is_known))
            ]
            if steps == 3:
                publications.insert(0, lambda: self.write(delta))
            if reply.writer is HERE:
                publications.insert(-1, lambda: self.recent.end(reply.id, MessageStatus.COMPLETED, "digest"))
                self.later(reply.id, *publications)
            else:
                self.command(*publications)

    def expire(self, row: Row, reply: Reply, node: str) -> None:
        """A node ends the run of one that it believes dead; if that one is here, it finds out later."""
        moved = self.move(row, State.FAILED, ended=reply)
        if node is HERE:
            self.command(lambda: self.hub.publish_transition(OWNER, moved()))
        if reply.writer is HERE:
            self.later(
                reply.id,
                lambda: self.recent.forget(reply.id),
                lambda: self.hub.release_message(row.id, reply.id),
            )

    def change(self, row: Row, node: str) -> None:
        row.version += 1
        row.details += 1
        row.changed_version = row.version
        changed = ContextChanged(context_id=row.id, version=row.version, timestamp=AT)
        if node is HERE:
            self.command(lambda: self.hub.publish(OWNER, changed))

    def delete(self, row: Row, node: str) -> None:
        row.is_gone = True
        deleted = ContextDeleted(context_id=row.id, version=row.version + 1, timestamp=AT)
        if node is HERE:
            self.command(lambda: self.recent.forget_context(row.id), lambda: self.hub.publish(OWNER, deleted))

    def publish(self, queue: str) -> None:
        """Lets the next commit of a task of this node be seen."""
        self.unpublished[queue].pop(0)()
        if not self.unpublished[queue]:
            del self.unpublished[queue]

    # Reads

    def wake(self, row: Row) -> None:
        """A wake-up of the other node arrives, or the sweep comes by."""
        self.relay._on_wake_up(Moved(row.id, owner_tag(OWNER), row.version, None, None), True)

    def start_read(self) -> None:
        marked = self.relay._take_marked()
        asked = {key: since for key in marked if (since := self.relay._order.since(key)) is not None}
        movements = {key: self.rows[key].movement(asked[key]) for key in asked if not self.rows[key].is_gone}
        wanted = self.relay.pulled.wanted(marked)
        grown = {key: growth for key, held in wanted.items() if (growth := self.find_growth(key, held)) is not None}
        self.read = asked, wanted, Movements(movements, grown), self.relay.clock()

    def find_growth(self, message_id: str, held: Held) -> Growth | None:
        row = self.rows[message_id.partition("m")[0]]
        (reply,) = [reply for reply in row.replies if reply.id == message_id]
        return None if row.is_gone else row.growth(reply, held)

    def finish_read(self) -> None:
        if self.read is not None:
            self.relay._let_be_seen(*self.read)
        self.read = None

    def open(self, row: Row, reply: Reply) -> None:
        """The first pull of a message reads the database."""
        self.openings.append((row.opening(reply), self.relay.clock()))

    def opened(self, opening: Opening, started: float) -> None:
        """It is answered."""
        self.openings.remove((opening, started))
        self.relay.opened(OWNER, opening, started)

    # Clients

    def connect(self, context_ids: list[str] | None) -> None:
        with ExitStack() as holds:
            mailbox = holds.enter_context(self.hub.subscribe(OWNER, context_ids))
            client = Client(mailbox, context_ids, holds.pop_all().close)
        if context_ids is None:
            for row in self.rows.values():
                if not row.is_gone:
                    self.relay._order.notice(OWNER, row.id, as_it_stands=True)
                    self.relay._mark(row.id)
        self.clients.append(client)

    def go_on(self, client: Client) -> None:
        """The next thing that a stream does: wait, read, begin to send, send."""
        followed = client.context_ids or list(self.rows)
        if client.snapshots is None:
            if any(self.rows[key].is_gone for key in client.context_ids or ()):
                self.leave(client)  # It is told that there is no such context.
            elif all(map(self.relay._order.is_known, followed)):
                client.snapshots = {key: self.rows[key].snapshot() for key in followed if not self.rows[key].is_gone}
        elif not client.is_connected:
            for snapshot in client.snapshots.values():
                put_snapshot(client.mailbox, snapshot)
            client.is_connected = True
        else:
            client.take()
            check(client, self.rows)

    def leave(self, client: Client) -> None:
        client.close()
        self.clients.remove(client)

    def come_to_rest(self) -> None:
        """Everything is published, read and sent; then nobody may lack anything."""
        for _ in range(20):
            while self.unpublished:
                self.publish(next(iter(self.unpublished)))
            if self.read is not None:
                self.finish_read()
            for row in self.rows.values():
                self.wake(row)
            self.start_read()
            self.finish_read()
            for client in list(self.clients):
                self.go_on(client)
        assert not self.relay._marked, "something is read again and again"
        for client in self.clients:
            check(client, self.rows)
            check_complete(client, self.rows)


def run_world(choices: Iterable[int]) -> None:
    """Lets things happen in an order that numbers choose, then come to rest; fails where a client is told wrong."""

    async def run() -> None:
        world = World()
        for choice in choices:
            world.step(choice)
        world.come_to_rest()

    asyncio.run(run())


# What a client may rely on


def check(client: Client, rows: dict[str, Row]) -> None:
    """Nothing was told twice, back to front, or before it was durable."""
    for context_id, told in client.told.items():
        snapshot = (client.snapshots or {}).get(context_id)
        connected_at = 0 if snapshot is None else snapshot.version
        version = 0
        sequences: dict[str, int] = {}
        ended: set[str] = set()
        for place, signal in enumerate(told):
            match signal:
                case StateChanged():
                    assert signal.version > version, f"an older state: {told}"
                    version = signal.version
                case ContentDelta():
                    assert signal.message_id not in ended, f"a delta after its ending: {told}"
                    assert signal.current_sequence >= sequences.get(signal.message_id, 0), f"a head moved back: {told}"
                    sequences[signal.message_id] = signal.current_sequence
                    (reply,) = [reply for reply in rows[context_id].replies if reply.id == signal.message_id]
                    assert signal.current_sequence <= reply.sequence
                case MessageCompleted():
                    assert signal.message_id not in ended, f"an ending twice: {told}"
                    ended.add(signal.message_id)
                    assert signal.version >= version or signal.version <= connected_at, f"a late ending: {told}"
                    has_all = sequences.get(signal.message_id, 0) == signal.final_sequence
                    # One that was being deleted when the client came is no part of what it knows.
                    assert has_all or (snapshot is None and rows[context_id].is_gone), f"without last words: {told}"
                case ContextDeleted():
                    assert place == len(told) - 1, f"something after the deletion: {told}"


def check_pullable(client: Client, world: World) -> None:
    """What was signalled here can be pulled here: memory either holds it, or does not answer without a look.

    What a client is told on connect was read; memory may be about to learn of it, and then it is told once more.
    """
    for context_id, told in client.told.items():
        for signal in [] if world.rows[context_id].is_gone else told:
            if isinstance(signal, ContentDelta) and signal.timestamp != ON_CONNECT:
                tail = world.recent.find(signal.message_id)
                before = signal.current_sequence - 1
                if tail is not None and world.relay.pulled.trusts(tail, before, is_watched=True):
                    assert tail.sequence >= signal.current_sequence, f"memory lacks what was signalled: {signal}"


def check_complete(client: Client, rows: dict[str, Row]) -> None:
    """A client that has been sent everything knows everything."""
    for row in rows.values():
        snapshot = (client.snapshots or {}).get(row.id)
        if snapshot is None and client.context_ids is not None and row.id not in client.context_ids:
            continue
        told = client.told.get(row.id, [])
        if row.is_gone:
            assert snapshot is None or (told and isinstance(told[-1], ContextDeleted)), "a deletion was not told"
            continue
        assert snapshot is not None
        states = [signal for signal in told if isinstance(signal, StateChanged)]
        assert states[-1].new_state is row.state, f"not the last state: {told}"
        versions = [signal.version for signal in told if isinstance(signal, StateChanged | ContextChanged)]
        assert max(versions) == row.version, f"not the last version {row.version}: {told}"
        changes = [signal.version for signal in told if isinstance(signal, ContextChanged)]
        if row.changed_version > snapshot.version:
            assert max(changes, default=0) >= row.changed_version, f"a change was not told: {told}"
        ended = {signal.message_id for signal in told if isinstance(signal, MessageCompleted)}
        owed = {reply.id for reply in row.replies if (reply.ended_version or 0) > snapshot.version}
        assert owed <= ended, f"endings were not told: {owed - ended}, {told}"
        if row.open is not None and row.open.sequence:
            deltas = [signal for signal in told if isinstance(signal, ContentDelta)]
            assert (deltas[-1].message_id, deltas[-1].current_sequence) == (row.open.id, row.open.sequence)

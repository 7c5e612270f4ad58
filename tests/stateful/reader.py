"""A client as the documentation says that one should be: signals say where to pull, and pulls say what there is."""

from contextlib import ExitStack
from dataclasses import dataclass, field

from context_server.api.requests import Rooms
from context_server.errors import NotFound
from context_server.hub import put_snapshot
from context_server.mailbox import Mailbox
from context_server.records import (
    ChunkKind,
    ContentDelta,
    ContextDeleted,
    MessageCompleted,
    MessageStatus,
    Signal,
    StateChanged,
)
from context_server.store.reading import Subscription

OWNER = "local"


@dataclass
class Held:
    """What a client has of one message."""

    sequence: int = 0
    text: str = ""
    status: MessageStatus | None = None
    digest: str | None = None


@dataclass
class Seen:
    """What one mailbox has told, to prove that it never goes back."""

    version: int = 0
    heads: dict[str, int] = field(default_factory=dict)
    completed: dict[str, MessageCompleted] = field(default_factory=dict)


class Reader:
    """Follows one context, through as many connections as it takes."""

    def __init__(self, context_id: str) -> None:
        self.context_id = context_id
        self.held: dict[str, Held] = {}
        self.state: str | None = None
        self.version: int | None = None
        self.deleted = False
        self._mailbox: Mailbox | None = None
        self._connection = ExitStack()
        self._seen = Seen()

    @property
    def connected(self) -> bool:
        return self._mailbox is not None

    async def connect(self, rooms: Rooms) -> None:
        """Subscribes, then reads how things stand, as the stream does; ``Last-Event-ID`` is the version last seen."""
        self.disconnect()
        connection = ExitStack()
        mailbox = connection.enter_context(rooms.hub.subscribe(OWNER, [self.context_id]))
        try:
            (snapshot,) = await rooms.store.snapshots(OWNER, [Subscription(self.context_id, self.version)])
        except NotFound:
            connection.close()
            self.deleted = True
            return
        put_snapshot(mailbox, snapshot)
        self._connection, self._mailbox, self._seen = connection, mailbox, Seen()

    def disconnect(self) -> None:
        """The connection is cut, and every signal on its way with it."""
        self._connection.close()
        self._mailbox = None

    def lose_signals(self) -> None:
        """What is on its way never arrives; the connection stays."""
        if self._mailbox is not None:
            for signal in self._mailbox.take()[0]:
                self._check(signal)

    async def read(self, rooms: Rooms) -> None:
        """Takes the signals that are there, and pulls where they say."""
        if self._mailbox is None:
            return
        for signal in self._mailbox.take()[0]:
            self._check(signal)
            match signal:
                case StateChanged():
                    self.state, self.version = signal.new_state, signal.version
                case ContentDelta():
                    await self.pull(rooms, signal.message_id, at_least=signal.current_sequence)
                case MessageCompleted():
                    await self.pull(rooms, signal.message_id, at_least=signal.final_sequence)
                    self._check_ending(signal)
                case ContextDeleted():
                    self.deleted = True
        if self.deleted:
            self.disconnect()

    async def heartbeat(self, rooms: Rooms) -> None:
        """Repairs what lost signals left: reads the state, pulls what is open, and what it believes open and is not."""
        if self._mailbox is None or self.deleted:
            return
        try:
            context = await rooms.store.context(OWNER, self.context_id)
        except NotFound:
            self.deleted = True
            return
        self.state, self.version = context.state, context.version
        heads = {message_id: sequence for _, message_id, sequence in rooms.hub.heads(OWNER, [self.context_id])}
        believed = {message_id for message_id, held in self.held.items() if held.status is None}
        for message_id in heads.keys() | believed:
            await self.pull(rooms, message_id, at_least=heads.get(message_id, 0))

    async def pull(self, rooms: Rooms, message_id: str, *, at_least: int = 0) -> None:
        """Pulls until it has all that there is; what was signalled must be there."""
        held = self.held.setdefault(message_id, Held())
        while not self.deleted:
            try:
                page = await rooms.reader.page(OWNER, self.context_id, message_id, held.sequence)
            except NotFound:
                self.deleted = True
                return
            assert [chunk.sequence for chunk in page.chunks] == [*range(held.sequence + 1, page.sequence + 1)]
            held.text += "".join(chunk.text or "" for chunk in page.chunks if chunk.kind is ChunkKind.TEXT)
            held.sequence = page.sequence
            if page.up_to_date:
                if page.final_sequence is not None:
                    assert page.final_sequence == held.sequence
                    held.status, held.digest = page.status, page.digest
                break
        assert self.deleted or held.sequence >= at_least

    def _check(self, signal: Signal) -> None:
        """A mailbox tells of rising versions and sequences, and of the end once and last."""
        seen = self._seen
        match signal:
            case StateChanged():
                assert signal.version > seen.version
                seen.version = signal.version
            case ContentDelta():
                assert signal.message_id not in seen.completed
                assert signal.current_sequence > seen.heads.get(signal.message_id, 0)
                seen.heads[signal.message_id] = signal.current_sequence
            case MessageCompleted():
                assert signal.message_id not in seen.completed
                assert signal.final_sequence >= seen.heads.get(signal.message_id, 0)
                seen.completed[signal.message_id] = signal

    def _check_ending(self, signal: MessageCompleted) -> None:
        held = self.held[signal.message_id]
        if not self.deleted:
            assert (held.sequence, held.status) == (signal.final_sequence, signal.status)

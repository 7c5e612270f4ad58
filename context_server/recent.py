"""Recently committed chunks, so that a pull of a live reply does not touch the database.

For each message a *tail*: its newest chunks, without gaps, and how far it is. All tails together are bounded in bytes;
the oldest chunk of all goes first. A tail holds only what is durable, and everything that is durable after its start.

The tail of a message that another node writes is *followed*: it reaches as far as was read, at the moment ``checked``.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence

from context_server.metrics import Metrics
from context_server.records import Chunk, MessageStatus, Page
from context_server.store.following import Growth, Opening
from context_server.store.reading import MAX_PAGE_CHUNKS, take_page

CHUNK_OVERHEAD_BYTES = 256
"""What a chunk costs beside its content: the objects that hold it (measured with ``sys.getsizeof``)."""


class Tail:
    """The newest chunks of one message: ``chunks[start:]`` are the sequences from ``first`` on."""

    __slots__ = (
        "checked",
        "chunks",
        "content_bytes",
        "context_id",
        "digest",
        "final_sequence",
        "first",
        "followed",
        "forgotten",
        "message_id",
        "owner",
        "sequence",
        "start",
        "status",
    )

    def __init__(self, owner: str, context_id: str, message_id: str, sequence: int) -> None:
        self.message_id = message_id
        self.followed = False
        self.checked = 0.0
        self.content_bytes = 0
        self.forgotten = False
        self.owner = owner
        self.context_id = context_id
        self.status = MessageStatus.PENDING if sequence == 0 else MessageStatus.STREAMING
        self.sequence = sequence
        self.final_sequence: int | None = None
        self.digest: str | None = None
        self.first = sequence + 1
        self.start = 0
        self.chunks: list[Chunk | None] = []

    @property
    def is_written_here(self) -> bool:
        """Whether everything that is durable of the message is here first."""
        return not self.followed and self.final_sequence is None

    def pop_oldest(self) -> int:
        """Drops the oldest chunk; the bytes that this frees."""
        chunk = self.chunks[self.start]
        self.chunks[self.start] = None
        self.start += 1
        self.first += 1
        # Amortised: the list is copied once for each doubling of what was dropped from it.
        if self.start > 64 and self.start * 2 > len(self.chunks):
            del self.chunks[: self.start]
            self.start = 0
        return 0 if chunk is None else cost_of(chunk)


def cost_of(chunk: Chunk) -> int:
    """The memory that a chunk counts for, in bytes."""
    return chunk.size_bytes + CHUNK_OVERHEAD_BYTES


class RecentChunks:
    """The tails of the messages that were written to lately."""

    def __init__(self, max_bytes: int, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._max_bytes = max_bytes
        self._bytes = 0
        self._metrics = metrics
        self._tails: dict[str, Tail] = {}
        self._order: deque[Tail] = deque()
        self._forgotten = 0

    def open(self, owner: str, context_id: str, message_id: str, sequence: int) -> None:
        """Begins the tail of a message that is about to be written after ``sequence``."""
        self.forget(message_id)
        self._tails[message_id] = Tail(owner, context_id, message_id, sequence)

    def follow(self, owner: str, opening: Opening, checked: float) -> Tail | None:
        """Begins the tail of an open message that another node writes; None when there is one, or none is needed."""
        page, chunks = opening.page, opening.chunks
        if chunks is None or page.message_id in self._tails:
            return None
        tail = Tail(owner, page.context_id, page.message_id, page.head)
        tail.status, tail.followed, tail.checked = page.status, True, checked
        tail.first = page.head + 1 - len(chunks)
        tail.content_bytes = opening.content_bytes
        self._tails[page.message_id] = tail
        self._extend(tail, chunks)
        return tail

    def grow(self, message_id: str, growth: Growth, checked: float) -> None:
        """Takes in what was read of a followed message, or that an ended one is still there."""
        tail = self._tails.get(message_id)
        if tail is None or tail.is_written_here:
            return
        has_changed = tail.final_sequence is not None and tail.final_sequence != growth.final_sequence
        if has_changed or (tail.final_sequence is None and not self._continue(tail, growth)):
            self.forget(message_id)  # Compacted or restored meanwhile: the next pull begins anew.
            return
        # With a part of what there is, memory does not answer without another look.
        tail.checked = checked if tail.sequence == growth.head else float("-inf")
        if growth.final_sequence == tail.sequence and growth.digest is not None:
            self._end(tail, growth.status, growth.digest, checked)

    def _continue(self, tail: Tail, growth: Growth) -> bool:
        """Puts new chunks behind a tail; False where they do not follow on."""
        if not growth.chunks and growth.head != tail.sequence:
            return False
        if growth.chunks:
            expected = range(tail.sequence + 1, tail.sequence + 1 + len(growth.chunks))
            if [chunk.sequence for chunk in growth.chunks] != list(expected):
                return False
            self._extend(tail, growth.chunks)
            tail.sequence, tail.status = growth.chunks[-1].sequence, MessageStatus.STREAMING
        is_whole = tail.sequence == growth.head
        read_bytes = sum(chunk.size_bytes for chunk in growth.chunks)
        tail.content_bytes = growth.content_bytes if is_whole else tail.content_bytes + read_bytes
        return True

    def add(self, message_id: str, chunks: tuple[Chunk, ...]) -> None:
        """Takes in chunks that have just become durable."""
        tail = self._tails.get(message_id)
        if tail is None or not chunks:
            return
        tail.sequence = chunks[-1].sequence
        tail.status = MessageStatus.STREAMING
        self._extend(tail, chunks)

    def _extend(self, tail: Tail, chunks: Sequence[Chunk]) -> None:
        tail.chunks.extend(chunks)
        self._order.extend([tail] * len(chunks))
        self._bytes += sum(map(cost_of, chunks))
        self._evict()

    def end(self, message_id: str, status: MessageStatus, digest: str) -> None:
        """The message will never grow again; its tail stays until it is evicted."""
        tail = self._tails.get(message_id)
        if tail is not None:
            self._end(tail, status, digest, self._clock())

    def _end(self, tail: Tail, status: MessageStatus, digest: str, checked: float) -> None:
        tail.status = status
        tail.final_sequence = tail.sequence
        tail.digest = digest
        tail.checked = checked
        if len(tail.chunks) == tail.start:
            del self._tails[tail.message_id]

    def find(self, message_id: str) -> Tail | None:
        """The tail of a message, if there is one."""
        return self._tails.get(message_id)

    def forget(self, message_id: str) -> None:
        """Drops a tail: its context is gone, or another process writes it now."""
        tail = self._tails.pop(message_id, None)
        if tail is None:
            return
        held = [chunk for chunk in tail.chunks if chunk is not None]
        self._bytes -= sum(map(cost_of, held))
        tail.forgotten = True
        # Its places in the order go once they are half of it: one deletion does not walk over everybody's chunks.
        self._forgotten += len(held)
        if self._forgotten * 2 > len(self._order):
            self._order = deque(other for other in self._order if not other.forgotten)
            self._forgotten = 0
        self._metrics.recent_bytes.set(self._bytes)

    def forget_context(self, context_id: str) -> None:
        """Drops the tails of a context that was deleted."""
        for message_id in [key for key, tail in self._tails.items() if tail.context_id == context_id]:
            self.forget(message_id)

    def _evict(self) -> None:
        while self._bytes > self._max_bytes and self._order:
            tail = self._order.popleft()
            if tail.forgotten:
                self._forgotten -= 1
                continue
            self._bytes -= tail.pop_oldest()
            if tail.final_sequence is not None and len(tail.chunks) == tail.start:
                del self._tails[tail.message_id]
        self._metrics.recent_bytes.set(self._bytes)

    def page(
        self,
        owner: str,
        context_id: str,
        message_id: str,
        *,
        from_sequence: int,
        to_sequence: int | None,
        max_bytes: int,
    ) -> Page | None:
        """The page that ``Store.page`` would give, or None when memory does not hold all of it.

        What is beyond a tail may be durable all the same, so memory refuses nothing.
        """
        tail = self._tails.get(message_id)
        if tail is None or tail.owner != owner or tail.context_id != context_id:
            return None
        if not tail.first - 1 <= from_sequence <= tail.sequence:
            return None
        begin = tail.start + from_sequence + 1 - tail.first
        # One more than a page may hold, so that the rule of pages itself finds the end.
        end = begin + MAX_PAGE_CHUNKS + 1
        if to_sequence is not None:
            end = min(end, begin + max(0, to_sequence - from_sequence))
        chunks = take_page([chunk for chunk in tail.chunks[begin:end] if chunk is not None], max_bytes)
        return Page(
            context_id=context_id,
            message_id=message_id,
            from_sequence=from_sequence,
            sequence=chunks[-1].sequence if chunks else from_sequence,
            chunks=tuple(chunks),
            status=tail.status,
            head=tail.sequence,
            final_sequence=tail.final_sequence,
            digest=tail.digest,
            closed=to_sequence is not None and to_sequence <= tail.sequence,
        )

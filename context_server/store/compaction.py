"""Compaction: the chunks of ended messages become segments, a bounded number of them in each transaction.

Every transaction moves whole segments, oldest first, and says in the message's row how far they reach; whoever reads
takes that row, the segments and the chunks from one picture of the database, and so finds every chunk once, before,
during and after. Where a segment ends depends on the chunks alone, and not on where a transaction ended.

A segment is written only when it reads back as exactly the chunks that it replaces.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row

from context_server.records import Chunk
from context_server.store import keeping_statements, segments, statements
from context_server.store.keeping_statements import Place
from context_server.store.reading import stored_chunks

BEGINNING: Place = (-1, "")
"""Before every message."""
_ROWS = 251  # A segment of five hundred chunks and the first one after it are two reads.
_MESSAGES = 32
_CHUNKS = 500
_BYTES = 262_144
"""What one transaction takes on: it begins no further segment once it holds so many chunks, or so much content.

A commit of live replies may have to wait for it: on SQLite for the one writer, on PostgreSQL for the event loop. With
twice as much, the 99th percentile of commits on a busy machine grew by 7 ms meanwhile, with this by 4 ms.
"""


class CompactionRefused(Exception):
    """The chunks of a message are not what its row says, or would not read back the same; they are left alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compacted:
    """What one transaction merged, and where the next one begins."""

    chunks: int
    segments: int
    refused: tuple[str, ...]
    """Messages that were passed over because of a defect in them."""
    resume_after: Place | None
    """None when every message has had its turn."""


@dataclass(slots=True)
class _Budget:
    """What one transaction has taken on so far."""

    chunks: int = 0
    size_bytes: int = 0
    segments: int = 0

    @property
    def is_spent(self) -> bool:
        return self.chunks >= _CHUNKS or self.size_bytes >= _BYTES


def compact(connection: Connection, *, min_age_ms: int, after: Place | None) -> Compacted:
    """Merges the chunks of the next messages that ended so long ago, as much as one transaction may."""
    place = after or BEGINNING
    ended_by_ms = connection.execute(*statements.select_now_ms()).scalar_one() - min_age_ms
    rows = connection.execute(*keeping_statements.lock_compactable(ended_by_ms, place, _MESSAGES)).all()
    budget = _Budget()
    refused: list[str] = []
    for row in rows:
        if budget.is_spent:
            break
        try:
            finished = _compact_message(connection, row, budget)
        except CompactionRefused:
            refused.append(str(row.id))
            finished = True
        if not finished:
            break
        place = (row.completed_at, row.id)
    else:
        if len(rows) < _MESSAGES:
            return Compacted(chunks=budget.chunks, segments=budget.segments, refused=tuple(refused), resume_after=None)
    return Compacted(chunks=budget.chunks, segments=budget.segments, refused=tuple(refused), resume_after=place)


def _compact_message(connection: Connection, row: Row[Any], budget: _Budget) -> bool:
    """Merges what is left of a message as far as the budget goes; whether nothing is left.

    Raises:
        CompactionRefused: the message has a defect; nothing of it was touched.
    """
    reached: int = row.compacted_sequence
    made = []
    for chunks in in_segments(stored_chunks(connection, row.id, reached, row.final_sequence, _ROWS)):
        if [chunk.sequence for chunk in chunks] != [*range(reached + 1, reached + 1 + len(chunks))]:
            raise CompactionRefused
        made.append(_segment_of(row.id, chunks))
        reached = chunks[-1].sequence
        budget.chunks += len(chunks)
        budget.size_bytes += sum(chunk.size_bytes for chunk in chunks)
        if budget.is_spent:
            break
    else:
        if reached != row.final_sequence:
            raise CompactionRefused
    if made:
        _replace(connection, row, made, reached)
        budget.segments += len(made)
    return reached == int(row.final_sequence)


def in_segments(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """The chunks, in order, as each segment takes them: as many as fit its bounds, at least one."""
    taken: list[Chunk] = []
    size = 0
    for chunk in chunks:
        size += chunk.size_bytes
        if taken and (size > segments.MAX_SEGMENT_BYTES or len(taken) == segments.MAX_SEGMENT_CHUNKS):
            yield taken
            taken, size = [], chunk.size_bytes
        taken.append(chunk)
    if taken:
        yield taken


def _segment_of(message_id: str, chunks: Sequence[Chunk]) -> dict[str, Any]:
    """The row of a segment.

    Raises:
        CompactionRefused: it would not read back the same.
    """
    first, last = chunks[0].sequence, chunks[-1].sequence
    body = segments.encode_segment(chunks)
    if list(segments.decode_segment(body, first, last, first - 1, last)) != list(chunks):
        raise CompactionRefused
    return {
        "message_id": message_id,
        "last_sequence": last,
        "first_sequence": first,
        "format": segments.FORMAT,
        "body": body,
    }


def _replace(connection: Connection, row: Row[Any], made: list[dict[str, Any]], reached: int) -> None:
    """Puts segments in the place of the chunks that they hold."""
    connection.execute(*keeping_statements.insert_segments(made))
    connection.execute(*keeping_statements.delete_chunks(row.id, row.compacted_sequence, reached))
    connection.execute(*keeping_statements.set_compacted(row.id, row.compacted_sequence, reached))

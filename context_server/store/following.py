"""Following what other nodes write: what is new of many contexts and messages, in a few statements for all of them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Any

from sqlalchemy import Connection, Row

from context_server.records import MAX_INTEGER, Chunk, MessageCompleted, MessageStatus, Page, State, now
from context_server.store import following_statements as statements
from context_server.store import reading
from context_server.store.database import Database
from context_server.store.rows import to_chunk

_IDS = 500
"""Contexts or messages in one statement, so that none of them takes long."""
_MAX_ROWS = 4000
"""Chunks in one statement."""


@dataclass(frozen=True, slots=True)
class Since:
    """From where on news of a context are wanted.

    ``Since(5)``: of what came after version 5. ``Since()``: only how it stands. ``Since(ended_after_ms=…)``: how it
    stands, and what has ended since that time.
    """

    version: int | None = None
    ended_after_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """How far a message is known: up to ``sequence``, which is ``content_bytes`` of content."""

    sequence: int
    content_bytes: int


@dataclass(frozen=True, slots=True)
class OpenMessage:
    """The reply that a context is busy with, and how far it is."""

    id: str
    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Movement:
    """How a context stands, and the replies that have ended, oldest first; ``details`` is None where it did not move.

    ``details`` is a digest of what a client may change: title, mode, metadata.
    """

    context_id: str
    owner: str
    state: State
    version: int
    run_id: str | None
    open: OpenMessage | None
    ended: tuple[MessageCompleted, ...] = ()
    details: bytes | None = None
    tool: str | None = None

    @property
    def open_id(self) -> str | None:
        """The id of the open reply."""
        return None if self.open is None else self.open.id


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """How far a message is, and the next chunks of it: up to ``head``, or fewer when they are many."""

    context_id: str
    owner: str
    status: MessageStatus
    head: int
    content_bytes: int
    final_sequence: int | None
    digest: str | None
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Movements:
    """What one read found, by id; what is gone is left out."""

    contexts: dict[str, Movement]
    messages: dict[str, Growth]


@dataclass(frozen=True, slots=True)
class Opening:
    """The answer of a pull, and of a message that is open all chunks up to its head, from the first or a later one.

    ``chunks`` is None where the message has ended, or the client is far behind.
    """

    page: Page
    chunks: tuple[Chunk, ...] | None
    content_bytes: int = 0


class Following:
    """The transactions of following; ``Store.following``.

    Raises, from every method: as ``Store``.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def movements(
        self, contexts: Mapping[str, Since], messages: Mapping[str, Held], *, max_bytes: int
    ) -> Movements:
        """What is new of contexts and of messages, about ``max_bytes`` of content at most; one consistent picture."""
        return await self._database.read(partial(movements, contexts=contexts, messages=messages, max_bytes=max_bytes))

    async def opening(
        self,
        owner: str,
        context_id: str,
        message_id: str,
        *,
        from_sequence: int,
        to_sequence: int | None,
        max_bytes: int,
    ) -> Opening:
        """The answer of a pull as ``Store.page`` gives it, and what to go on from with an open message.

        Raises:
            ContextNotFound, MessageNotFound, SequenceAhead.
        """
        return await self._database.read(
            partial(
                opening,
                owner=owner,
                context_id=context_id,
                message_id=message_id,
                from_sequence=from_sequence,
                to_sequence=to_sequence,
                max_bytes=max_bytes,
            )
        )


def movements(
    connection: Connection, *, contexts: Mapping[str, Since], messages: Mapping[str, Held], max_bytes: int
) -> Movements:
    """What is new of contexts and of messages."""
    context_ids, message_ids = list(contexts), list(messages)
    found: dict[str, Movement] = {}
    for start in range(0, len(context_ids), _IDS):
        found |= _moved(connection, {key: contexts[key] for key in context_ids[start : start + _IDS]})
    grown: dict[str, Growth] = {}
    for start in range(0, len(message_ids), _IDS):
        part = {key: messages[key] for key in message_ids[start : start + _IDS]}
        grown |= _grown(connection, part, max_bytes // len(messages))
    return Movements(found, grown)


def _moved(connection: Connection, asked: Mapping[str, Since]) -> dict[str, Movement]:
    numbers = {key: _numbers(since) for key, since in asked.items()}
    rows: dict[str, list[Row[Any]]] = {}
    for row in connection.execute(*statements.select_movements(numbers)):
        rows.setdefault(row.id, []).append(row)
    at = now()
    return {key: _to_movement(group, at) for key, group in rows.items()}


def _numbers(since: Since) -> tuple[int, int, int]:
    """What ``select_movements`` wants to know: the version that is known, and which endings are not."""
    if since.version is not None:
        return since.version, since.version, 0
    if since.ended_after_ms is not None:
        return 0, 0, since.ended_after_ms
    return 0, MAX_INTEGER, 0


def _to_movement(rows: list[Row[Any]], at: datetime) -> Movement:
    row = rows[0]
    ended = [
        MessageCompleted(
            context_id=row.id,
            message_id=row.ended_id,
            final_sequence=row.ended_sequence,
            status=MessageStatus(row.ended_status),
            version=row.ended_version,
            timestamp=at,
        )
        for row in rows
        if row.ended_id is not None
    ]
    return Movement(
        context_id=row.id,
        owner=row.owner,
        state=State(row.state),
        version=row.version,
        run_id=row.active_run_id,
        open=None if row.reply_id is None else OpenMessage(row.reply_id, row.reply_sequence),
        ended=tuple(sorted(ended, key=attrgetter("version"))),
        details=_digest(row) if row.has_moved else None,
        tool=row.tool if row.state == State.CALLING_TOOL else None,
    )


def _digest(row: Row[Any]) -> bytes:
    details = json.dumps([row.title, row.mode, row.metadata], sort_keys=True)
    return hashlib.blake2s(details.encode(), digest_size=8).digest()


def _grown(connection: Connection, held: Mapping[str, Held], share_bytes: int) -> dict[str, Growth]:
    asked = {key: (known.sequence, known.content_bytes) for key, known in held.items()}
    share_rows = max(1, _MAX_ROWS // len(held))
    rows = connection.execute(*statements.select_growth(asked, share_rows, share_bytes)).all()
    return {key: _to_growth(list(group)) for key, group in groupby(rows, attrgetter("id"))}


def _to_growth(rows: list[Row[Any]]) -> Growth:
    row = rows[0]
    return Growth(
        context_id=row.context_id,
        owner=row.owner,
        status=MessageStatus(row.status),
        head=row.head,
        content_bytes=row.content_bytes,
        final_sequence=row.final_sequence,
        digest=row.digest,
        chunks=tuple(to_chunk(row) for row in rows if row.sequence is not None),
    )


def opening(
    connection: Connection,
    *,
    owner: str,
    context_id: str,
    message_id: str,
    from_sequence: int,
    to_sequence: int | None,
    max_bytes: int,
) -> Opening:
    """The answer of a pull, and what to go on from with an open message.

    Raises:
        ContextNotFound, MessageNotFound, SequenceAhead.
    """
    read = partial(
        reading.page, connection, owner=owner, context_id=context_id, message_id=message_id, max_bytes=max_bytes
    )
    page = read(from_sequence=from_sequence, to_sequence=to_sequence)
    if page.final_sequence is not None or not page.up_to_date:
        return Opening(page, None)
    content_bytes = _grown(connection, {message_id: Held(page.head, 0)}, 0)[message_id].content_bytes
    chunks = page.chunks
    if from_sequence and content_bytes <= max_bytes:
        before = read(from_sequence=0, to_sequence=from_sequence)
        if before.sequence == from_sequence:  # All of it fits a page: whoever begins at the start is served as well.
            chunks = before.chunks + chunks
    return Opening(page, chunks, content_bytes)

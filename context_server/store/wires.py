"""What the wires of simple clients need of the database besides the log: about a reply, and a conversation by key."""

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import Connection, Row

from context_server.errors import ContextNotFound, MessageNotFound
from context_server.records import ChunkKind, Context, Message, Mode, Role
from context_server.store import reading, statements, wire_statements
from context_server.store.conversations import create_context
from context_server.store.database import Database
from context_server.store.dialects import dialect_of
from context_server.store.rows import to_context, to_message


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyFacts:
    """A message as it is now. ``question`` and ``content`` are None where they were not asked for, or are too long.

    ``is_regenerated`` says that the message before it has an older reply; False where that was not asked for.
    """

    message: Message
    is_regenerated: bool
    question: str | None
    content: str | None


class Wires:
    """The transactions of these wires; ``Store.wires``.

    Raises, from every method: as ``Store``.
    """

    def __init__(self, database: Database, epoch: str) -> None:
        self._database = database
        self._epoch = epoch

    async def reply(
        self,
        owner: str,
        context_id: str,
        message_id: str,
        *,
        max_bytes: int,
        question: bool = False,
        content: bool = False,
        elder: bool = False,
    ) -> ReplyFacts:
        """About a message: itself, and where asked for the text that it answers and its own, ``max_bytes`` of each.

        Raises:
            ContextNotFound, MessageNotFound.
        """
        return await self._database.read(
            partial(
                reply_facts,
                owner=owner,
                context_id=context_id,
                message_id=message_id,
                max_bytes=max_bytes,
                question=question,
                content=content,
                elder=elder,
            )
        )

    async def conversation(self, owner: str, context_id: str) -> Context:
        """The context of an id that was made from a key; a new one where there is none yet.

        Raises:
            ContextNotFound: it was deleted a moment ago, and its rows are still there.
        """
        work = partial(conversation, owner=owner, context_id=context_id, epoch=self._epoch)
        return await self._database.write(work)


def reply_facts(
    connection: Connection,
    *,
    owner: str,
    context_id: str,
    message_id: str,
    max_bytes: int,
    question: bool,
    content: bool,
    elder: bool,
) -> ReplyFacts:
    """About a message, with the text that it answers and its own where they are asked for."""
    row = connection.execute(*statements.select_message(owner, context_id, message_id)).one_or_none()
    if row is None:
        if connection.execute(*statements.select_context(owner, context_id)).one_or_none() is None:
            raise ContextNotFound(context_id)
        raise MessageNotFound(message_id)
    parent = None
    if question and row.parent_id is not None:
        parent = connection.execute(*statements.select_message(owner, context_id, row.parent_id)).one_or_none()
    is_regenerated = False
    if elder and row.parent_id is not None and row.role == Role.ASSISTANT:
        is_regenerated = connection.execute(*wire_statements.select_elder(row)).one_or_none() is not None
    return ReplyFacts(
        message=to_message(row),
        is_regenerated=is_regenerated,
        question=None if parent is None else _text_of(connection, parent, max_bytes),
        content=_text_of(connection, row, max_bytes) if content else None,
    )


def _text_of(connection: Connection, message: Row[Any], max_bytes: int) -> str | None:
    """The text of a message; None where it does not fit."""
    chunks = reading.take_page(reading.chunks_after(connection, message, 0, message.sequence), max_bytes)
    if len(chunks) < message.sequence:
        return None
    return "".join(chunk.text for chunk in chunks if chunk.kind is ChunkKind.TEXT and chunk.text)


def conversation(connection: Connection, *, owner: str, context_id: str, epoch: str) -> Context:
    """The context of this id; a new one where there is none yet.

    Raises:
        ContextNotFound: it was deleted, and the keeper has not come to its rows.
    """
    dialect_of(connection).lock_key(connection, owner, f"conversation {context_id}")
    row = connection.execute(*statements.select_context(owner, context_id)).one_or_none()
    if row is not None:
        return to_context(row, epoch)
    if connection.execute(*wire_statements.select_used_id(context_id)).one_or_none() is not None:
        raise ContextNotFound(context_id)
    return create_context(
        connection,
        owner=owner,
        epoch=epoch,
        now_ms=time.time_ns() // 1_000_000,
        title=None,
        mode=Mode.ACT,
        metadata={},
        context_id=context_id,
    )

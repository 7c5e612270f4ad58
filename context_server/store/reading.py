"""What is read from the log; each function runs inside one read transaction of ``Store``."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, Row

from context_server.errors import ContextNotFound, MessageNotFound, SequenceAhead
from context_server.records import (
    MAX_INTEGER,
    Approval,
    Chunk,
    ChunkKind,
    Context,
    Message,
    MessageStatus,
    Page,
    Role,
    Run,
    Snapshot,
    Turn,
    Usage,
    now,
)
from context_server.store import approvals, branch_statements, run_statements, statements, waiting_statements
from context_server.store.keeping_statements import select_segments
from context_server.store.rows import (
    to_chunk,
    to_context,
    to_files,
    to_message,
    to_snapshot,
    to_usage,
    to_workflow,
)
from context_server.store.segments import decode_segment

MAX_PAGE_CHUNKS = 10_000
"""Chunks in one page, so that a page of one-character chunks does not build a million objects."""
_ROWS = 500
_SEGMENTS = 8
_ENDED_LIMIT = 1000
_HISTORY_LIMIT = 500


@dataclass(frozen=True, slots=True)
class Subscription:
    """A context to be followed, and the version from which on the client wants to know of ended messages."""

    context_id: str
    since_version: int | None = None


def take_page(chunks: Iterable[Chunk], max_bytes: int) -> list[Chunk]:
    """The leading ``chunks`` that fit one page: at most ``max_bytes`` and ``MAX_PAGE_CHUNKS``, at least one.

    The rule looks at the chunks alone, so that a page has the same end from memory and from the database.
    """
    page: list[Chunk] = []
    size = 0
    for chunk in chunks:
        size += chunk.size_bytes
        if page and (size > max_bytes or len(page) == MAX_PAGE_CHUNKS):
            break
        page.append(chunk)
    return page


def chunks_after(connection: Connection, message: Row[Any], after: int, until: int) -> Iterable[Chunk]:
    """The chunks ``after < sequence <= until`` of a row of ``messages``, from its segments and then from its chunks.

    They are read no further than they are asked for. The chunks of a message of a fork are those of another one.
    """
    if message.content_id is not None:
        message = connection.execute(*branch_statements.select_content(message.content_id)).one()
    compacted: int = message.compacted_sequence
    if after < compacted:
        yield from _segmented_chunks(connection, message.id, after, min(until, compacted))
    yield from stored_chunks(connection, message.id, max(after, compacted), until)


def _segmented_chunks(connection: Connection, message_id: str, after: int, until: int) -> Iterator[Chunk]:
    while after < until:
        rows = connection.execute(*select_segments(message_id, after, until, _SEGMENTS)).all()
        if not rows:
            return
        for row in rows:
            yield from decode_segment(row.body, row.first_sequence, row.last_sequence, after, until)
        after = rows[-1].last_sequence


def stored_chunks(
    connection: Connection, message_id: str, after: int, until: int, rows_at_once: int = _ROWS
) -> Iterator[Chunk]:
    """The chunks of a range that lie in rows of their own, some hundred rows at a time."""
    while after < until:
        rows = connection.execute(*statements.select_chunks(message_id, after, until, rows_at_once)).all()
        if not rows:
            return
        yield from map(to_chunk, rows)
        after = rows[-1].sequence


def context(connection: Connection, *, owner: str, epoch: str, context_id: str) -> Context:
    """One context.

    Raises:
        ContextNotFound: there is none, or it belongs to another owner.
    """
    row = connection.execute(*statements.select_context(owner, context_id)).one_or_none()
    if row is None:
        raise ContextNotFound(context_id)
    return to_context(row, epoch)


def contexts(
    connection: Connection, *, owner: str, epoch: str, before: tuple[int, str] | None, limit: int
) -> tuple[list[Context], tuple[int, str] | None]:
    """A page of an owner's contexts, most recently active first, and the key that the next page starts after."""
    rows = connection.execute(*statements.select_contexts(owner, before, limit + 1)).all()
    following = (rows[limit - 1].updated_at, rows[limit - 1].id) if len(rows) > limit else None
    return [to_context(row, epoch) for row in rows[:limit]], following


def _message_row(connection: Connection, owner: str, context_id: str, message_id: str) -> Row[Any]:
    row = connection.execute(*statements.select_message(owner, context_id, message_id)).one_or_none()
    if row is None:
        if connection.execute(*statements.select_context(owner, context_id)).one_or_none() is None:
            raise ContextNotFound(context_id)
        raise MessageNotFound(message_id)
    return row


def message(connection: Connection, *, owner: str, context_id: str, message_id: str) -> Message:
    """One message with its whole text.

    Raises:
        ContextNotFound: there is none of this owner.
        MessageNotFound: there is none in this context.
    """
    row = _message_row(connection, owner, context_id, message_id)
    found = to_message(row)
    parts = [
        chunk.text
        for chunk in chunks_after(connection, row, 0, found.sequence)
        if chunk.kind is ChunkKind.TEXT and chunk.text
    ]
    return replace(found, content="".join(parts), content_sequence=found.sequence)


def require_context(connection: Connection, owner: str, context_id: str) -> None:
    """Passes where the owner has such a context.

    Raises:
        ContextNotFound.
    """
    if connection.execute(*statements.select_context(owner, context_id)).one_or_none() is None:
        raise ContextNotFound(context_id)


def waiting(connection: Connection, *, owner: str, context_id: str) -> list[tuple[Message, str]]:
    """Messages that wait for their turn, each with its text and the id of its reply, in the order of the turns.

    Raises:
        ContextNotFound.
    """
    require_context(connection, owner, context_id)
    found = []
    for row in connection.execute(*waiting_statements.select_waiting(context_id)).all():
        message_row = connection.execute(*branch_statements.select_content(row.message_id)).one()
        found.append((_with_content(connection, message_row, MAX_INTEGER), row.reply_message_id))
    return found


def messages(
    connection: Connection,
    *,
    owner: str,
    context_id: str,
    after: int,
    limit: int,
    include_content: bool,
    max_bytes: int,
    tree: bool,
) -> tuple[list[Message], int | None]:
    """A page of the head's line, or of all messages (``tree``), oldest first, and the position to go on after.

    Users' messages always come with their text, replies with ``include_content``; a page holds ``max_bytes`` of text
    in all. The message at which they are used up is the page's last; a reply is cut there, and goes on by pulling.

    Raises:
        ContextNotFound.
    """
    require_context(connection, owner, context_id)
    select_page = branch_statements.select_tree if tree else branch_statements.select_line
    rows = connection.execute(*select_page(context_id, after, limit + 1)).all()
    page: list[Message] = []
    left = max_bytes
    for row in rows[:limit]:
        found = to_message(row)
        if row.role == Role.USER:
            # A user's message is bounded by the largest request body; it is never cut.
            if page and row.content_bytes > left:
                break
            found = _with_content(connection, row, MAX_INTEGER)
        elif include_content:
            if page and left <= 0:
                break
            found = _with_content(connection, row, left)
        size = 0 if found.content is None else len(found.content.encode())
        if row.role == Role.USER and include_content:
            size *= 2  # It stands in the payload, and once more where content was asked for.
        if page and size > left:
            # Not even the first chunk fits: the next page begins with this message.
            break
        left -= size
        page.append(replace(found, siblings=_siblings(row)))
    following = rows[len(page) - 1].position if page and len(rows) > len(page) else None
    return page, following


def _siblings(row: Row[Any]) -> tuple[str, ...]:
    """``7:b,2:a`` → ``("a", "b")``: the ids in the order of their positions."""
    named = [entry.partition(":") for entry in (row.siblings or "").split(",") if entry]
    return tuple(name for _, _, name in sorted(named, key=lambda entry: int(entry[0]))) or (row.id,)


def _with_content(connection: Connection, row: Row[Any], max_bytes: int) -> Message:
    """The message with the text of its leading chunks that fit ``max_bytes``."""
    found = to_message(row)
    chunks = take_page(chunks_after(connection, row, 0, row.sequence), max_bytes)
    text = "".join(chunk.text for chunk in chunks if chunk.kind is ChunkKind.TEXT and chunk.text)
    return replace(found, content=text, content_sequence=chunks[-1].sequence if chunks else 0)


def page(
    connection: Connection,
    *,
    owner: str,
    context_id: str,
    message_id: str,
    from_sequence: int,
    to_sequence: int | None,
    max_bytes: int,
) -> Page:
    """The chunks after ``from_sequence`` (``from_sequence=10`` → 11, 12, 13), as far as a page and ``to_sequence`` go.

    Raises:
        ContextNotFound: there is none of this owner.
        MessageNotFound: there is none in this context.
        SequenceAhead: ``from_sequence`` is beyond the log.
    """
    row = _message_row(connection, owner, context_id, message_id)
    if from_sequence > row.sequence:
        raise SequenceAhead(from_sequence, row.sequence)
    until = row.sequence if to_sequence is None else min(to_sequence, row.sequence)
    chunks = take_page(chunks_after(connection, row, from_sequence, until), max_bytes)
    return Page(
        context_id=context_id,
        message_id=message_id,
        from_sequence=from_sequence,
        sequence=chunks[-1].sequence if chunks else from_sequence,
        chunks=tuple(chunks),
        status=MessageStatus(row.status),
        head=row.sequence,
        final_sequence=row.final_sequence,
        digest=row.digest,
        closed=to_sequence is not None and to_sequence <= row.sequence,
    )


def snapshots(
    connection: Connection, *, owner: str, subscriptions: Sequence[Subscription], all_must_exist: bool
) -> list[Snapshot]:
    """What a subscriber is told on connect, for each context.

    Raises:
        ContextNotFound: one of them does not exist, and ``all_must_exist``.
    """
    at = now()
    newest = {
        row.context_id: row
        for row in connection.execute(
            *branch_statements.select_newest_replies([subscription.context_id for subscription in subscriptions])
        )
    }
    result = []
    for subscription in subscriptions:
        row = connection.execute(*statements.select_context(owner, subscription.context_id)).one_or_none()
        if row is None and all_must_exist:
            raise ContextNotFound(subscription.context_id)
        if row is None:
            continue
        ended: list[Row[Any]] = []
        if subscription.since_version is not None:
            since = statements.select_ended_since(row.id, subscription.since_version, _ENDED_LIMIT)
            ended = list(connection.execute(*since))
        result.append(to_snapshot(row, newest.get(row.id), ended, at))
    return result


def followed_contexts(connection: Connection, *, owner: str, recent: int, limit: int) -> list[str]:
    """The contexts that a stream of all of an owner's contexts begins with: the busy ones and the newest."""
    busy = connection.scalars(*statements.select_busy_ids(owner, limit)).all()
    newest = connection.scalars(*statements.select_newest_ids(owner, recent)).all()
    return list(dict.fromkeys([*busy, *newest]))


def history(connection: Connection, *, run: Run, max_bytes: int) -> list[Turn]:
    """The line that a run's reply goes on from, oldest first: the newest messages that fit ``max_bytes`` together.

    The message to be answered is always among them. Of a run that was suspended, what it has taken since follows.
    """
    rows = connection.execute(*branch_statements.select_history(run.message_id, _HISTORY_LIMIT)).all()
    turns: list[Turn] = []
    left = max_bytes
    for row in rows:
        left -= row.content_bytes + sum(each.size_bytes for each in to_files(row.payload))
        if turns and left < 0:
            break
        turns.append(to_turn(connection, row))
    steered = connection.execute(*branch_statements.select_steered(run.id)).all() if run.sequence else []
    return turns[::-1] + [to_turn(connection, row) for row in steered]


def to_turn(connection: Connection, row: Row[Any]) -> Turn:
    """A message with all its chunks. In a fork it has the id of the one whose text it shares, which steps name."""
    chunks = tuple(chunks_after(connection, row, 0, row.sequence))
    return Turn(
        Role(row.role),
        MessageStatus(row.status),
        row.content_id or row.id,
        chunks,
        files=to_files(row.payload),
        workflow=to_workflow(row.payload),
        steers=row.steers_run_id is not None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What a suspended run goes on from: its reply so far, what it has used, and what was decided since."""

    reply: Turn
    usage: Usage | None
    approvals: tuple[Approval, ...]


def draft(connection: Connection, *, run: Run) -> Draft | None:
    """What a run goes on from; None where its reply is gone."""
    row = connection.execute(*branch_statements.select_content(run.message_id)).one_or_none()
    if row is None:
        return None
    decided = tuple(approvals.of_run(connection, run.id))
    return Draft(reply=to_turn(connection, row), usage=to_usage(row.usage), approvals=decided)


def usage(connection: Connection, *, owner: str, context_id: str | None) -> tuple[Usage, int]:
    """What the replies of an owner, or of one context, have used together, and how many they are.

    Raises:
        ContextNotFound.
    """
    if context_id is not None:
        require_context(connection, owner, context_id)
    row = connection.execute(*statements.sum_usage(owner, context_id)).one()
    total = Usage(
        input_tokens=row.input_tokens,
        output_tokens=row.output_tokens,
        requests=row.requests,
        tool_calls=row.tool_calls,
        estimated=bool(row.estimated),
    )
    return total, row.replies


def active_runs(connection: Connection) -> dict[str, int]:
    """How many runs there are, by active status."""
    return {row.status: row.runs for row in connection.execute(*run_statements.count_active_runs())}

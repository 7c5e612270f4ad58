"""Messages: post, list, read, and the inline view of one."""

import re
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from context_server import records
from context_server.api import forms, schemas, signals
from context_server.api.contexts import JSON, bounded, foreign_cursor
from context_server.api.requests import (
    Rooms,
    if_match,
    once_of,
    owner_of,
    parse_body,
    parse_query,
    read_body,
    rooms_of,
)
from context_server.api.sse import EventStream, admit, goodbye
from context_server.errors import ContextServerError, InvalidRequest, Violation
from context_server.hub import Watch
from context_server.records import MAX_INTEGER
from context_server.store.conversations import Post
from context_server.store.idempotency import Replayed

_EVENT_ID = re.compile(r"(?P<sequence>[0-9]{1,16})(?P<end>:end)?")


def _encode_receipt(receipt: records.Receipt) -> str:
    return schemas.Posted.of(receipt).model_dump_json()


async def post_message(request: Request) -> Response:
    """Posts a user's message and starts a run; with ``Accept: text/event-stream``, the reply as an inline stream."""
    body = await read_body(request)
    new = parse_body(body, forms.NewMessage)
    rooms, owner = rooms_of(request), owner_of(request)
    headers = {}
    with ExitStack() as holds:
        inline = "text/event-stream" in request.headers.get("accept", "")
        if inline:
            admit(rooms, holds)  # First, so that a refusal means that nothing was posted.
        try:
            receipt = await rooms.commands.post_message(
                owner,
                request.path_params["context_id"],
                Post(text=new.payload.content, display=new.payload.display, client_metadata=new.client_metadata),
                if_match=if_match(request),
                once=once_of(request, body, _encode_receipt),
            )
            answer = _encode_receipt(receipt)
        except Replayed as replay:
            answer = replay.answer
            headers["Idempotency-Replayed"] = "true"
        if not inline:
            return Response(answer, 202, headers, JSON)
        posted = schemas.Posted.model_validate_json(answer)
        first = {"type": "message_accepted", **posted.model_dump(mode="json")}
        response = _inline(rooms, owner, posted.context_id, posted.reply_message_id, 0, holds, first)
        response.headers.update(headers)
        return response


async def list_messages(request: Request) -> Response:
    """Messages of a context, oldest first; with ``include=content``, each with its text so far."""
    query = parse_query(request, forms.MessagesQuery)
    rooms = rooms_of(request)
    messages, following = await rooms.store.messages(
        owner_of(request),
        request.path_params["context_id"],
        after=_after(query.cursor),
        limit=query.limit,
        include_content=query.include == "content",
        max_bytes=rooms.limits.max_page_bytes,
    )
    page = [schemas.Message.of(message, with_content=query.include == "content") for message in messages]
    cursor = None if following is None else schemas.encode_cursor(following)
    return Response(
        schemas.dump_messages(page, cursor), media_type=JSON, headers={"Cache-Control": "private, no-cache"}
    )


def _after(cursor: str | None) -> int:
    if cursor is None:
        return 0
    try:
        (position,) = schemas.decode_cursor(cursor)
        return bounded(position)
    except ValueError:
        raise foreign_cursor() from None


async def get_message(request: Request) -> Response:
    """One message, whole."""
    path = request.path_params
    message = await rooms_of(request).store.message(owner_of(request), path["context_id"], path["message_id"])
    answer = schemas.Message.of(message, with_content=True)
    return Response(schemas.dump_message(answer), media_type=JSON, headers={"Cache-Control": "private, no-cache"})


async def message_events(request: Request) -> Response:
    """The log of a message pushed inline, for ``curl -N`` and simple clients."""
    query = parse_query(request, forms.EventsQuery)
    rooms, owner, path = rooms_of(request), owner_of(request), request.path_params
    start, ended = query.from_sequence, False
    if last_event_id := request.headers.get("last-event-id"):
        match = _EVENT_ID.fullmatch(last_event_id)
        if match is None or int(match["sequence"]) > MAX_INTEGER:
            raise InvalidRequest(Violation("header.Last-Event-ID", "must be the id of an event of this stream"))
        start, ended = int(match["sequence"]), bool(match["end"])
    # Refuses before the stream begins what could not be said in it.
    await rooms.reader.page(owner, path["context_id"], path["message_id"], start)
    if ended:
        # An EventSource comes back after the end too; this status tells it not to.
        return Response(status_code=204)
    with ExitStack() as holds:
        admit(rooms, holds)
        return _inline(rooms, owner, path["context_id"], path["message_id"], start, holds)


def _inline(
    rooms: Rooms,
    owner: str,
    context_id: str,
    message_id: str,
    start: int,
    holds: ExitStack,
    first: dict[str, Any] | None = None,
) -> Response:
    watch = holds.enter_context(rooms.hub.watch(message_id))
    return EventStream(
        rooms,
        _events(rooms, owner, context_id, message_id, start, first, watch),
        holds.pop_all(),
        on_shutdown=watch.close,
    )


async def _events(
    rooms: Rooms,
    owner: str,
    context_id: str,
    message_id: str,
    sequence: int,
    first: dict[str, Any] | None,
    watch: Watch,
) -> AsyncIterator[bytes]:
    """The chunks after ``sequence`` as they become durable, then the ending."""
    if first is not None:
        yield signals.encode_event(first)
    while True:
        watch.clear()
        try:
            page = await rooms.reader.page(owner, context_id, message_id, sequence, is_watched=True)
        except ContextServerError:
            # The context was deleted, or the database is out of reach: the client comes back and is told why.
            return
        if page.chunks:
            sequence = page.sequence
            yield b"".join(map(signals.chunk_event, page.chunks))
        elif page.final_sequence is not None:
            yield signals.ending_event(page)
            return
        elif watch.closed or rooms.hub.closed:
            yield goodbye()
            return
        elif not await watch.wait(rooms.limits.heartbeat):
            yield signals.encode_event(signals.heartbeat_fields(rooms.hub.heads(owner, [context_id])))

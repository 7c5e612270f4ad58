"""The inline view: the log of one message pushed as server-sent events, in the dialect that the client asks for."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from context_server import records
from context_server.api import forms, schemas, signals
from context_server.api.dialects import DEFAULT, DIALECTS, Dialect
from context_server.api.dialects.table import Ended, Reply
from context_server.api.requests import Rooms, owner_of, parse_query, rooms_of
from context_server.api.speaking import Speaker, ToolNames
from context_server.api.sse import EventStream, admit, goodbye_in_ms
from context_server.errors import ContextServerError, InvalidRequest, SequenceAhead, Violation
from context_server.hub import Watch
from context_server.records import MAX_INTEGER, Page
from context_server.store.idempotency import Replayed

_EVENT_ID = re.compile(r"(?P<sequence>[0-9]{1,16})(?P<end>:end)?")
_BEARER = re.compile(r"[Bb]earer +(?P<key>[\x21-\x7e]{1,512}) *")
_BESIDE = frozenset({"heartbeat", "goodbye"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """How a client wants to be told; ``types`` is None for all."""

    dialect: Dialect = DEFAULT
    types: frozenset[str] | None = None
    named: bool = False


def wire_of(query: forms.InlineQuery) -> Wire:
    """The wire that a client asks for.

    Raises:
        InvalidRequest: the dialect is not known, or has no such type.
    """
    dialect = DEFAULT if query.dialect is None else DIALECTS.get(query.dialect)
    if dialect is None:
        raise InvalidRequest(Violation("query.dialect", f"is not known; known: {', '.join(DIALECTS)}"))
    return Wire(dialect=dialect, types=_types_of(query, dialect), named=query.named == "true")


def _types_of(query: forms.InlineQuery, dialect: Dialect) -> frozenset[str] | None:
    if query.types is None:
        return None
    types = frozenset(filter(None, query.types.split(",")))
    if unknown := types - set(dialect.types) - _BESIDE:
        known = ", ".join(dialect.types)
        raise InvalidRequest(Violation("query.types", f"knows no {', '.join(sorted(unknown))}; known: {known}"))
    return types


def caller_key(request: Request) -> str | None:
    """The key of ``Authorization: Bearer KEY``, by which a caller names itself; None without one."""
    match = _BEARER.fullmatch(request.headers.get("authorization", ""))
    return None if match is None else match["key"]


async def message_events(request: Request) -> Response:
    """The log of a message pushed inline, for ``curl -N`` and simple clients."""
    query = parse_query(request, forms.EventsQuery)
    wire = wire_of(query)
    rooms, owner = rooms_of(request), owner_of(request)
    resumed = _last_event(request)
    start = query.from_sequence if resumed is None else resumed[0]
    # Refuses before the stream begins what could not be said in it.
    if wire.dialect.asks_facts:
        reply = await _reply(request, rooms, owner, wire.dialect, start)
    else:
        reply = _bare_reply(request, owner, start)
        await rooms.reader.page(owner, reply.context_id, reply.message_id, start)
    if resumed is not None and resumed[1]:
        # An EventSource comes back after the end too; this status tells it not to.
        return Response(status_code=204)
    with ExitStack() as holds:
        admit(rooms, holds)
        return open_inline(rooms, owner, reply, wire, holds, begins=resumed is None)


def _bare_reply(request: Request, owner: str, start: int) -> Reply:
    """The reply of a path, of which nothing was read: what most streams need, which are many."""
    return Reply(
        context_id=request.path_params["context_id"],
        message_id=request.path_params["message_id"],
        path=request.url.path.removesuffix("/events"),
        owner_key=caller_key(request) or owner,
        sequence=start,
    )


async def _reply(request: Request, rooms: Rooms, owner: str, dialect: Dialect, start: int) -> Reply:
    """The reply of a path, with what a dialect wants to know of it.

    Raises:
        ContextNotFound, MessageNotFound, SequenceAhead.
    """
    bare = _bare_reply(request, owner, start)
    facts = await rooms.store.wires.reply(
        owner,
        bare.context_id,
        bare.message_id,
        max_bytes=rooms.limits.max_page_bytes,
        question=dialect.asks_question,
        elder=dialect.tells_regenerated,
    )
    if start > facts.message.sequence:
        raise SequenceAhead(start, facts.message.sequence)
    return replace(
        bare,
        run_id=facts.message.run_id,
        question=facts.question,
        is_regenerated=facts.is_regenerated,
    )


def encode_receipt(receipt: records.Receipt) -> str:
    """What a POST that began a reply answers, as JSON."""
    return schemas.Posted.of(receipt).model_dump_json(exclude_none=True)


def wire_of_post(request: Request) -> Wire | None:
    """How the client wants to be told of the reply that its POST begins; None: by an answer, and not by a stream.

    Raises:
        InvalidRequest: as ``wire_of``.
    """
    query = parse_query(request, forms.InlineQuery)
    wire = wire_of(query)
    wants_stream = query.dialect is not None or "text/event-stream" in request.headers.get("accept", "")
    return wire if wants_stream else None


async def answer_post(
    request: Request,
    wire: Wire | None,
    begin: Callable[[], Awaitable[records.Receipt]],
    *,
    question: str | None,
    is_regenerated: bool = False,
) -> Response:
    """Begins a reply, and answers by what was made, or by the stream of the reply.

    ``begin`` keeps its receipt under an idempotency key, if at all, by ``encode_receipt``. ``question`` is the text
    that the reply answers; None where it has to be read.
    """
    rooms, owner = rooms_of(request), owner_of(request)
    headers = {}
    with ExitStack() as holds:
        if wire is not None:
            admit(rooms, holds)  # First, so that a refusal means that nothing was posted.
        try:
            answer = encode_receipt(await begin())
        except Replayed as replay:
            answer = replay.answer
            headers["Idempotency-Replayed"] = "true"
        if wire is None:
            return Response(answer, 202, headers, "application/json")
        posted = schemas.Posted.model_validate_json(answer)
        if question is None and wire.dialect.asks_question:
            question = await _question_of(rooms, owner, posted)
        reply = _reply_to(request, posted, question, is_regenerated=is_regenerated)
        response = open_inline(rooms, owner, reply, wire, holds)
        response.headers.update(headers)
        return response


async def _question_of(rooms: Rooms, owner: str, posted: schemas.Posted) -> str | None:
    ids = posted.context_id, posted.reply_message_id
    facts = await rooms.store.wires.reply(owner, *ids, max_bytes=rooms.limits.max_page_bytes, question=True)
    return facts.question


def _reply_to(request: Request, posted: schemas.Posted, question: str | None, *, is_regenerated: bool) -> Reply:
    """The reply that a POST has just begun."""
    path = request.url.path
    root = path.rpartition("/contexts/")[0] if "/contexts/" in path else path.removesuffix("/chat")
    return Reply(
        context_id=posted.context_id,
        message_id=posted.reply_message_id,
        run_id=posted.run_id,
        path=f"{root}/contexts/{posted.context_id}/messages/{posted.reply_message_id}",
        owner_key=caller_key(request) or owner_of(request),
        question=question,
        is_regenerated=is_regenerated,
        posted=posted.model_dump(mode="json", exclude_none=True),
    )


def _last_event(request: Request) -> tuple[int, bool] | None:
    """The sequence of the last event that the client got, and whether that was the end; None for a new client.

    Raises:
        InvalidRequest: it is no id of ours.
    """
    last_event_id = request.headers.get("last-event-id")
    if not last_event_id:
        return None
    match = _EVENT_ID.fullmatch(last_event_id)
    if match is None or int(match["sequence"]) > MAX_INTEGER:
        raise InvalidRequest(Violation("header.Last-Event-ID", "must be the id of an event of this stream"))
    return int(match["sequence"]), bool(match["end"])


def open_inline(
    rooms: Rooms, owner: str, reply: Reply, wire: Wire, holds: ExitStack, *, begins: bool = True
) -> Response:
    """The stream of a reply after ``reply.sequence``, which takes over ``holds``; ``begins`` with the first event."""
    watch = holds.enter_context(rooms.hub.watch(reply.message_id))
    view = InlineView(rooms, owner, reply, wire, watch)
    return EventStream(rooms, view.events(begins=begins), holds.pop_all(), on_shutdown=watch.close)


class InlineView:
    """One stream of the inline view."""

    def __init__(self, rooms: Rooms, owner: str, reply: Reply, wire: Wire, watch: Watch) -> None:
        self._rooms = rooms
        self._reply = reply
        self._owner = owner
        self._dialect = wire.dialect
        self._watch = watch
        self._page_of = partial(rooms.reader.page, owner, reply.context_id, reply.message_id)
        self._speaker = Speaker(
            wire.dialect, reply, ToolNames(reply.sequence, self._page_of), types=wire.types, named=wire.named
        )

    async def events(self, *, begins: bool) -> AsyncIterator[bytes]:
        """The chunks as they become durable, then the ending."""
        if begins and (begin := self._speaker.begin()):
            yield begin
        sequence = self._reply.sequence
        try:
            while True:
                self._watch.clear()
                page = await self._page_of(sequence, None, is_watched=True)
                if page.chunks:
                    sequence = page.sequence
                    if told := await self._speaker.chunks(page.chunks):
                        yield told
                elif page.final_sequence is not None:
                    yield await self._ending(page)
                    return
                elif self._watch.closed or self._rooms.hub.closed:
                    yield self._goodbye()
                    return
                elif not await self._watch.wait(self._rooms.limits.heartbeat):
                    yield self._heartbeat()
        except ContextServerError:
            # The context was deleted, or the database is out of reach: the client comes back and is told why.
            return

    async def _ending(self, page: Page) -> bytes:
        facts = await self._rooms.store.wires.reply(
            self._owner,
            page.context_id,
            page.message_id,
            max_bytes=self._rooms.limits.max_page_bytes,
            content=self._dialect.asks_content,
        )
        return self._speaker.end(Ended(reply=self._reply, message=facts.message, content=facts.content))

    def _heartbeat(self) -> bytes:
        heads = self._rooms.hub.heads(self._owner, [self._reply.context_id])
        return self._speaker.beside(signals.heartbeat_fields(heads))

    def _goodbye(self) -> bytes:
        retry_ms = goodbye_in_ms()
        return self._speaker.beside(signals.goodbye_fields(retry_ms), retry_ms=retry_ms)

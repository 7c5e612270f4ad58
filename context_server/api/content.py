"""The pull: what the log holds after a sequence. The most frequent request of all, so it is kept bare.

``PullContent`` is an ASGI application, not a function of a request: routed first, it reads the query string by itself
in the common case, and answers from memory without a single await.
"""

import asyncio
import re

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from context_server.api import forms, schemas
from context_server.api.requests import Rooms, owner_of, parse_query, rooms_of
from context_server.errors import ChunkNotFound, InvalidRequest, SequenceAhead, Violation
from context_server.records import MAX_INTEGER, Chunk, Page

_COMMON_QUERY = re.compile(rb"from_sequence=([0-9]{1,15})")
_SEQUENCE = re.compile(r"[1-9][0-9]{0,15}")
_IMMUTABLE = b"private, max-age=31536000, immutable"
_REVALIDATE = b"private, no-cache"


def etag_of(page: Page, view: str, epoch: str) -> str:
    """A strong ETag: it names everything that the answer's bytes are made from."""
    if page.closed:
        return f'"{page.message_id}:{page.from_sequence}-{page.sequence}:{view}:{epoch}"'
    reach = "all" if page.up_to_date else "more"
    return f'"{page.message_id}:{page.from_sequence}-{page.sequence}:{page.status}:{reach}:{view}:{epoch}"'


class PullContent:
    """GET /contexts/{id}/messages/{msg}/content."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a pull."""
        request = Request(scope, receive)
        rooms = rooms_of(request)
        match = _COMMON_QUERY.fullmatch(scope["query_string"])
        path = scope["path_params"]
        page, view = None, "content"
        if match is not None:
            page = rooms.reader.recent_page(
                owner_of(request), path["context_id"], path["message_id"], int(match[1]), None
            )
        if page is None:
            query = parse_query(request, forms.ContentQuery)
            view = query.view
            page = await self._page(rooms, owner_of(request), path["context_id"], path["message_id"], query)
        await self._answer(scope, send, page, view, rooms)

    async def _page(
        self, rooms: Rooms, owner: str, context_id: str, message_id: str, query: forms.ContentQuery
    ) -> Page:
        start, stop = query.from_sequence, query.to_sequence
        if stop is not None and stop < start:
            raise InvalidRequest(Violation("query.to_sequence", "must not be less than from_sequence"))
        page = await rooms.reader.page(owner, context_id, message_id, start, stop)
        if query.wait <= 0 or not _is_waiting(page):
            return page
        deadline = asyncio.get_running_loop().time() + query.wait
        with rooms.hub.watch(message_id) as watch:
            while True:
                watch.clear()
                page = await rooms.reader.page(owner, context_id, message_id, start, stop, is_watched=True)
                left = deadline - asyncio.get_running_loop().time()
                if not _is_waiting(page) or left <= 0 or rooms.hub.closed:
                    return page
                await watch.wait(left)

    async def _answer(self, scope: Scope, send: Send, page: Page, view: str, rooms: Rooms) -> None:
        epoch = rooms.store.epoch
        rooms.hub.pulled(page.message_id, page.sequence)
        etag = etag_of(page, view, epoch).encode()
        headers = [(b"etag", etag), (b"cache-control", _IMMUTABLE if page.closed else _REVALIDATE)]
        for name, value in scope["headers"]:
            if name == b"if-none-match" and (etag in value or value == b"*"):
                await send({"type": "http.response.start", "status": 304, "headers": headers})
                await send({"type": "http.response.body", "body": b""})
                return
        path = scope["path"].removesuffix("/content") if view == "chunks" else ""
        body = schemas.content_body(page, view, epoch, path)
        headers.append((b"content-type", b"application/json"))
        headers.append((b"content-length", b"%d" % len(body)))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _is_waiting(page: Page) -> bool:
    """Whether the message is open and has nothing new yet."""
    return not page.chunks and page.final_sequence is None and not page.closed


async def get_chunk(request: Request) -> Response:
    """One chunk, whole however long it is; its bytes never change."""
    rooms, path = rooms_of(request), request.path_params
    chunk = await _chunk(rooms, owner_of(request), path["context_id"], path["message_id"], path["sequence"])
    etag = f'"{path["message_id"]}:{chunk.sequence}:whole:{rooms.store.epoch}"'
    headers = {"ETag": etag, "Cache-Control": _IMMUTABLE.decode()}
    known = request.headers.get("if-none-match", "")
    if known.strip() == "*" or etag in known:
        return Response(status_code=304, headers=headers)
    return Response(schemas.whole_chunk_body(chunk), headers=headers, media_type="application/json")


async def _chunk(rooms: Rooms, owner: str, context_id: str, message_id: str, named: str) -> Chunk:
    if not _SEQUENCE.fullmatch(named) or int(named) > MAX_INTEGER:
        await rooms.reader.page(owner, context_id, message_id, 0, 0)  # What is missing is named: the message, or this.
        raise ChunkNotFound(named)
    sequence = int(named)
    try:
        page = await rooms.reader.page(owner, context_id, message_id, sequence - 1, sequence)
    except SequenceAhead as refusal:
        raise SequenceAhead(sequence, refusal.sequence) from None
    if not page.chunks:
        raise SequenceAhead(sequence, page.head)
    return page.chunks[0]

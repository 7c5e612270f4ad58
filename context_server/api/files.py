"""Files: upload, list, read, delete."""

import asyncio
import json
import re
from typing import BinaryIO
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from context_server.api import forms, schemas
from context_server.api.contexts import JSON, before_of
from context_server.api.multipart import FilePart, boundary_of
from context_server.api.problems import ContentTooLarge, RangeNotSatisfiable, UnsupportedMediaType
from context_server.api.requests import once_of, owner_of, parse_query, rooms_of, stream_body
from context_server.files import Files, Upload
from context_server.records import FileRef
from context_server.store.files import StoredFile
from context_server.store.idempotency import Once, Replayed

_FORM = "multipart/form-data"
_FORM_BYTES = 16_384
"""What a body of one part may have around its file: boundaries and headers."""
_READ_BYTES = 262_144
_MEDIA_TYPE = re.compile(r"[a-z0-9][a-z0-9!#$&^_.+-]{0,62}/[a-z0-9][a-z0-9!#$&^_.+-]{0,62}")
_RANGE = re.compile(r"bytes=(?P<first>[0-9]{0,15})-(?P<last>[0-9]{0,15})")


def _media_type_of(header: str) -> str:
    """``Text/Plain; charset=utf-8`` → ``text/plain``; anything that is none is ``application/octet-stream``."""
    media_type = header.partition(";")[0].strip().lower()
    return media_type if _MEDIA_TYPE.fullmatch(media_type) else "application/octet-stream"


def _encode_file(file: StoredFile) -> str:
    return schemas.File.of(file).model_dump_json()


async def upload_file(request: Request) -> Response:
    """Stores a file: the body as it is, or the one part of a ``multipart/form-data`` body."""
    query = parse_query(request, forms.FileQuery)
    rooms, owner = rooms_of(request), owner_of(request)
    media_type = _media_type_of(request.headers.get("content-type", ""))
    headers = {"Cache-Control": "private, no-cache"}
    async with rooms.files.upload() as upload:
        sent_name = None
        if media_type == _FORM:
            sent_name, media_type = await _take_part(request, rooms.files, upload)
        else:
            await _take_body(request, rooms.files, upload, media_type)
        name = query.name or sent_name or ""

        def once(sha256: str) -> Once[StoredFile] | None:
            return once_of(request, "\n".join((sha256, media_type, name)).encode("utf-8", "replace"), _encode_file)

        try:
            answer = _encode_file(await upload.keep(owner, name=name, media_type=media_type, once=once))
        except Replayed as replay:
            answer = replay.answer
            headers["Idempotency-Replayed"] = "true"
    headers["Location"] = f"{request.url.path}/{json.loads(answer)['id']}"
    return Response(answer, 201, headers, JSON)


def _require_taken(files: Files, media_type: str) -> None:
    if not files.takes(media_type):
        taken = ", ".join(files.types)
        raise UnsupportedMediaType(f"Files of the type {media_type} are not taken; taken are: {taken}.")


async def _take_body(request: Request, files: Files, upload: Upload, media_type: str) -> None:
    _require_taken(files, media_type)
    async for piece in stream_body(request, files.max_bytes):
        await upload.write(piece)


async def _take_part(request: Request, files: Files, upload: Upload) -> tuple[str, str]:
    """Takes the file out of a form; its name and its media type."""
    part = FilePart(boundary_of(request.headers["content-type"]))
    media_type = None
    async for piece in stream_body(request, files.max_bytes + _FORM_BYTES):
        data = part.feed(piece)
        if media_type is None and part.media_type is not None:
            media_type = _media_type_of(part.media_type)
            _require_taken(files, media_type)
        if data:
            await upload.write(data)
        if upload.size_bytes > files.max_bytes:
            raise ContentTooLarge(f"The file has more than the {files.max_bytes} bytes that are allowed.")
    part.close()
    return part.name or "", media_type or ""


async def list_files(request: Request) -> Response:
    """The caller's files, newest first."""
    query = parse_query(request, forms.PageQuery)
    files, following = await rooms_of(request).store.files.page(
        owner_of(request), before=before_of(query.cursor), limit=query.limit
    )
    page = schemas.FilePage(
        items=[schemas.File.of(file) for file in files],
        next_cursor=None if following is None else schemas.encode_cursor(*following),
    )
    return Response(schemas.dump(page), media_type=JSON, headers={"Cache-Control": "private, no-cache"})


async def get_file(request: Request) -> Response:
    """The bytes of a file, or a range of them. A browser saves them, and never shows or runs them as a page."""
    file, opened = await rooms_of(request).files.open(owner_of(request), request.path_params["file_id"])
    try:
        headers = _headers_of(file.ref)
        known = request.headers.get("if-none-match", "")
        if known.strip() == "*" or headers["ETag"] in known:
            opened.close()
            return Response(status_code=304, headers=headers)
        return FileAnswer(opened, file.ref.size_bytes, _range_of(request, file.ref), headers)
    except BaseException:
        opened.close()
        raise


async def delete_file(request: Request) -> Response:
    """Deletes a file. Messages keep what they say of it, and no agent can read it any more."""
    await rooms_of(request).files.delete(owner_of(request), request.path_params["file_id"])
    return Response(status_code=204)


def _headers_of(file: FileRef) -> dict[str, str]:
    return {
        "ETag": f'"{file.sha256}"',
        "Cache-Control": "private, no-cache",  # It never changes, and may be deleted.
        "Content-Type": file.media_type,
        "Content-Disposition": f"attachment; filename*=utf-8''{quote(file.name, safe='')}",
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "sandbox",
        "Accept-Ranges": "bytes",
    }


def _range_of(request: Request, file: FileRef) -> tuple[int, int] | None:
    """First byte and end of the one range that is asked for; None for the whole.

    What is no range, or several of them, counts as none, as RFC 9110 (14.2) allows.

    Raises:
        RangeNotSatisfiable: there is nothing in it.
    """
    condition = request.headers.get("if-range", f'"{file.sha256}"')
    match = _RANGE.fullmatch(request.headers.get("range", "").strip().lower())
    if match is None or request.method != "GET" or condition != f'"{file.sha256}"':
        return None
    size, first, last = file.size_bytes, match["first"], match["last"]
    if not first and not last:
        return None
    start = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    if first and last and int(last) < int(first):
        return None
    if start >= size:
        raise RangeNotSatisfiable(size)
    return start, end


class FileAnswer(Response):
    """An open file as an answer, read in threads piece by piece; it closes the file.

    Starlette's FileResponse opens by path, after it has sent that all is well: a file that is deleted in that moment
    would break off its answer. And it refuses ranges by answers that are no problem documents.
    """

    def __init__(self, opened: BinaryIO, size: int, part: tuple[int, int] | None, headers: dict[str, str]) -> None:
        self._opened = opened
        self._start, self._end = part or (0, size)
        length = {"Content-Length": str(self._end - self._start)}
        if part is not None:
            length["Content-Range"] = f"bytes {self._start}-{self._end - 1}/{size}"
        super().__init__(None, 200 if part is None else 206, headers | length)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it, as long as somebody is there."""
        request = Request(scope, receive)
        with self._opened as file:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            if scope["method"] == "HEAD":
                await send({"type": "http.response.body", "body": b""})
                return
            left = self._end - self._start
            await asyncio.to_thread(file.seek, self._start)
            while True:
                piece = await asyncio.to_thread(file.read, min(_READ_BYTES, left)) if left else b""
                left -= len(piece)
                more = bool(piece) and left > 0 and not await request.is_disconnected()
                await send({"type": "http.response.body", "body": piece, "more_body": more})
                if not more:
                    return

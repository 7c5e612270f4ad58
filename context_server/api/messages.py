"""Messages: post, list, read."""

from starlette.requests import Request
from starlette.responses import Response

from context_server import records
from context_server.api import forms, schemas
from context_server.api.contexts import JSON, bounded, foreign_cursor
from context_server.api.inline import answer_post, encode_receipt, wire_of_post
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
from context_server.api.slash import answer_response
from context_server.errors import InvalidRequest, Violation
from context_server.store.exchanges import HEAD, Post


async def post_message(request: Request) -> Response:
    """Posts a user's message and starts a run; with ``Accept: text/event-stream``, the reply as an inline stream.

    A message that is a command, such as ``/help``, is carried out at once and stored nowhere.
    """
    body = await read_body(request)
    new = parse_body(body, forms.NewMessage)
    wire = wire_of_post(request)
    rooms, owner = rooms_of(request), owner_of(request)
    text = new.payload.content if isinstance(new.payload, forms.TextPayload) else ""
    if (command := rooms.slash.find(text)) is not None:
        return answer_response(await rooms.slash.execute(owner, request.path_params["context_id"], *command))

    async def post() -> records.Receipt:
        return await rooms.commands.post_message(
            owner,
            request.path_params["context_id"],
            await _post_of(new, rooms, owner),
            if_match=if_match(request),
            once=once_of(request, body, encode_receipt),
        )

    return await answer_post(request, wire, post, question=getattr(new.payload, "content", ""))


async def _post_of(new: forms.NewMessage, rooms: Rooms, owner: str) -> Post:
    """What is to be stored of a message, with what its files are.

    Raises:
        FileUnknown: it refers to a file that is not there.
        InvalidRequest: it is to steer, and to go on from elsewhere.
    """
    text, workflow = "", None
    files: tuple[records.FileRef, ...] = ()
    match new.payload:
        case forms.TextPayload(content=text, files=file_ids):
            text = rooms.slash.unescaped(text)
            files = await rooms.store.files.refs(owner, file_ids)
        case forms.FilePayload(content=text, file_id=file_id):
            files = await rooms.store.files.refs(owner, [file_id])
        case forms.WorkflowPayload(name=name, input=given):
            workflow = records.WorkflowCall(name=name, input=given)
    if new.if_busy is records.IfBusy.STEER and "parent_id" in new.model_fields_set:
        raise InvalidRequest(Violation("body.parent_id", "cannot be given with if_busy 'steer'"))
    return Post(
        text=text,
        display=new.payload.display,
        client_metadata=new.client_metadata,
        files=files,
        workflow=workflow,
        parent_id=new.parent_id if "parent_id" in new.model_fields_set else HEAD,
        if_busy=new.if_busy,
    )


async def regenerate(request: Request) -> Response:
    """Makes another reply beside one that is there, and answers as a posted message is; the text of both stays."""
    body = await read_body(request)
    parse_body(body or b"{}", forms.Nothing)
    wire = wire_of_post(request)
    rooms, path = rooms_of(request), request.path_params

    async def begin() -> records.Receipt:
        return await rooms.commands.regenerate(
            owner_of(request),
            path["context_id"],
            path["message_id"],
            if_match=if_match(request),
            once=once_of(request, body, encode_receipt),
        )

    return await answer_post(request, wire, begin, question=None, is_regenerated=True)


async def list_messages(request: Request) -> Response:
    """The head's line, or with ``tree=true`` all messages; with ``include=content``, each with its text so far."""
    query = parse_query(request, forms.MessagesQuery)
    rooms = rooms_of(request)
    messages, following = await rooms.store.messages(
        owner_of(request),
        request.path_params["context_id"],
        after=_after(query.cursor),
        limit=query.limit,
        include_content=query.include == "content",
        max_bytes=rooms.limits.max_page_bytes,
        tree=query.tree == "true",
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

"""Contexts: create, list, read, change, delete."""

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from context_server import records
from context_server.api import forms, schemas
from context_server.api.requests import if_match, once_of, owner_of, parse_body, parse_query, read_body, rooms_of
from context_server.errors import InvalidRequest, Violation
from context_server.store.idempotency import Replayed

JSON = "application/json"


def context_response(body: bytes | str, *, status: int = 200, replayed: bool = False) -> Response:
    """A context as an answer; its version is the strong ETag that If-Match takes."""
    version = json.loads(body)["version"]
    headers = {"ETag": f'"{version}"', "Cache-Control": "private, no-cache"}
    if replayed:
        headers["Idempotency-Replayed"] = "true"
    return Response(body, status, headers, JSON)


def encode_context(context: records.Context) -> str:
    """A context as JSON."""
    return schemas.Context.of(context).model_dump_json()


async def create_context(request: Request) -> Response:
    """Creates a context."""
    body = await read_body(request)
    new = parse_body(body or b"{}", forms.NewContext)
    once = once_of(request, body, encode_context)
    replayed = False
    try:
        context = await rooms_of(request).store.create_context(
            owner_of(request), title=new.title, mode=new.mode, metadata=new.metadata, once=once
        )
        answer = encode_context(context)
    except Replayed as replay:
        answer, replayed = replay.answer, True
    response = context_response(answer, status=201, replayed=replayed)
    response.headers["Location"] = f"{request.url.path}/{json.loads(answer)['id']}"
    return response


async def fork_context(request: Request) -> Response:
    """Makes a new context that shares the history of another up to a message."""
    body = await read_body(request)
    new = parse_body(body, forms.NewFork)
    replayed = False
    try:
        context = await rooms_of(request).store.fork_context(
            owner_of(request),
            request.path_params["context_id"],
            new.message_id,
            title=new.title,
            once=once_of(request, body, encode_context),
        )
        answer = encode_context(context)
    except Replayed as replay:
        answer, replayed = replay.answer, True
    response = context_response(answer, status=201, replayed=replayed)
    contexts_path = request.url.path.rsplit("/", 2)[0]
    response.headers["Location"] = f"{contexts_path}/{json.loads(answer)['id']}"
    return response


async def list_contexts(request: Request) -> Response:
    """The caller's contexts, most recently active first."""
    query = parse_query(request, forms.PageQuery)
    contexts, following = await rooms_of(request).store.contexts(
        owner_of(request), before=before_of(query.cursor), limit=query.limit
    )
    page = schemas.ContextPage(
        items=[schemas.Context.of(context) for context in contexts],
        next_cursor=None if following is None else schemas.encode_cursor(*following),
    )
    return Response(schemas.dump(page), media_type=JSON, headers={"Cache-Control": "private, no-cache"})


def before_of(cursor: str | None) -> tuple[int, str] | None:
    """The time and the id that a page of a list, newest first, begins after.

    Raises:
        InvalidRequest: the cursor is none of ours.
    """
    if cursor is None:
        return None
    try:
        moment, context_id = schemas.decode_cursor(cursor)
        if "\x00" in context_id:
            raise ValueError(context_id)  # noqa: TRY301  # As every other cursor that is none of ours.
        return bounded(moment), context_id
    except ValueError:
        raise foreign_cursor() from None


def bounded(number: str) -> int:
    """A number out of a cursor.

    Raises:
        ValueError: it is none, or too large for the database.
    """
    value = int(number)
    if not 0 <= value <= records.MAX_INTEGER:
        raise ValueError(number)
    return value


def foreign_cursor() -> InvalidRequest:
    """The failure of a cursor that is none of ours."""
    return InvalidRequest(Violation("query.cursor", "is not a cursor of this list; use next_cursor of the page before"))


async def get_context(request: Request) -> Response:
    """One context."""
    context = await rooms_of(request).store.context(owner_of(request), request.path_params["context_id"])
    response = context_response(encode_context(context))
    known = request.headers.get("if-none-match", "")
    if known == "*" or response.headers["etag"] in known:
        return Response(status_code=304, headers={"ETag": response.headers["etag"]})
    return response


async def change_context(request: Request) -> Response:
    """Changes title, mode, metadata or head of a context; fields that are left out stay."""
    change = parse_body(await read_body(request), forms.ContextChange)
    changes: dict[str, Any] = {name: getattr(change, name) for name in change.model_fields_set}
    models = rooms_of(request).slash.facts.models
    if change.model is not None and change.model not in models:
        raise InvalidRequest(Violation("body.model", f"must be null or one of: {', '.join(models) or '(none)'}"))
    context = await rooms_of(request).commands.change_context(
        owner_of(request), request.path_params["context_id"], changes, if_match=if_match(request)
    )
    return context_response(encode_context(context))


async def delete_context(request: Request) -> Response:
    """Deletes a context with its messages, cancelling what runs."""
    await rooms_of(request).commands.delete_context(
        owner_of(request), request.path_params["context_id"], if_match=if_match(request)
    )
    return Response(status_code=204)

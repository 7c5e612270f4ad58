"""Slash commands over HTTP, and what replies have used."""

from dataclasses import asdict

from starlette.requests import Request
from starlette.responses import Response

from context_server import slash
from context_server.api import forms, schemas
from context_server.api.contexts import JSON
from context_server.api.requests import owner_of, parse_body, parse_query, read_body, rooms_of


def answer_response(answer: slash.Answer) -> Response:
    """What a command answers."""
    status = "error" if answer.is_error else "success"
    body = schemas.CommandAnswer(status=status, message=answer.message, data=dict(answer.data))
    return Response(schemas.dump(body), media_type=JSON, headers={"Cache-Control": "no-store"})


async def execute_command(request: Request) -> Response:
    """Carries a command out at once."""
    new = parse_body(await read_body(request), forms.NewCommand)
    typed = new.command if new.command.startswith("/") else f"/{new.command}"
    name, args = slash.parse(typed) or (new.command.lstrip("/"), ())
    answer = await rooms_of(request).slash.execute(owner_of(request), new.context_id, name, (*args, *new.args))
    return answer_response(answer)


async def usage(request: Request) -> Response:
    """What the caller's replies have used, or those of one context."""
    query = parse_query(request, forms.UsageQuery)
    used, replies = await rooms_of(request).store.usage(owner_of(request), query.context)
    body = schemas.UsageTotal(context_id=query.context, replies=replies, **asdict(used))
    return Response(schemas.dump(body), media_type=JSON, headers={"Cache-Control": "private, no-cache"})

"""Commands on what runs, and the state machine that says which are allowed."""

from starlette.requests import Request
from starlette.responses import Response

from context_server.api import forms, schemas
from context_server.api.contexts import JSON, context_response, encode_context
from context_server.api.requests import if_match, once_of, owner_of, parse_body, read_body, rooms_of
from context_server.store.idempotency import Replayed


async def cancel(request: Request) -> Response:
    """Cancels what runs or waits. With nothing to cancel, the context as it is."""
    body = await read_body(request)
    parse_body(body or b"{}", forms.Nothing)
    try:
        context = await rooms_of(request).commands.cancel(
            owner_of(request),
            request.path_params["context_id"],
            if_match=if_match(request),
            once=once_of(request, body, encode_context),
        )
    except Replayed as replay:
        return context_response(replay.answer, status=202, replayed=True)
    return context_response(encode_context(context), status=202)


async def machine(_request: Request) -> Response:
    """The state machine of a context, as an XState v5 machine."""
    return Response(schemas.dump(schemas.machine_body()), media_type=JSON)

"""What runs and waits: cancel, approvals, the queue, and the state machine that says what is allowed."""

from starlette.requests import Request
from starlette.responses import Response

from context_server.api import forms, schemas
from context_server.api.contexts import JSON, context_response, encode_context
from context_server.api.requests import if_match, once_of, owner_of, parse_body, parse_query, read_body, rooms_of
from context_server.errors import InvalidRequest, Violation
from context_server.records import ApprovalStatus
from context_server.store.approvals import Decision
from context_server.store.idempotency import Replayed

_FRESH = {"Cache-Control": "private, no-cache"}


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


async def list_approvals(request: Request) -> Response:
    """The calls that wait for a person to decide on them, or all that ever did."""
    query = parse_query(request, forms.ApprovalsQuery)
    found = await rooms_of(request).store.suspension.approvals(
        owner_of(request), request.path_params["context_id"], only_pending=query.status == "pending"
    )
    answer = schemas.Approvals(items=[schemas.Approval.of(approval) for approval in found])
    return Response(schemas.dump(answer), media_type=JSON, headers=_FRESH)


async def decide(request: Request) -> Response:
    """Approves or denies a call: once, whoever is first; the same decision again changes nothing."""
    new = parse_body(await read_body(request), forms.NewDecision)
    if new.arguments is not None and new.decision == "deny":
        raise InvalidRequest(Violation("body.arguments", "may be given with an approval only"))
    path = request.path_params
    status = ApprovalStatus.APPROVED if new.decision == "approve" else ApprovalStatus.DENIED
    approval = await rooms_of(request).commands.decide(
        owner_of(request),
        path["context_id"],
        path["approval_id"],
        Decision(status=status, note=new.note, arguments=new.arguments),
        if_match=if_match(request),
    )
    return Response(schemas.dump(schemas.Approval.of(approval)), media_type=JSON, headers=_FRESH)


async def list_queue(request: Request) -> Response:
    """What waits in a context, in the order of its turns."""
    found = await rooms_of(request).store.suspension.waiting(owner_of(request), request.path_params["context_id"])
    answer = schemas.Queue(
        items=[
            schemas.Waiting(
                message_id=message.id,
                reply_message_id=reply_id,
                payload=schemas.MessagePayload.of(message),
                created_at=message.created_at,
            )
            for message, reply_id in found
        ]
    )
    return Response(schemas.dump(answer), media_type=JSON, headers=_FRESH)


async def remove_from_queue(request: Request) -> Response:
    """Takes back a message that waits, with its reply."""
    path = request.path_params
    await rooms_of(request).commands.remove_waiting(
        owner_of(request), path["context_id"], path["message_id"], if_match=if_match(request)
    )
    return Response(status_code=204)


async def machine(_request: Request) -> Response:
    """The state machine of a context, as an XState v5 machine."""
    return Response(schemas.dump(schemas.machine_body()), media_type=JSON)

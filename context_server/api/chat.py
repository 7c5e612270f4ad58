"""Post and stream in one call, for frontends that know no contexts: the conversation is the caller's own."""

import hashlib
import json
import uuid
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from context_server import records, slash
from context_server.api import forms, schemas, signals
from context_server.api.dialects import NEXUS
from context_server.api.inline import Wire, answer_post, caller_key, encode_receipt
from context_server.api.requests import Rooms, once_of, owner_of, parse_body, read_body, rooms_of
from context_server.api.sse import HEADERS
from context_server.store.exchanges import Post

_CLIENT_FIELDS = ("client_timestamp_utc", "client_timezone_offset")


def conversation_id(owner: str, key: str) -> str:
    """The id of the conversation of a key: a UUIDv8 (RFC 9562, section 5.8) of the SHA-256 of owner and key.

    Owner and key do not run into each other: no key holds a NUL.
    """
    value = int.from_bytes(hashlib.sha256(f"{owner}\x00{key}".encode()).digest()[:16])
    value = value & ~(0xF << 76) | 0x8 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return str(uuid.UUID(int=value))


async def chat(request: Request) -> Response:
    """Posts a user's message and streams the reply, in the dialect ``nexus``.

    A message that is a command, such as ``/help``, is carried out at once and stored nowhere.
    """
    body = await read_body(request)
    new = parse_body(body, forms.NewChat)
    rooms, owner, key = rooms_of(request), owner_of(request), caller_key(request)
    context_id = await _context_of(rooms, owner, new, key)
    if (command := rooms.slash.find(new.content)) is not None:
        return _command_result(await rooms.slash.execute(owner, context_id, *command))

    async def post() -> records.Receipt:
        # The context counts too: the same words of another caller are another request.
        once = once_of(request, body + context_id.encode(), encode_receipt)
        return await rooms.commands.post_message(owner, context_id, _post_of(new, rooms), if_match=None, once=once)

    return await answer_post(request, Wire(dialect=NEXUS), post, question=new.content)


def _command_result(answer: slash.Answer) -> Response:
    """A stream of one event: what a command answers."""
    status = "error" if answer.is_error else "success"
    payload = schemas.CommandAnswer(status=status, message=answer.message, data=dict(answer.data))
    fields = {"event": "command_result", "run_id": None, "payload": payload.model_dump(mode="json")}
    return Response(signals.frame_event(json.dumps(fields), name="command_result"), headers=HEADERS)


async def _context_of(rooms: Rooms, owner: str, new: forms.NewChat, key: str | None) -> str:
    """The context that the message is for; the caller's own is made when it is not there."""
    if new.context_id is not None:
        return new.context_id
    context = await rooms.store.wires.conversation(owner, conversation_id(owner, key or ""))
    return context.id


def _post_of(new: forms.NewChat, rooms: Rooms) -> Post:
    given: dict[str, Any] = new.model_dump(include=new.model_fields_set & set(_CLIENT_FIELDS))
    return Post(text=rooms.slash.unescaped(new.content), client_metadata=given)

"""Reads requests: whose they are, their bodies, query parameters and conditions; every refusal names what was wrong."""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from context_server.api.problems import BodyTooSlow, ContentTooLarge, InvalidJson, UnsupportedMediaType
from context_server.bus import Bus
from context_server.commands import Commands
from context_server.errors import InvalidRequest, Violation
from context_server.files import Files
from context_server.hub import Hub
from context_server.ledger import Ledger
from context_server.metrics import Metrics
from context_server.reader import Reader
from context_server.records import MAX_INTEGER
from context_server.relay import Relay
from context_server.runner import Runner
from context_server.slash import SlashCommands
from context_server.store import Store
from context_server.store.idempotency import Once

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")

LOCAL_OWNER = "local"

BODY_SECONDS = 30.0
"""Time for a body to arrive: a peer that announces one and sends nothing would hold a connection for ever."""

UPLOAD_SECONDS = 3600.0
"""Time for all pieces of a body that may be long, each of which has ``BODY_SECONDS``."""

_VERSION_TAG = re.compile(r'"([0-9]{1,16})"')
_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<lone>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiLimits:
    """The bounds that the routes keep; times in seconds.

    ``send_timeout`` is None where the HTTP server itself cuts readers that stall.
    """

    max_body_bytes: int
    max_page_bytes: int
    max_streams: int
    max_contexts_per_stream: int
    heartbeat: float
    send_timeout: float | None
    idempotency_lifetime_ms: int


@dataclass(slots=True)
class OpenStreams:
    """How many streams are open now."""

    count: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rooms:
    """What the routes may use; the application's lifespan opens and closes it."""

    store: Store
    bus: Bus
    ledger: Ledger
    reader: Reader
    files: Files
    relay: Relay | None
    """None where no other node writes."""
    hub: Hub
    commands: Commands
    runner: Runner
    slash: SlashCommands
    metrics: Metrics
    limits: ApiLimits
    agent_name: str
    worker: int | None = None
    """This process's number among those that serve one port; None where it is alone."""
    open_streams: OpenStreams = field(default_factory=OpenStreams)


def rooms_of(request: Request) -> Rooms:
    """The rooms of the application that serves this request."""
    rooms: Rooms = request.app.state.rooms
    return rooms


def owner_of(_request: Request) -> str:
    """Whose contexts the request may see. There is one owner so far; every query is scoped by it all the same."""
    return LOCAL_OWNER


_PAYLOADS = ("text", "file", "workflow")


def _place(location: tuple[int | str, ...], problem: str) -> list[str]:
    """Where a field stands in what was sent; pydantic also names the kind of payload that it took it for."""
    if location[:1] == ("payload",) and location[1:2] and location[1] in _PAYLOADS:
        location = ("payload", *location[2:])
    if problem.startswith("union_tag_"):
        location = (*location, "type")
    return [str(part) for part in location]


def _violations(error: ValidationError, where: str) -> InvalidRequest:
    """What a model found wrong, without repeating what was sent."""
    return InvalidRequest(
        *(
            Violation(
                ".".join([where, *_place(found["loc"], found["type"])]), found["msg"].removeprefix("Value error, ")
            )
            for found in error.errors(include_input=False, include_url=False, include_context=False)
        )
    )


async def read_body(request: Request) -> bytes:
    """The whole body.

    Raises:
        UnsupportedMediaType: there is one, and it is not declared as JSON.
        ContentTooLarge: it exceeds ``max_body_bytes``; no more of it is read.
        BodyTooSlow: it does not arrive.
    """
    limit = rooms_of(request).limits.max_body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise ContentTooLarge(f"The body has {declared} bytes; at most {limit} are allowed.")
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise ContentTooLarge(f"The body has more than the {limit} bytes that are allowed.")
                parts.append(part)
    except ClientDisconnect:
        raise BodyTooSlow("The client left before the body was complete.") from None
    except TimeoutError:
        raise BodyTooSlow(f"The body did not arrive within {BODY_SECONDS:g} seconds.") from None
    _require_json(request, has_body=size > 0)
    return b"".join(parts)


async def stream_body(request: Request, limit_bytes: int) -> AsyncIterator[bytes]:
    """The body in pieces, as it arrives; to be iterated to its end.

    Raises:
        ContentTooLarge: it exceeds the limit; no more of it is read.
        BodyTooSlow: it does not arrive.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit_bytes:
        raise ContentTooLarge(f"The body has {declared} bytes; at most {limit_bytes} are allowed.")
    clock = asyncio.get_running_loop().time
    end = clock() + UPLOAD_SECONDS
    pieces = request.stream()
    size = 0
    while True:
        try:
            async with asyncio.timeout(min(BODY_SECONDS, max(0.0, end - clock()))):
                piece = await anext(pieces, None)
        except ClientDisconnect:
            raise BodyTooSlow("The client left before the body was complete.") from None
        except TimeoutError:
            raise BodyTooSlow("The body arrives too slowly.") from None
        if piece is None:
            return
        size += len(piece)
        if size > limit_bytes:
            raise ContentTooLarge(f"The body has more than the {limit_bytes} bytes that are allowed.")
        if piece:
            yield piece


def _require_json(request: Request, *, has_body: bool) -> None:
    media_type = request.headers.get("content-type")
    if media_type is None and not has_body:
        return
    if (media_type or "").partition(";")[0].strip().lower() != "application/json":
        sent = media_type or "nothing"
        raise UnsupportedMediaType(f"Content-Type must be application/json, not {sent}.")


def parse_body(body: bytes, model: type[M]) -> M:
    """The body as a model.

    Raises:
        InvalidJson: it is not JSON in UTF-8, or nested too deep.
        InvalidRequest: it is not of the model's shape.
    """
    try:
        return model.model_validate_json(_without_lone_surrogates(body))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        if first["type"] == "json_invalid":
            raise InvalidJson(f"The body is not JSON: {first['ctx']['error']}.") from None
        raise _violations(error, "body") from None


def _without_lone_surrogates(body: bytes) -> bytes:
    """JSON in which each escaped lone surrogate is U+FFFD: RFC 8259 allows them, and the parser refuses them."""
    if _SURROGATE_ESCAPE.search(body) is None:
        return body
    return _ESCAPE.sub(lambda found: rb"\ufffd" if found["lone"] else found[0], body)


def parse_query(request: Request, model: type[M]) -> M:
    """The query parameters as a model; a parameter may be repeated only where the model has a tuple.

    Raises:
        InvalidRequest: one is unknown, repeated, or not of its shape.
    """
    values: dict[str, object] = {}
    for name in request.query_params:
        given = request.query_params.getlist(name)
        field = model.model_fields.get(name)
        if field is not None and field.default == ():
            values[name] = tuple(given)
        elif len(given) > 1:
            raise InvalidRequest(Violation(f"query.{name}", "may be given once"))
        else:
            values[name] = given[0]
    try:
        return model.model_validate(values)
    except ValidationError as error:
        known = ", ".join(model.model_fields) or "none"
        failure = _violations(error, "query")
        raise InvalidRequest(
            *(
                Violation(found.where, f"is not known here; known: {known}")
                if found.detail == "Extra inputs are not permitted"
                else found
                for found in failure.violations
            )
        ) from None


def if_match(request: Request) -> int | None:
    """The version that ``If-Match: "5"`` demands; None without one, or with ``*``.

    Raises:
        InvalidRequest: it is not a version in quotes.
    """
    header = request.headers.get("if-match")
    if header is None or header.strip() == "*":
        return None
    match = _VERSION_TAG.fullmatch(header.strip())
    if match is None or int(match[1]) > MAX_INTEGER:
        raise InvalidRequest(Violation("header.If-Match", 'must be a version in quotes, such as "5", or *'))
    return int(match[1])


def once_of(request: Request, body: bytes, encode: Callable[[T], str]) -> Once[T] | None:
    """The request's idempotency key with what it was used for; None without one.

    Raises:
        InvalidRequest: the key is not 1 to 255 visible ASCII characters.
    """
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not _IDEMPOTENCY_KEY.fullmatch(key):
        raise InvalidRequest(Violation("header.Idempotency-Key", "must be 1 to 255 visible ASCII characters"))
    what = b"\n".join((request.method.encode(), request.url.path.encode(), body))
    return Once(
        key=key,
        fingerprint=hashlib.sha256(what).hexdigest(),
        encode=encode,
        lifetime_ms=rooms_of(request).limits.idempotency_lifetime_ms,
    )

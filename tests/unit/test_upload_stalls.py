"""A body that does not arrive: each piece has its time, and all of them together."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import pytest
from starlette.requests import Request

from context_server.api import requests
from context_server.api.problems import BodyTooSlow, ContentTooLarge
from context_server.api.requests import stream_body

Receive = Callable[[], Awaitable[dict[str, Any]]]


def request_of(receive: Receive, **headers: str) -> Request:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "headers": raw}, receive)


def sends(*messages: dict[str, Any]) -> Receive:
    """A client that sends so much, and then nothing at all."""
    left = list(messages)

    async def receive() -> dict[str, Any]:
        if not left:
            await anyio.sleep_forever()
        return left.pop(0)

    return receive


def piece(data: bytes, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": data, "more_body": more}


async def collect(pieces: AsyncIterator[bytes]) -> bytes:
    return b"".join([each async for each in pieces])


async def test_a_body_is_given_as_it_comes() -> None:
    request = request_of(sends(piece(b"one "), piece(b""), piece(b"two", more=False)), content_length="7")
    assert await collect(stream_body(request, 7)) == b"one two"


@pytest.mark.parametrize("setting", ["BODY_SECONDS", "UPLOAD_SECONDS"])
async def test_a_body_that_stalls_is_given_up(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, setting, 0.01)
    with pytest.raises(BodyTooSlow):
        await collect(stream_body(request_of(sends(piece(b"one "))), 1000))


async def test_a_client_that_leaves_is_not_waited_for() -> None:
    request = request_of(sends(piece(b"one "), {"type": "http.disconnect"}))
    with pytest.raises(BodyTooSlow):
        await collect(stream_body(request, 1000))


async def test_a_body_is_bounded_by_what_it_says_and_by_what_it_is() -> None:
    with pytest.raises(ContentTooLarge):
        await collect(stream_body(request_of(sends(), content_length="8"), 7))
    with pytest.raises(ContentTooLarge):
        await collect(stream_body(request_of(sends(piece(b"x" * 8))), 7))

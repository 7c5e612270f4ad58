"""How the client speaks: requests with retries, the stream of signals, and the patience of both."""

import asyncio
import contextlib
import json
import random
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import replace
from typing import Any

import httpx2

from context_server.client.errors import (
    ApprovalDecidedError,
    NotAllowedError,
    NotEditableError,
    NotFoundError,
    ProblemError,
    QueueFullError,
    ServerUnreachable,
    TransportError,
    UnavailableError,
    UnexpectedAnswer,
)
from context_server.client.parsing import parse
from context_server.client.records import ApprovalInfo, Signal

FIRST_BACKOFF_SECONDS = 0.1
MAX_BACKOFF_SECONDS = 5.0
CONNECT_SECONDS = 5.0

Body = Mapping[str, Any] | bytes | None

ConnectionListener = Callable[[bool], None]
"""Is told True when the signals are connected, and False when they break."""

_dice = random.SystemRandom()


_READ = {"Accept": "application/json"}
_WRITE = _READ | {"Content-Type": "application/json"}  # The server demands it on every write, with a body or without.


class Patience:
    """How long to go on without a success, and how long to rest before each attempt.

    Full jitter, as in "Exponential Backoff And Jitter" (AWS Architecture Blog): what a restart cut off at one moment
    must not return at one moment.
    """

    def __init__(self, give_up_seconds: float) -> None:
        self._give_up_seconds = give_up_seconds
        self.renew()

    def renew(self) -> None:
        """Something went through."""
        self._attempts = 0
        self._deadline = time.monotonic() + self._give_up_seconds

    async def rest(self, least_seconds: float = 0.0) -> None:
        """Sleeps between ``least_seconds`` and a ceiling above it that doubles each time, from 0.1 s to 5 s."""
        ceiling = min(MAX_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2 ** min(self._attempts, 10))
        self._attempts += 1
        await asyncio.sleep(least_seconds + _dice.uniform(0, ceiling))

    async def bear(self, error: TransportError | UnavailableError) -> None:
        """Rests after ``error``, if there is time for another attempt.

        Raises:
            ServerUnreachable: there is none, and the connection is what breaks.
            UnavailableError: ``error`` itself: there is no time, or a full disk does not say when to try again.
        """
        least_seconds = 0.0
        if isinstance(error, UnavailableError):
            if error.status == httpx2.codes.INSUFFICIENT_STORAGE and error.retry_after_seconds is None:
                raise error
            least_seconds = error.retry_after_seconds or 0.0
        if time.monotonic() + least_seconds < self._deadline:
            await self.rest(least_seconds)
        elif isinstance(error, UnavailableError):
            raise error
        else:
            raise ServerUnreachable(f"the server cannot be reached ({error})") from error


def problem(response: httpx2.Response) -> ProblemError:
    """The error that a response stands for; a proxy's page, which is no problem document, has code ``http-…``."""
    try:
        body = response.json()
    except ValueError:
        body = None
    document: dict[str, Any] = body if isinstance(body, dict) else {}
    code = str(document.get("code") or f"http-{response.status_code}")
    detail = str(document.get("detail") or document.get("title") or response.reason_phrase)
    extras = {key: value for key, value in document.items() if key not in ("type", "title", "status", "detail", "code")}
    match response.status_code:
        case 404:
            return NotFoundError(404, code, detail, extras)
        case 409:
            return _conflict(code, detail, extras)
        case 429 | 502 | 503 | 504 | 507 as status:
            unavailable = UnavailableError(status, code, detail, extras)
            with contextlib.suppress(KeyError, ValueError):  # It may be absent, or a date: then our own pace holds.
                unavailable.retry_after_seconds = max(0.0, float(response.headers["retry-after"]))
            return unavailable
    return ProblemError(response.status_code, code, detail, extras)


def _conflict(code: str, detail: str, extras: Mapping[str, Any]) -> ProblemError:
    match code:
        case "command-not-allowed":
            return NotAllowedError(409, code, detail, extras)
        case "arguments-not-editable":
            return NotEditableError(409, code, detail, extras)
        case "queue-full":
            return QueueFullError(409, code, detail, extras)
        case "approval-decided":
            decided = ApprovalDecidedError(409, code, detail, extras)
            with contextlib.suppress(UnexpectedAnswer):
                decided.approval = parse(ApprovalInfo, extras.get("approval"))
            return decided
    return ProblemError(409, code, detail, extras)


class Connection:
    """Requests to one server, by paths relative to ``url``."""

    def __init__(self, http: httpx2.AsyncClient, url: str, request_seconds: float, silence_seconds: float) -> None:
        self._http = http
        self._url = url
        self._request_seconds = request_seconds
        self._silence_seconds = silence_seconds

    async def attempt(
        self,
        method: str,
        path: str,
        *,
        body: Body = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        wait_seconds: float = 0.0,
        as_bytes: bool = False,
    ) -> Any:
        """One request, answered within ``request_seconds`` besides ``wait_seconds``: decoded JSON, None for 204.

        ``body`` is JSON, or bytes as they are. ``as_bytes`` gives the answer as it is.

        Raises:
            ProblemError: the server refused.
            TransportError: there was no answer, or one that is not JSON.
        """
        timeout = httpx2.Timeout(self._request_seconds + wait_seconds, connect=CONNECT_SECONDS)
        # In ASCII: a lone surrogate must not fail here.
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            response = await self._http.request(
                method,
                self._url + path,
                params=params,
                content=content,
                headers=(_READ if method == "GET" else _WRITE) | dict(headers or {}),
                timeout=timeout,
            )
        except httpx2.RequestError as error:
            raise TransportError(_reason(error)) from error
        if not response.is_success:
            raise problem(response)
        if as_bytes or response.status_code == httpx2.codes.NO_CONTENT:
            return response.content if as_bytes else None
        try:
            return response.json()
        except ValueError as error:
            raise UnexpectedAnswer(f"{method} {path} was not answered in JSON") from error

    async def request(
        self,
        method: str,
        path: str,
        *,
        give_up_seconds: float,
        body: Body = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
        wait_seconds: float = 0.0,
        as_bytes: bool = False,
    ) -> Any:
        """As ``attempt``, again and again until it goes through. Every POST has an idempotency key, the same each time.

        Raises:
            ProblemError: the server refused.
            ServerUnreachable, UnavailableError: it did not go through for ``give_up_seconds``.
        """
        key = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex} if method == "POST" else {}
        sent = key | dict(headers or {})
        patience = Patience(give_up_seconds)
        while True:
            try:
                return await self.attempt(
                    method,
                    path,
                    body=body,
                    params=params,
                    headers=sent,
                    wait_seconds=wait_seconds,
                    as_bytes=as_bytes,
                )
            except (TransportError, UnavailableError) as error:
                await patience.bear(error)

    async def signals(
        self, path: str, *, give_up_seconds: float, on_connection: ConnectionListener | None = None
    ) -> AsyncGenerator[Signal]:
        """Every signal of a stream, connecting again whenever it ends or is silent for ``silence_seconds``.

        It goes on where it was by ``Last-Event-ID``, and ends after ``context_deleted`` of a stream of one context.

        Raises:
            ProblemError: the stream is refused.
            ServerUnreachable, UnavailableError: no signal came for ``give_up_seconds``.
        """
        notify = on_connection or _ignore
        patience = Patience(give_up_seconds)
        place = _Place()
        while True:
            try:
                async with contextlib.aclosing(self._one_stream(path, place, notify)) as stream:
                    async for signal in stream:
                        patience.renew()
                        yield signal
                        if signal.type == "context_deleted":
                            return
                notify(False)
                await patience.rest(place.retry_seconds)
            except (TransportError, UnavailableError) as error:
                notify(False)
                await patience.bear(error)

    async def _one_stream(self, path: str, place: "_Place", notify: ConnectionListener) -> AsyncGenerator[Signal]:
        """The signals of one connection."""
        headers = {"Last-Event-ID": place.last_event_id} if place.last_event_id else {}
        # Comments and heartbeats count as life, so the read timeout is the silence that is borne.
        timeout = httpx2.Timeout(self._request_seconds, connect=CONNECT_SECONDS, read=self._silence_seconds)
        try:
            async with contextlib.AsyncExitStack() as stack:
                async with asyncio.timeout(self._request_seconds):
                    source = await stack.enter_async_context(
                        self._http.sse(self._url + path, headers=headers, timeout=timeout)
                    )
                    if source.response.status_code != httpx2.codes.OK:
                        await source.response.aread()
                        raise problem(source.response)
                connected = False
                async for event in source:
                    if not connected:
                        connected = True
                        notify(True)
                    place.note(event)
                    signal = _signal(event)
                    if signal is not None:
                        yield signal
        except (httpx2.RequestError, TimeoutError) as error:
            raise TransportError(_reason(error)) from error


class _Place:
    """Where a stream was, and when the server asked for the next connection."""

    def __init__(self) -> None:
        self.last_event_id = ""
        self.retry_seconds = 0.0

    def note(self, event: httpx2.ServerSentEvent) -> None:
        self.last_event_id = event.id or self.last_event_id
        self.retry_seconds = 0.0 if event.retry is None else min(event.retry / 1000, MAX_BACKOFF_SECONDS)


def _signal(event: httpx2.ServerSentEvent) -> Signal | None:
    """The signal in an event. Signals are hints: one that cannot be read is the same as one that was lost."""
    try:
        data = event.json()
        signal = parse(Signal, data)
    except (ValueError, UnexpectedAnswer):
        return None
    return replace(signal, data=data) if isinstance(data, dict) else None


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _ignore(connected: bool) -> None:
    """Nobody wants to know."""

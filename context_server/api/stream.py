"""The signals: metadata-only notices of what is durable. Subscribe first, then read, then send."""

import re
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from context_server.api import forms, signals
from context_server.api.requests import owner_of, parse_query, rooms_of
from context_server.api.sse import EventStream, Heart, admit, goodbye
from context_server.errors import ContextNotFound, InvalidRequest, Violation
from context_server.hub import put_snapshot
from context_server.mailbox import Mailbox
from context_server.metrics import Metrics
from context_server.records import MAX_INTEGER, ContentDelta, ContextDeleted, Signal
from context_server.store.reading import Subscription

_RECENT_CONTEXTS = 100
_MAX_BUSY_CONTEXTS = 1000
_MAX_VERSIONS = 2000
"""Versions that a stream remembers: one of all contexts may see ever more of them. Without one, a delta has no id."""
_EVENT_ID = re.compile(r"(?:(?P<context_id>[0-9A-Za-z-]{1,36}):)?(?P<version>[0-9]{1,16})")


@dataclass(frozen=True, slots=True)
class SignalWriter:
    """How one stream writes signals: under which names, with which ids."""

    epoch: str
    named: bool
    multiplexed: bool
    versions: dict[str, int]
    metrics: Metrics

    def write(self, taken: Iterable[Signal]) -> bytes:
        """The events for some signals, one after the other."""
        return "".join(map(self._event, taken)).encode("ascii")

    def _event(self, signal: Signal) -> str:
        context_id = signal.context_id
        if not isinstance(signal, ContentDelta):
            self.versions.pop(context_id, None)  # To the end, so that the one to be dropped is the oldest.
            self.versions[context_id] = signal.version
            if len(self.versions) > _MAX_VERSIONS:
                del self.versions[next(iter(self.versions))]
        kind = signals.SIGNAL_TYPES[type(signal)]
        self.metrics.signals_sent_by_type[kind].inc()
        version = self.versions.get(context_id)
        event_id = None
        if version is not None:
            event_id = f"{context_id}:{version}" if self.multiplexed else str(version)
        data = signals.signal_json(signal, self.epoch)
        return signals.frame_event(data, name=kind if self.named else None, event_id=event_id)


async def stream_context(request: Request) -> Response:
    """The signals of one context."""
    query = parse_query(request, forms.StreamQuery)
    since = _last_version(request, query)
    subscription = Subscription(request.path_params["context_id"], since[1] if since else None)
    return await _open(request, query, [subscription], multiplexed=False)


async def stream_contexts(request: Request) -> Response:
    """The signals of many contexts on one connection; of all of the caller's when none is named."""
    query = parse_query(request, forms.StreamsQuery)
    rooms = rooms_of(request)
    since = _last_version(request, query)
    if not query.context:
        return await _open(request, query, None, multiplexed=True, since=since)
    if len(query.context) > rooms.limits.max_contexts_per_stream:
        raise InvalidRequest(
            Violation("query.context", f"may be given at most {rooms.limits.max_contexts_per_stream} times")
        )
    subscriptions = {}
    for entry in query.context:
        if "\x00" in entry:
            raise ContextNotFound(entry)
        context_id, version = _parse_event_id(entry) or (entry, None)
        subscriptions[context_id or entry] = version
    return await _open(request, query, _resumed(subscriptions, since), multiplexed=True)


def _resumed(subscriptions: dict[str, int | None], since: tuple[str | None, int] | None) -> list[Subscription]:
    """Subscriptions by context; the last event's id counts for the context that it names."""
    if since is not None and since[0] in subscriptions:
        subscriptions[since[0]] = subscriptions[since[0]] or since[1]
    return [Subscription(context_id, version) for context_id, version in subscriptions.items()]


def _parse_event_id(value: str) -> tuple[str | None, int] | None:
    """``5`` or ``<context_id>:5``; None when it is neither."""
    match = _EVENT_ID.fullmatch(value)
    if match is None or int(match["version"]) > MAX_INTEGER:
        return None
    return match["context_id"], int(match["version"])


def _last_version(request: Request, query: forms.StreamQuery) -> tuple[str | None, int] | None:
    """The last event that the client got, from the header or the query.

    Raises:
        InvalidRequest: it is no id of ours.
    """
    header = request.headers.get("last-event-id")
    value = header if header is not None else query.last_event_id
    if not value:
        return None
    parsed = _parse_event_id(value)
    if parsed is None:
        where = "query.last_event_id" if header is None else "header.Last-Event-ID"
        raise InvalidRequest(Violation(where, "must be the id of an event of this stream"))
    return parsed


def _types_of(query: forms.StreamQuery) -> frozenset[type] | None:
    if query.types is None:
        return None
    types = frozenset(filter(None, query.types.split(",")))
    known_types = signals.SIGNAL_TYPES.values()
    if unknown := types - set(known_types) - {"heartbeat", "goodbye"}:
        known = ", ".join(known_types)
        raise InvalidRequest(Violation("query.types", f"knows no {', '.join(sorted(unknown))}; known: {known}"))
    return frozenset(kind for kind, name in signals.SIGNAL_TYPES.items() if name in types)


async def _open(
    request: Request,
    query: forms.StreamQuery,
    subscriptions: list[Subscription] | None,
    *,
    multiplexed: bool,
    since: tuple[str | None, int] | None = None,
) -> Response:
    """Subscribes, then reads how things stand, then begins to send."""
    rooms, owner = rooms_of(request), owner_of(request)
    types = _types_of(query)
    context_ids = None if subscriptions is None else [subscription.context_id for subscription in subscriptions]
    with ExitStack() as holds:
        admit(rooms, holds)
        mailbox = holds.enter_context(rooms.hub.subscribe(owner, context_ids, types))
        if rooms.relay is not None:
            await rooms.relay.ready(owner, context_ids)
        if subscriptions is None:
            newest = await rooms.store.followed_contexts(owner, recent=_RECENT_CONTEXTS, limit=_MAX_BUSY_CONTEXTS)
            subscriptions = _resumed(dict.fromkeys(newest), since)
        named_by_client = context_ids is not None
        for snapshot in await rooms.store.snapshots(owner, subscriptions, all_must_exist=named_by_client):
            put_snapshot(mailbox, snapshot)
        named = query.named == "true"
        writer = SignalWriter(rooms.store.epoch, named, multiplexed, {}, rooms.metrics)
        heart = Heart(rooms.limits.heartbeat, mailbox.wake, holds)
        events = _events(mailbox, writer, heart, lambda: rooms.hub.heads(owner, context_ids))
        return EventStream(rooms, events, holds.pop_all(), on_shutdown=mailbox.close)


async def _events(
    mailbox: Mailbox, writer: SignalWriter, heart: Heart, heads: Callable[[], list[tuple[str, str, int]]]
) -> AsyncIterator[bytes]:
    """Whatever the mailbox holds, as it may be sent, and heartbeats; reads memory and nothing else."""
    while True:
        if heart.take():
            yield signals.encode_event(signals.heartbeat_fields(heads()), named=writer.named)
        taken, delay = mailbox.take()
        if taken:
            yield writer.write(taken)
            if not writer.multiplexed and isinstance(taken[-1], ContextDeleted):
                return
        elif mailbox.closed and delay is None:
            yield goodbye(named=writer.named)
            return
        else:
            await mailbox.wait(delay)

"""Keeps this node's subscribers and pulls up to date with what other nodes write, where several share a database.

A wake-up marks its context, if anybody here follows it. One task reads all marked contexts in one transaction, and what
it reads goes the way of what is committed here: chunks to ``recent``, then signals to the hub. Reads keep a distance
that grows with the signals that the last one caused, so that a thousand followers cost the database what one costs.

Wake-ups may be lost, so a sweep marks everything now and then. A pull of a message that another node writes is answered
from memory when that has something new for it; else it waits for the next read, which answers all who wait at once.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from types import TracebackType
from typing import Self

import structlog

from context_server.bus import Bus, BusState, Moved, WakeUp, owner_tag
from context_server.errors import PASSING, ContextServerError, ShuttingDown, without_words
from context_server.hub import Hub
from context_server.metrics import Metrics
from context_server.order import Order
from context_server.pulling import PulledHere
from context_server.recent import RecentChunks, Tail
from context_server.records import (
    ContentDelta,
    ContextChanged,
    ContextDeleted,
    MessageCompleted,
    Signal,
    StateChanged,
    Transition,
)
from context_server.store import Store
from context_server.store.following import Movement, Movements, Opening

log = structlog.get_logger("context_server.relay")

_RETRY_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0)
_SWEPT_AT_ONCE = 500
"""Contexts of a sweep in one read, so that those that were woken for do not wait behind all of them."""
_RECENT_CONTEXTS = 1000
"""Contexts of an owner that a sweep looks at: the busy ones, and as many of those that moved last."""
_LEAST_PAUSE_SECONDS = 0.25
"""Between two sweeps, however often others may have been missed."""
_tag_of = lru_cache(1000)(owner_tag)


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayLimits:
    """The relay's bounds; times in seconds.

    ``distance`` lies between two reads, ``distance_per_signal`` more for each mailbox that the last one told, up to
    ``max_distance``. ``sweep`` is between two sweeps, ``sweep_deaf`` while other nodes are not heard. A message counts
    as pulled here for ``pulled``; what memory holds of others' messages is good for ``fresh`` without a look.
    """

    distance: float = 0.025
    distance_per_signal: float = 0.0002
    max_distance: float = 0.2
    sweep: float = 5.0
    sweep_deaf: float = 1.0
    pulled: float = 15.0
    fresh: float = 7.0
    max_read_bytes: int = 4_194_304


class Relay:
    """Brings what other nodes write. Use it with ``async with``, before anybody subscribes."""

    def __init__(
        self,
        store: Store,
        hub: Hub,
        recent: RecentChunks,
        bus: Bus,
        metrics: Metrics,
        limits: RelayLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._hub = hub
        self._recent = recent
        self._bus = bus
        self._metrics = metrics
        self._limits = limits or RelayLimits()
        self.clock = clock
        self._order = Order(hub.written, self._mark)
        self.pulled = PulledHere(
            recent,
            hub,
            bus,
            self._order.signalled,
            clock,
            lately=self._limits.pulled,
            fresh=self._limits.fresh,
        )
        self._marked: dict[str, None] = {}
        self._swept: dict[str, None] = {}
        self._owners: dict[str, asyncio.Task[None]] = {}
        self._work = asyncio.Event()
        self._sweep_now = asyncio.Event()
        self._next_read: asyncio.Future[None] | None = None
        self._this_read: asyncio.Future[None] | None = None
        self._read_at = 0.0
        self._told_at = float("-inf")
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False

    async def __aenter__(self) -> Self:
        """Begins to listen, to read and to sweep."""
        self._hub.attach(self)
        self._bus.subscribe(self._on_wake_up)
        self._bus.on_gap(self._sweep_now.set)
        works = (self._read_forever, self._sweep_forever)
        self._tasks = [asyncio.create_task(self._keep(work), name=work.__name__) for work in works]
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Stops; whoever waits for a read is told so."""
        self._closed = True
        tasks = [*self._tasks, *self._owners.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for read in (self._this_read, self._next_read):
            self._answer(read, ShuttingDown())

    # What the hub asks

    def follow(self, context_id: str) -> None:
        """Somebody begins to follow a context: how it stands is read before anything of it is told."""
        self._order.follow(context_id)
        self._bus.follow(context_id)
        self._mark(context_id)

    def unfollow(self, context_id: str) -> None:
        """Nobody follows it any more."""
        self._order.unfollow(context_id)
        self._bus.unfollow(context_id)

    def follow_owner(self, owner: str) -> None:
        """Somebody begins to follow all contexts of an owner."""
        self._order.follow_owner(owner)
        self._bus.follow_all()

    def unfollow_owner(self, owner: str) -> None:
        """Nobody does any more."""
        self._order.unfollow_owner(owner)
        self._bus.unfollow_all()
        if owner in self._owners:
            self._owners.pop(owner).cancel()

    def announce(self, owner: str, context_id: str, version: int | None, head: tuple[str, int] | None) -> None:
        """Wakes other nodes for what was committed here."""
        message_id, sequence = head or (None, None)
        self._bus.publish(Moved(context_id, _tag_of(owner), version, message_id, sequence))

    def admits(self, owner: str, signal: Signal) -> bool:
        """Whether what was committed here may be told now; else it is told by the next read."""
        match signal:
            case ContextChanged():
                admitted = self._order.admits(owner, signal.context_id, signal.version, signal.version - 1)
                if admitted:
                    self._order.note_change(signal.context_id)
                return admitted
            case ContextDeleted():
                return self._order.note_deletion(owner, signal.context_id)
            case ContentDelta():
                # Where the ending of the message has been read meanwhile, it is not this node's any more.
                is_ours = signal.message_id in self._hub.written(signal.context_id)
                return is_ours and self._order.admits_delta(signal)
            case StateChanged() | MessageCompleted():
                return True

    def admits_transition(self, owner: str, transition: Transition, *, is_whole: bool) -> bool:
        """As ``admits``; the ending of a message that another node wrote waits until its last chunks are read."""
        admitted = self._order.admits(
            owner,
            transition.context_id,
            transition.version,
            transition.previous_version,
            may_be_told=is_whole,
        )
        if admitted:
            self._order.note_transition(transition)
        return admitted

    def released(self, context_id: str) -> None:
        """A message of the context is not written here any more."""
        self._mark(context_id)

    # What streams and pulls ask

    async def ready(self, owner: str, context_ids: Iterable[str] | None) -> None:
        """Returns when everything that moves from now on will be told: then a snapshot may be read.

        Raises:
            DatabaseUnreachable, DatabaseBusy.
        """
        if context_ids is not None:
            await self._known(context_ids)
            return
        task = self._owners.get(owner)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._owners[owner] = asyncio.create_task(self._begin_owner(owner), name="relay owner")
        await asyncio.shield(task)

    async def _begin_owner(self, owner: str) -> None:
        context_ids = await self._notice(owner, as_it_stands=True)
        for context_id in context_ids:
            self._mark(context_id)
        await self._known(context_ids)

    async def _known(self, context_ids: Iterable[str]) -> None:
        while not all(map(self._order.is_known, context_ids)):
            await self.next_read()

    async def next_read(self) -> None:
        """Returns when a read is over that began after this was called.

        Raises:
            DatabaseUnreachable, DatabaseBusy, ShuttingDown.
        """
        if self._closed:
            raise ShuttingDown
        if self._next_read is None:
            self._next_read = asyncio.get_running_loop().create_future()
            self._work.set()
        await asyncio.shield(self._next_read)

    def opened(self, owner: str, opening: Opening, started: float) -> None:
        """Memory begins to hold a message that another node writes, from what was read since a moment."""
        # Where a read was told meanwhile, that one may have been ahead: memory is not good for an answer yet.
        checked = started if self._told_at < started else float("-inf")
        tail = self._recent.follow(owner, opening, checked)
        if tail is not None:
            self.pulled.note(tail)
            self._mark(tail.context_id)

    async def catch_up(self, tail: Tail) -> None:
        """Returns when memory holds what the database held after this was called, or nothing of the message.

        Raises:
            DatabaseUnreachable, DatabaseBusy, ShuttingDown.
        """
        self.pulled.note(tail)
        self._mark(tail.context_id)
        await self.next_read()

    # Marks

    def _on_wake_up(self, wake_up: WakeUp, is_remote: bool) -> None:
        if not is_remote or not isinstance(wake_up, Moved):
            return
        for owner in self._order.owners():
            if _tag_of(owner) == wake_up.owner_tag:
                self._order.notice(owner, wake_up.context_id, as_it_stands=False)
        self._mark(wake_up.context_id)

    def _mark(self, context_id: str) -> None:
        if context_id in self.pulled or self._order.since(context_id) is not None:
            self._marked[context_id] = None
            self._work.set()

    async def _sweep_forever(self) -> None:
        """Marks everything that is followed here now and then, in case wake-ups were lost."""
        due_at = self.clock() + _jittered(self._limits.sweep)
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_jittered(self._limits.sweep_deaf)):
                    await self._sweep_now.wait()
            is_deaf = self._bus.state is BusState.POLLING
            if not (is_deaf or self._sweep_now.is_set() or self.clock() >= due_at):
                continue
            due_at = self.clock() + _jittered(self._limits.sweep)
            self._sweep_now.clear()
            self.pulled.let_lapse()
            with suppress(*PASSING):
                for owner in self._order.owners():
                    await self._notice(owner, as_it_stands=False)
            self._swept |= dict.fromkeys((*self._order.contexts(), *self.pulled.contexts()))
            if self._swept:
                self._work.set()
            await asyncio.sleep(_LEAST_PAUSE_SECONDS)

    async def _notice(self, owner: str, *, as_it_stands: bool) -> list[str]:
        context_ids = await self._store.followed_contexts(owner, recent=_RECENT_CONTEXTS, limit=_RECENT_CONTEXTS)
        for context_id in context_ids:
            self._order.notice(owner, context_id, as_it_stands=as_it_stands)
        return context_ids

    # Reading

    async def _keep(self, work: Callable[[], Awaitable[None]]) -> None:
        """Does a piece of work without which subscribers are told nothing: after a defect in it, the process ends."""
        try:
            await work()
        except Exception as error:
            log.error("task_failed", task=work.__name__, **without_words(error))  # noqa: TRY400  # no message
            self._store.fail(type(error).__name__)

    async def _read_forever(self) -> None:
        attempts = 0
        while True:
            await self._work.wait()
            await asyncio.sleep(self._read_at - self.clock())
            self._this_read, self._next_read = self._next_read, None
            context_ids = self._take_marked()
            try:
                await self._read(context_ids)
            except PASSING as error:
                self._answer(self._this_read, error)
                for context_id in context_ids:
                    self._mark(context_id)
                if not attempts:
                    log.warning("relay_delayed", code=error.code)
                self._read_at = self.clock() + _jittered(_RETRY_SECONDS[min(attempts, len(_RETRY_SECONDS) - 1)])
                attempts += 1
            else:
                self._answer(self._this_read, None)
                if attempts:
                    log.info("relay_resumed", attempts=attempts + 1)
                attempts = 0

    def _take_marked(self) -> list[str]:
        """The contexts for the next read: all for which there was a reason, and some of the last sweep."""
        room = max(0, _SWEPT_AT_ONCE - len(self._marked))
        swept = list(islice(self._swept, room))
        for context_id in swept:
            del self._swept[context_id]
        context_ids = list(self._marked | dict.fromkeys(swept))
        self._marked.clear()
        if not self._swept:
            self._work.clear()
        return context_ids

    async def _read(self, context_ids: Iterable[str]) -> None:
        """Reads what is new of some contexts, and lets it be seen."""
        asked = {key: since for key in context_ids if (since := self._order.since(key)) is not None}
        wanted = self.pulled.wanted(context_ids)
        started = self.clock()
        found = Movements({}, {})
        if asked or wanted:
            found = await self._store.following.movements(asked, wanted, max_bytes=self._limits.max_read_bytes)
            self._metrics.relay_read_seconds.observe(self.clock() - started)
            self._metrics.relay_read_contexts.observe(len(asked))
        told = self._let_be_seen(asked, wanted, found, started)
        distance = self._limits.distance + told * self._limits.distance_per_signal
        # Between two reads there is some rest too, however slow the database is.
        rested = self.clock() + self._limits.distance / 2
        self._read_at = max(started + min(distance, self._limits.max_distance), rested)

    def _let_be_seen(self, asked: Iterable[str], wanted: Iterable[str], found: Movements, started: float) -> int:
        """Takes in what was read, memory first; to how many mailboxes something was told."""
        for context_id in self.pulled.take_in(wanted, found.messages, started):
            self._mark(context_id)
        told = sum(self._tell(context_id, found.contexts.get(context_id)) for context_id in asked)
        self._told_at = self.clock()
        return told

    def _tell(self, context_id: str, movement: Movement | None) -> int:
        """Tells what was read of a context; how many mailboxes were told something."""
        if movement is None:
            gone = self._order.tell_gone(context_id)
            if gone is None:
                return 0
            self._recent.forget_context(context_id)
            return self._hub.relay(*gone)
        self.pulled.forget_lost(movement)
        telling = self._order.tell(movement)
        if telling.again:
            self._mark(context_id)
        if telling.is_current:
            self._hub.set_head(movement.owner, context_id, telling.head)
        return sum(self._hub.relay(movement.owner, signal, as_of) for signal, as_of in telling.signals)

    def _answer(self, read: asyncio.Future[None] | None, error: ContextServerError | None) -> None:
        """Lets go on whoever waits for a read."""
        if read is None or read.done():
            return
        if error is None:
            read.set_result(None)
        else:
            read.set_exception(error)
            read.exception()  # Marks it as seen: whoever waited may be gone.


def _jittered(seconds: float) -> float:
    return seconds * random.uniform(0.8, 1.0)  # noqa: S311  # It spreads reads, it guards nothing.

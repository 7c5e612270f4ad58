"""Keeps house in the background: old idempotency keys, the chunks of ended messages, contexts that nobody uses.

Everything is done in short transactions with rests between them. A rest is as long as the transaction took, times what
makes ``share`` of the whole, so all of it together takes no larger part of one core; and since a transaction takes
longer while replies are being written, the keeper then does less.

On several nodes each has its keeper. They pass over what another one has locked, so they share the work.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import structlog

from context_server.errors import OutcomeUnknown, StorageBroken, Unavailable, without_words
from context_server.metrics import Metrics
from context_server.store import Store
from context_server.store.keeping_statements import Place
from context_server.store.retention import ExpiredContext

log = structlog.get_logger("context_server.keeper")

_LONGEST_REST_SECONDS = 60.0
"""One transaction that had to wait for long, as for a locked database, does not stop the keeper for an hour."""
_LOOK_SECONDS = 60.0
_LEAST_LOOK_SECONDS = 0.05
_LOOKS = 10
"""With nothing to do it looks again this often in the time after which something is old, at least once a minute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperLimits:
    """After which time what is done, in milliseconds, None for never; and the part of one core that it may take."""

    idempotency_lifetime_ms: int
    compact_after_ms: int | None
    retain_ms: int | None
    share: float


class Keeper:
    """Keeps house until it is closed; use it with ``async with``."""

    def __init__(
        self, store: Store, metrics: Metrics, limits: KeeperLimits, on_expired: Callable[[ExpiredContext], None]
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._limits = limits
        self._on_expired = on_expired
        ages = (limits.idempotency_lifetime_ms, limits.compact_after_ms, limits.retain_ms)
        shortest = min(age for age in ages if age is not None) / 1000
        self._look_seconds = max(_LEAST_LOOK_SECONDS, min(_LOOK_SECONDS, shortest / _LOOKS))
        self._place: Place | None = None
        self._refused: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Begins."""
        self._task = asyncio.create_task(self._keep_forever(), name="keeper")
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Stops; a transaction that has begun is finished by itself."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _keep_forever(self) -> None:
        chores = (self._forget_keys, self._compact, self._delete_contexts)
        due = dict.fromkeys(chores, 0.0)
        clock = asyncio.get_running_loop().time
        while True:
            for chore in chores:
                if due[chore] > clock():
                    continue
                there_is_more = False
                try:
                    there_is_more = await self._do(chore)
                except (Unavailable, OutcomeUnknown) as error:
                    log.warning("housekeeping_delayed", chore=_name_of(chore), code=error.code)
                except StorageBroken:
                    return
                except Exception as error:
                    # A defect of ours, and nothing that replies depend on: they go on, and so do the other chores.
                    log.error("housekeeping_failed", chore=_name_of(chore), **without_words(error))  # noqa: TRY400
                if not there_is_more:
                    due[chore] = clock() + self._look_seconds
            await asyncio.sleep(min(due.values()) - clock())

    async def _do(self, chore: Callable[[], Awaitable[bool]]) -> bool:
        """Does a chore and rests in proportion; whether there is more of it to do."""
        started = time.perf_counter()
        there_is_more = await chore()
        took = time.perf_counter() - started
        self._metrics.housekeeping_seconds.labels(_name_of(chore)).inc(took)
        await asyncio.sleep(rest_after(took, self._limits.share))
        return there_is_more

    async def _forget_keys(self) -> bool:
        """Forgets idempotency keys that are too old to count."""
        forgotten = await self._store.forget_idempotency_keys(self._limits.idempotency_lifetime_ms)
        if forgotten:
            log.debug("forgot_idempotency_keys", keys=forgotten)
        return forgotten > 0

    async def _compact(self) -> bool:
        """Merges chunks of messages that ended long ago."""
        if self._limits.compact_after_ms is None:
            return False
        done = await self._store.house.compact(self._limits.compact_after_ms, self._place)
        self._place = done.resume_after
        self._metrics.chunks_compacted.inc(done.chunks)
        for message_id in done.refused:
            if message_id not in self._refused:
                self._refused.add(message_id)
                log.error("compaction_refused", message_id=message_id)
        return done.resume_after is not None

    async def _delete_contexts(self) -> bool:
        """Deletes rows of contexts that are gone, and once there are none, takes those that are too old.

        In this order, or a backlog of old contexts would pile up as rows of nobody's. What is gone may have been left
        by another process.
        """
        return await self._store.house.clear_contexts() or await self._expire_contexts()

    async def _expire_contexts(self) -> bool:
        """Takes contexts that were without activity for long from their owners, and tells whoever follows them."""
        if self._limits.retain_ms is None:
            return False
        expired = await self._store.house.expire_contexts(self._limits.retain_ms)
        for context in expired:
            self._on_expired(context)
        if expired:
            self._metrics.contexts_expired.inc(len(expired))
            log.info("contexts_expired", contexts=len(expired))
        return bool(expired)


def rest_after(took_seconds: float, share: float) -> float:
    """How long to rest: ``rest_after(0.01, 0.05)`` → 0.19, so that what was done was a twentieth of the time."""
    return min(_LONGEST_REST_SECONDS, took_seconds / share - took_seconds)


def _name_of(chore: Callable[..., object]) -> str:
    """``_forget_keys`` → ``forget_keys``."""
    return chore.__name__.removeprefix("_")

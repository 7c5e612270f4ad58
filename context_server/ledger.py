"""The heart: deltas of all runs in, one group commit, chunks out, then signals.

A single task owns every append of the process. It takes what runs have pending, of up to 64 at a time and first of
those that wait for longest, writes it in one transaction, and only then lets it be seen. While a commit runs, the next
batch gathers, so batches grow by themselves under load; adjacent textual deltas of one kind become one chunk. Commits
begin at distances in proportion to the runs that write: hardly any for a few, which keeps latency low, and more for
many, which keeps signals and pulls few.

An agent that yields quicker than the disk commits waits in ``append`` once ``max_pending_bytes`` are on their way.

Where runs have leases, the same task renews those of all runs here, in the transactions of its commits, and in one of
its own when nobody writes.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Any, Self

import structlog

from context_server.approving import approvals_of, call_to_approve
from context_server.errors import (
    PASSING,
    DatabaseBusy,
    Fenced,
    OutcomeUnknown,
    ReplyTooLarge,
    StorageBroken,
    without_words,
)
from context_server.hub import Hub
from context_server.metrics import Metrics
from context_server.recent import RecentChunks
from context_server.records import (
    Append,
    ApprovalRequest,
    Chunk,
    ChunkKind,
    ContentDelta,
    Delta,
    Failure,
    Outcome,
    Run,
    State,
    Transition,
    Usage,
    now,
)
from context_server.reply import OpenReply, clean_delta
from context_server.store import Store
from context_server.store.execution import BatchRefused, Standing

log = structlog.get_logger("context_server.ledger")

_MAX_BATCH_RUNS = 64
_MAX_BATCH_BYTES = 8_388_608
"""Replies and text in one commit: more text is memory, and time in which no other reply goes on."""
_LAST_COMMIT_SECONDS = 1.0
"""Time for the last commit when the process stops; longer, and the disk does not take it."""
_FULL_SHARES = 16
_LEAST_SHARE_BYTES = 8192
"""Replies that may have all of ``max_pending_bytes`` on their way at once, and what each has with more of them."""
_MAX_REFUSALS = 3
_RETRY_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerLimits:
    """The ledger's bounds; times in seconds."""

    commit_interval: float
    max_commit_interval: float
    max_pending_bytes: int
    max_reply_bytes: int
    approval_lifetime: float = 604_800.0
    renewal: float | None = None
    """Between two renewals of the leases; None where there are none."""


class Ledger:
    """Writes the replies of every run of this process. Use it with ``async with``."""

    def __init__(self, store: Store, hub: Hub, recent: RecentChunks, metrics: Metrics, limits: LedgerLimits) -> None:
        self._store = store
        self._hub = hub
        self._recent = recent
        self._metrics = metrics
        self._limits = limits
        self._dirty: dict[OpenReply, None] = {}
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task: asyncio.Task[None] | None = None
        self._rest_until = 0.0
        self._held: dict[str, OpenReply] = {}
        self._renew_at = 0.0

    async def __aenter__(self) -> Self:
        """Starts the committing task."""
        self._task = asyncio.create_task(self._commit_forever(), name="ledger")
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Commits what is pending, unless the disk does not take it, and stops."""
        try:
            async with asyncio.timeout(_LAST_COMMIT_SECONDS):
                await self._idle.wait()
        except TimeoutError:
            log.warning("uncommitted_output_dropped", runs=len(self._dirty))
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # Writers

    def begin(self, run: Run, on_fenced: Callable[[], None]) -> OpenReply:
        """Opens the reply of a run that was claimed; ``on_fenced`` is called when the run loses it."""
        self._recent.open(run.owner, run.context_id, run.message_id, run.sequence)
        self._hub.open_message(run.owner, run.context_id, run.message_id, run.sequence)
        reply = OpenReply(run, on_fenced)
        self._held[run.id] = reply
        reply.ended.add_done_callback(lambda ended: self._closed(reply, ended))
        self._work.set()  # So that the task knows when it has to renew.
        return reply

    def _closed(self, reply: OpenReply, ended: asyncio.Future[None]) -> None:
        if self._held.get(reply.run.id) is reply:
            del self._held[reply.run.id]
        if not ended.cancelled():
            ended.exception()  # Marks it as seen: nobody may be waiting for it.

    async def append(self, reply: OpenReply, delta: Delta) -> None:
        """Takes in a delta; waits while too much of this reply is on its way to the disk.

        Returning does not mean durable: a delta is durable when its sequence is signalled.

        Raises:
            Fenced: the run does not own the reply any more.
            ReplyTooLarge: the reply would exceed ``max_reply_bytes``; the delta is not taken.
        """
        if reply.fenced or reply.ending is not None:
            raise Fenced(reply.run.id)
        delta, size = clean_delta(delta)
        if not size:
            return
        if reply.content_bytes + size > self._limits.max_reply_bytes:
            raise ReplyTooLarge(self._limits.max_reply_bytes)
        reply.add(delta, size)
        self._mark(reply)
        while reply.pending_bytes + reply.in_flight_bytes >= self._share() and not reply.fenced:
            reply.room.clear()
            await reply.room.wait()
        if reply.bursts():
            await asyncio.sleep(0)

    def restore(self, reply: OpenReply, chunks: Iterable[Chunk], usage: Usage | None) -> None:
        """Tells a reply whose run was suspended what it held then; to be called before anything is appended."""
        reply.restore(chunks, usage)
        if reply.phases:
            self._mark(reply)

    def note_usage(self, reply: OpenReply, usage: Usage) -> None:
        """Takes in what a run has used so far; it becomes durable with the next commit."""
        if not reply.fenced and reply.ending is None:
            reply.note_usage(usage)
            self._mark(reply)

    def _share(self) -> int:
        """What one reply may have on its way: with many at full speed less each, so that a commit stays short."""
        total = _FULL_SHARES * self._limits.max_pending_bytes
        return max(_LEAST_SHARE_BYTES, min(self._limits.max_pending_bytes, total // max(1, len(self._held))))

    async def end(self, reply: OpenReply, outcome: Outcome, failure: Failure | None = None) -> None:
        """Commits what is pending and ends the run, in one transaction; returns when that is durable.

        Raises:
            Fenced: the run does not own the reply any more.
            StorageBroken: the disk failed.
        """
        if reply.fenced:
            raise Fenced(reply.run.id)
        reply.close_calls("cancelled" if outcome is Outcome.STOPPED else "interrupted")
        reply.ending = (outcome, failure)
        self._mark(reply)
        await asyncio.shield(reply.ended)

    async def suspend(self, reply: OpenReply, requests: Sequence[ApprovalRequest]) -> bool:
        """Commits what is pending with the calls that need a person's approval, and gives the run up until then.

        All in one transaction, durable when this returns: then nothing of the run is left in memory. False where the
        run was told to stop before; it is still to be ended then.

        Raises:
            Fenced: the run does not own the reply any more.
            ReplyTooLarge: with the calls the reply would exceed ``max_reply_bytes``; they are not taken.
            StorageBroken: the disk failed.
        """
        if reply.fenced or reply.ending is not None:
            raise Fenced(reply.run.id)
        approvals = approvals_of(reply.run, requests, self._limits.approval_lifetime)
        calls = [clean_delta(Delta(ChunkKind.TOOL_CALL, data=call_to_approve(approval))) for approval in approvals]
        if reply.content_bytes + sum(size for _, size in calls) > self._limits.max_reply_bytes:
            raise ReplyTooLarge(self._limits.max_reply_bytes)
        for call, size in calls:
            reply.add(call, size)
        reply.approvals = tuple(approvals)
        reply.suspended = asyncio.get_running_loop().create_future()
        self._mark(reply)
        waited: set[asyncio.Future[Any]] = {reply.suspended, reply.ended}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not reply.suspended.done():
            reply.ended.result()  # Raises why.
        return reply.suspended.done() and reply.suspended.result()

    def drop(self, reply: OpenReply) -> None:
        """Forgets a reply whose context is gone or whose run another process owns."""
        self._fence(reply)
        self._recent.forget(reply.run.message_id)
        self._hub.release_message(reply.run.context_id, reply.run.message_id)

    def _mark(self, reply: OpenReply) -> None:
        self._dirty[reply] = None
        self._idle.clear()
        self._work.set()

    # The group commit

    async def _commit_forever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wait_for_work()
            if (rest := self._rest_until - loop.time()) > 0:
                await asyncio.sleep(rest)
            replies = self._longest_waiting()
            started = loop.time()
            try:
                batch = [(reply, reply.take()) for reply in replies if not reply.fenced]
                await self._commit(batch, self._due_renewals())
            except StorageBroken as error:
                self._abandon(replies, error)
            except Exception as error:
                # A defect of ours, after which the log's head is not known: the same as a disk that failed.
                log.error("commit_failed", runs=len(replies), **without_words(error))  # noqa: TRY400
                self._abandon(replies, self._store.fail(type(error).__name__))
            rest = min(self._limits.max_commit_interval, len(replies) * self._limits.commit_interval)
            self._rest_until = started + rest
            if not self._dirty:
                self._idle.set()

    async def _wait_for_work(self) -> None:
        """Returns when there is something to commit, or leases have to be renewed."""
        while not self._dirty:
            self._work.clear()
            until_renewal = None
            if self._limits.renewal is not None and self._held:
                until_renewal = self._renew_at - asyncio.get_running_loop().time()
            if until_renewal is not None and until_renewal <= 0:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(until_renewal):
                    await self._work.wait()

    def _due_renewals(self) -> list[str]:
        """The runs whose leases are to be renewed now: all that are held here, or none yet."""
        if self._limits.renewal is None or asyncio.get_running_loop().time() < self._renew_at:
            return []
        self._renew_at = asyncio.get_running_loop().time() + self._limits.renewal
        return list(self._held)

    def _longest_waiting(self) -> list[OpenReply]:
        """The replies for the next commit, those that wait for longest first.

        With many, a part of them: signals and pulls then come in several small waves instead of one that keeps the last
        of them waiting, and each reply is committed as often as before.
        """
        replies: list[OpenReply] = []
        size = 0
        for reply in itertools.islice(self._dirty, _MAX_BATCH_RUNS):
            size += reply.pending_bytes
            if replies and size > _MAX_BATCH_BYTES:
                break
            replies.append(reply)
        for reply in replies:
            del self._dirty[reply]
        return replies

    async def _commit(self, batch: list[tuple[OpenReply, Append]], renewing: list[str]) -> None:
        """Makes a batch durable, however long the disk is full or the database away, and then visible.

        Raises:
            StorageBroken: nothing of the batch may be acknowledged.
        """
        attempt = refusals = 0
        is_unknown = False
        while batch or renewing:
            started = time.perf_counter()
            try:
                try:
                    appends = [append for _, append in batch]
                    transitions, lost = await self._store.append_and_renew(appends, renewing)
                except BatchRefused:
                    refusals += 1
                    batch = await self._settle(batch, is_unknown=is_unknown, refusals=refusals)
                    continue
            except PASSING as error:
                is_unknown = is_unknown or isinstance(error, OutcomeUnknown)
                self._metrics.commit_failures.labels(error.code).inc()
                if attempt == 0:
                    log.warning("commit_delayed", code=error.code, runs=len(batch))
                if isinstance(error, DatabaseBusy) and self._limits.renewal is not None:
                    renewing = await self._renew_alone(batch)
                await asyncio.sleep(_RETRY_SECONDS[min(attempt, len(_RETRY_SECONDS) - 1)])
                attempt += 1
            else:
                if attempt:
                    log.info("commit_resumed", attempts=attempt + 1, runs=len(batch))
                self._metrics.commit_seconds.observe(time.perf_counter() - started)
                self._publish(batch, transitions)
                self._drop_lost(lost)
                return

    async def _renew_alone(self, batch: list[tuple[OpenReply, Append]]) -> list[str]:
        """Renews all leases by themselves; the runs whose leases are still to be renewed.

        One context that somebody has locked holds the batch up, and must not cost the other runs here their leases.
        What has become of the batch's own runs is found out by its next attempt: it may have ended them already.
        """
        run_ids = list(self._held)
        try:
            _, lost = await self._store.append_and_renew((), run_ids)
        except PASSING:
            return run_ids
        self._drop_lost(lost - {reply.run.id for reply, _ in batch})
        return []

    async def _settle(
        self, batch: list[tuple[OpenReply, Append]], *, is_unknown: bool, refusals: int
    ) -> list[tuple[OpenReply, Append]]:
        """What is left to be written of a refused batch: without the runs that do not own their messages any more.

        Where an earlier attempt has an unknown outcome, the log is asked: what it holds was written then, and is
        published now. Writing it once more, one sequence on, would repeat it.

        Raises:
            StorageBroken: the batch is refused again and again though every run owns its message; never seen.
        """
        left, written = [], []
        standings = await self._store.standings([append for _, append in batch])
        for (reply, append), (standing, transition) in zip(batch, standings, strict=True):
            if standing is Standing.NOT_WRITTEN:
                left.append((reply, append))
            elif standing is Standing.WRITTEN and is_unknown:
                written.append(((reply, append), transition))
            else:
                self._lose(reply)
        if written:
            log.info("commit_found", runs=len(written))
            self._publish([pair for pair, _ in written], [transition for _, transition in written])
        if refusals > _MAX_REFUSALS + _MAX_BATCH_RUNS or (len(left) == len(batch) and refusals > _MAX_REFUSALS):
            raise self._store.fail("an append was refused without a fenced run")
        return left

    def _drop_lost(self, run_ids: Iterable[str]) -> None:
        """Drops the runs whose leases could not be renewed; one that has ended in the same commit has none any more."""
        for run_id in run_ids:
            reply = self._held.get(run_id)
            if reply is not None and not reply.ended.done():
                self._lose(reply)

    def _lose(self, reply: OpenReply) -> None:
        log.warning("run_fenced", run_id=reply.run.id, context_id=reply.run.context_id, attempt=reply.run.attempt)
        self.drop(reply)

    def _fence(self, reply: OpenReply) -> None:
        if reply.fenced:
            return
        reply.fenced = True
        reply.room.set()
        if not reply.ended.done():
            reply.ended.set_exception(Fenced(reply.run.id))
        reply.on_fenced()

    def _abandon(self, replies: Iterable[OpenReply], error: StorageBroken) -> None:
        """The disk failed: whoever waits for these replies is told so, and nothing of them becomes visible."""
        for reply in replies:
            if not reply.ended.done():
                reply.ended.set_exception(error)
            reply.fenced = True
            reply.room.set()

    def _publish(self, batch: list[tuple[OpenReply, Append]], transitions: list[Transition | None]) -> None:
        """Lets a durable batch be seen: memory first, so that a signalled sequence can be pulled, then signals."""
        chunks = size = 0
        at = now()
        for (reply, append), transition in zip(batch, transitions, strict=True):
            chunks += len(append.chunks)
            size += reply.in_flight_bytes
            reply.in_flight_bytes = 0
            reply.room.set()
            self._recent.add(append.run.message_id, append.chunks)
            self._signal(append, transition, at)
            if append.ending is not None and not reply.ended.done():
                reply.ended.set_result(None)
            if append.approvals:
                self._suspended(reply, is_suspended=transition is not None and transition.state is not State.CANCELLING)
        self._metrics.chunks_committed.inc(chunks)
        self._metrics.bytes_committed.inc(size)
        self._metrics.commit_chunks.observe(chunks)

    def _suspended(self, reply: OpenReply, *, is_suspended: bool) -> None:
        """Lets go of a reply whose run was suspended: whoever claims it next may be another node."""
        if reply.suspended is not None and not reply.suspended.done():
            reply.suspended.set_result(is_suspended)
        if not is_suspended:
            return
        reply.fenced = True
        if not reply.ended.done():
            reply.ended.set_result(None)
        self._recent.forget(reply.run.message_id)
        if self._store.shared:  # Else nobody else writes it, and heartbeats go on to carry its head.
            self._hub.release_message(reply.run.context_id, reply.run.message_id)

    def _signal(self, append: Append, transition: Transition | None, at: datetime) -> None:
        run = append.run
        if transition is not None and transition.ended is None:
            self._hub.publish_transition(run.owner, transition)
        if append.chunks:
            self._hub.publish(
                run.owner,
                ContentDelta(
                    context_id=run.context_id,
                    message_id=run.message_id,
                    current_sequence=append.sequence,
                    timestamp=at,
                ),
            )
        if transition is not None and transition.ended is not None and append.ending is not None:
            self._recent.end(run.message_id, transition.ended.status, append.ending.digest)
            self._hub.publish_transition(run.owner, transition)

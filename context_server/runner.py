"""Claims queued runs, drives their agents, stops them, and recovers what a crash left.

Each run has a task that supervises and a task that drives the agent: the supervisor decides how the run ends, so an
agent that ignores its cancellation, or raises in it, cannot keep a context from ending.
"""

import asyncio
import contextlib
import itertools
import random
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Any, Self

import structlog

from context_server.agents import AgentFailed
from context_server.bus import Bus, CancelRequested, RunDeleted, RunQueued, WakeUp
from context_server.driver import Driver
from context_server.errors import (
    PASSING,
    ContextNotFound,
    Fenced,
    OutcomeUnknown,
    ReplyTooLarge,
    StorageBroken,
    Unavailable,
    without_words,
)
from context_server.hub import Hub
from context_server.ledger import Ledger
from context_server.metrics import Metrics
from context_server.records import (
    Failure,
    Outcome,
    Run,
    State,
    Suspend,
    Transition,
)
from context_server.reply import OpenReply
from context_server.storable import clean_text
from context_server.store import Store
from context_server.store.approvals import EXPIRED
from context_server.store.execution import INTERRUPTED
from context_server.store.reading import Draft

log = structlog.get_logger("context_server.runner")

_SWEEP_SECONDS = 2.0
"""How often the runner looks by itself for queued runs and for runs to be stopped, in case a wake-up was lost."""
_REAP_LIMIT = 100
_REAPED_AT_ONCE = 3
"""One connection of four, by default, is left for commands meanwhile."""
_OTHERS_FIRST_SECONDS = 0.05
_RETRY_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.0)
AGENT_FAILED = Failure(code="agent-error", detail="The agent failed while it was writing this reply.")
_CODE = re.compile(r"[a-z][a-z0-9-]{0,63}")
_MAX_DETAIL = 2000
_CLAIM_LIMIT = 100
"""Runs claimed in one transaction, so that a long queue does not hold up the commits of those that run."""


Attempt = tuple[str, int]
"""A run's id and the number of its attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerLimits:
    """The runner's bounds; times in seconds."""

    max_active_runs: int
    cancel_grace: float


class Stop(StrEnum):
    """Why a run is told to stop."""

    CANCELLED = "cancelled"
    DELETED = "deleted"
    FENCED = "fenced"
    SHUTDOWN = "shutdown"


class Runner:
    """Runs agents, and carries out the commands that concern runs. Use it with ``async with``."""

    def __init__(
        self, store: Store, ledger: Ledger, hub: Hub, bus: Bus, driver: Driver, metrics: Metrics, limits: RunnerLimits
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._hub = hub
        self._bus = bus
        self._driver = driver
        self._metrics = metrics
        self._limits = limits
        # By run and attempt: one that was suspended may be claimed again before its last attempt has quite let go.
        self._runs: dict[Attempt, asyncio.Task[None]] = {}
        self._stops: dict[Attempt, asyncio.Future[Stop]] = {}
        self._stubborn: set[asyncio.Task[Suspend | None]] = set()
        self._wake = asyncio.Event()
        self._claiming = asyncio.Lock()
        # Why runs are to stop that may have been claimed, and are not known here yet.
        self._told_early: dict[str, Stop] = {}
        self._is_claim_unknown = False
        self.draining = False
        # Runs that had their time to end at shutdown and could not, as when the disk is full; they get no second one.
        self._given_up: set[Attempt] = set()
        self._keeper: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        """Repairs what a crash left, then begins to claim."""
        await self._recover()
        self._bus.subscribe(self._on_wake_up)
        self._wake.set()
        works = (self._claim_forever, self._sweep_forever)
        self._keeper = [asyncio.create_task(self._keep(work), name=work.__name__) for work in works]
        return self

    async def _keep(self, work: Callable[[], Awaitable[None]]) -> None:
        """Does a piece of work without which the process is of no use: after a defect in it, the process ends."""
        try:
            await work()
        except Exception as error:
            log.error("task_failed", task=work.__name__, **without_words(error))  # noqa: TRY400  # no message
            self._store.fail(type(error).__name__)

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Interrupts what still runs, and stops."""
        await self.drain(0)
        for task in self._keeper:
            task.cancel()
        await asyncio.gather(*self._keeper, return_exceptions=True)

    # Wake-ups

    def _on_wake_up(self, wake_up: WakeUp, is_remote: bool = False) -> None:
        match wake_up:
            case RunQueued() if is_remote:
                # The node that took the message is about to claim it; the others look whether it could not.
                asyncio.get_running_loop().call_later(_OTHERS_FIRST_SECONDS, self._wake.set)
            case RunQueued():
                self._wake.set()
            case CancelRequested(run_id):
                self._stop(run_id, Stop.CANCELLED)
            case RunDeleted(run_id):
                self._stop(run_id, Stop.DELETED)

    def _stop(self, run_id: str, reason: Stop) -> None:
        stops = [stop for (known_id, _), stop in self._stops.items() if known_id == run_id]
        if not stops and self._claiming.locked():
            self._told_early[run_id] = reason
        for stop in stops:
            _tell(stop, reason)

    # Recovery

    async def _recover(self) -> None:
        """Brings the runs that dead processes left running to their ends; queued ones will be claimed again."""
        await self._reap_all()
        if not self._store.shared:
            for run in await self._store.unclaimed_runs():
                self._hub.open_message(run.owner, run.context_id, run.message_id, run.sequence)

    async def _reap_all(self) -> None:
        while await self._reap():
            pass

    async def _reap(self) -> int:
        """Ends runs that nobody holds any more, and says so to whoever follows them; how many."""
        ended = 0
        runs = await self._store.expired_runs(_REAP_LIMIT)
        random.shuffle(runs)  # Several nodes may be at it.
        for start in range(0, len(runs), _REAPED_AT_ONCE):
            some = runs[start : start + _REAPED_AT_ONCE]
            results = await asyncio.gather(*map(self._store.expire_run, some), return_exceptions=True)
            for run, result in zip(some, results, strict=True):
                if isinstance(result, Transition):  # Else another was quicker, or its own node is about to end it.
                    ended += 1
                    self._reaped(run, result)
            for result in results:
                if isinstance(result, BaseException):
                    raise result
        if ended:
            log.warning("runs_interrupted", runs=ended)
        return ended

    def _reaped(self, run: Run, transition: Transition) -> None:
        is_interrupted = transition.state is State.FAILED
        outcome, code = (Outcome.FAILED, INTERRUPTED.code) if is_interrupted else (Outcome.STOPPED, "")
        self._metrics.runs_ended.labels(outcome, code).inc()
        self._tell(run.owner, transition)

    def _tell(self, owner: str, transition: Transition) -> None:
        """Says how a run that nobody was running has ended; what waited behind it can be claimed now."""
        self._hub.publish_transition(owner, transition)
        if transition.promoted is not None:
            self._wake.set()

    # Claiming

    async def _claim_forever(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                async with self._claiming:
                    await self._claim()
            except PASSING as error:
                self._is_claim_unknown = self._is_claim_unknown or isinstance(error, OutcomeUnknown)
                log.warning("claim_delayed", code=error.code)
            except StorageBroken:
                return

    async def _sweep_forever(self) -> None:
        """Looks by itself for what a wake-up should have told, and for runs of dead nodes."""
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            self._wake.set()
            chores = [self._stop_told_runs, self._expire_approvals]
            if self._store.shared:
                chores += [self._free_locks, self._reap_all, self._check_epoch]
            for chore in chores:
                try:
                    await chore()
                except (*PASSING, StorageBroken) as error:
                    log.warning("sweep_delayed", code=error.code)

    async def _free_locks(self) -> None:
        """Takes the locks from nodes that stand still: what they hold can be neither reaped nor written by others."""
        ended = await self._store.house.end_stalled_sessions()
        if ended:
            log.warning("stalled_sessions_ended", sessions=ended)

    async def _stop_told_runs(self) -> None:
        """Stops the runs here that were told to stop, and those that are gone."""
        ours = dict(self._stops)  # As before the read: of an attempt that begins meanwhile it says nothing.
        if not ours:
            return
        states = await self._store.running_states([run_id for run_id, _ in ours])
        for (run_id, _), stop in ours.items():
            if run_id not in states:
                _tell(stop, Stop.FENCED)
            elif states[run_id] is State.CANCELLING:
                _tell(stop, Stop.CANCELLED)

    async def _expire_approvals(self) -> None:
        """Ends runs that have waited for a person's decision for too long."""
        for owner, context_id in await self._store.suspension.overdue(_REAP_LIMIT):
            with contextlib.suppress(ContextNotFound):
                transition = await self._store.suspension.expire(owner, context_id)
                if transition is not None:
                    log.info("approval_expired", context_id=context_id, run_id=transition.run_id)
                    self._metrics.runs_ended.labels(Outcome.STOPPED, EXPIRED.code).inc()
                    self._tell(owner, transition)

    async def _check_epoch(self) -> None:
        """Ends the process when the database's history may be another one: what memory holds is of the old one."""
        if await self._store.current_epoch() != self._store.epoch:
            log.critical("epoch_changed")
            self._store.fail("the epoch of the database changed")

    async def _claim(self) -> None:
        if self.draining:
            return
        if self._is_claim_unknown:
            await self._adopt()
        room = self._limits.max_active_runs - len(self._runs)
        if room <= 0:
            return
        limit = min(room, _CLAIM_LIMIT)
        self._told_early.clear()
        claimed = await self._store.claim_runs(limit)
        for run, transition in claimed:
            self._start(run, transition)
        if len(claimed) == limit:
            self._wake.set()

    async def _adopt(self) -> None:
        """Starts the runs of a claim whose outcome was unknown, where it has happened."""
        known = set(self._runs)  # From before the read: one that ends meanwhile is not to be run again.
        for run, transition in await self._store.claimed_runs():
            if (run.id, run.attempt) not in known:
                self._start(run, transition)
        self._is_claim_unknown = False

    def _start(self, run: Run, transition: Transition) -> None:
        attempt = (run.id, run.attempt)
        stop = self._stops[attempt] = asyncio.get_running_loop().create_future()
        reply = self._ledger.begin(run, on_fenced=lambda: _tell(stop, Stop.FENCED))
        self._hub.publish_transition(run.owner, transition)
        task = asyncio.create_task(self._supervise(run, reply), name=f"run {run.id}")
        self._runs[attempt] = task
        self._metrics.active_runs.set(len(self._runs))
        task.add_done_callback(lambda _: self._finished(attempt))
        if run.id in self._told_early:
            _tell(stop, self._told_early[run.id])

    def _finished(self, attempt: Attempt) -> None:
        del self._runs[attempt], self._stops[attempt]
        self._metrics.active_runs.set(len(self._runs))
        self._wake.set()

    # One run

    async def _supervise(self, run: Run, reply: OpenReply) -> None:
        """Sees one run through, also where a defect of ours is in the way: no context stays busy for ever."""
        try:
            await self._see_through(run, reply)
        except Exception as error:
            log.error("run_supervision_failed", run_id=run.id, context_id=run.context_id, **without_words(error))  # noqa: TRY400
            with contextlib.suppress(Fenced, StorageBroken):
                await self._ledger.end(reply, Outcome.FAILED, AGENT_FAILED)

    async def _see_through(self, run: Run, reply: OpenReply) -> None:
        """Drives one run to its end, whatever its agent does."""
        stop = self._stops[run.id, run.attempt]
        draft = await self._draft(run, reply)
        driver = asyncio.create_task(self._driver.drive(run, reply, draft), name=f"agent of run {run.id}")
        driver.add_done_callback(_mark_as_seen)
        waited: set[asyncio.Future[Any]] = {driver, stop}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if not driver.done():
            driver.cancel()
            await asyncio.wait({driver}, timeout=self._limits.cancel_grace)
        if not driver.done():
            self._leave_behind(driver, run)
        reason = stop.result() if stop.done() else None
        if reason in (Stop.DELETED, Stop.FENCED):
            if reason is Stop.FENCED and not reply.fenced:  # Else the ledger has found it out, and said so.
                log.warning("run_fenced", run_id=run.id, context_id=run.context_id, attempt=run.attempt)
            self._ledger.drop(reply)
            return
        outcome, failure = self._verdict(run, driver, reason)
        try:
            if outcome is Outcome.SUCCEEDED and (suspend := driver.result()) is not None:
                try:
                    if await self._ledger.suspend(reply, suspend.requests):
                        return
                    outcome = Outcome.STOPPED
                except ReplyTooLarge as error:
                    outcome, failure = Outcome.FAILED, Failure(code=error.code, detail=str(error))
            await self._ledger.end(reply, outcome, failure)
        except (Fenced, StorageBroken) as error:
            log.warning("run_not_ended", run_id=run.id, context_id=run.context_id, code=error.code)
            return
        code = failure.code if failure and outcome is Outcome.FAILED else ""
        self._metrics.runs_ended.labels(outcome, code).inc()

    def _leave_behind(self, driver: asyncio.Task[Suspend | None], run: Run) -> None:
        """Goes on without an agent that does not stop; what it still yields is refused."""
        log.error("agent_ignores_cancellation", run_id=run.id, context_id=run.context_id)
        self._stubborn.add(driver)
        driver.add_done_callback(self._stubborn.discard)

    def _verdict(
        self, run: Run, driver: asyncio.Task[Suspend | None], reason: Stop | None
    ) -> tuple[Outcome, Failure | None]:
        """How the run ended by what its driver did, and by why it was stopped if it was."""
        if reason is Stop.CANCELLED:
            return Outcome.STOPPED, INTERRUPTED
        if not driver.done() or (driver.cancelled() and reason is Stop.SHUTDOWN):
            return Outcome.FAILED, INTERRUPTED
        # An agent may also be cancelled by itself, by what it awaited.
        error = asyncio.CancelledError() if driver.cancelled() else driver.exception()
        if error is None:
            return Outcome.SUCCEEDED, None
        if isinstance(error, ReplyTooLarge):
            return Outcome.FAILED, Failure(code=error.code, detail=str(error))
        if isinstance(error, Unavailable | StorageBroken):
            return Outcome.FAILED, INTERRUPTED
        if isinstance(error, AgentFailed):
            failure = _failure_of(error)
            log.warning("run_failed", run_id=run.id, context_id=run.context_id, code=failure.code)
            return Outcome.FAILED, failure
        # The type and the place, never the message: it may hold what was said.
        log.error(
            "agent_failed", run_id=run.id, context_id=run.context_id, error=type(error).__name__, at=_place_of(error)
        )
        return Outcome.FAILED, AGENT_FAILED

    async def _draft(self, run: Run, reply: OpenReply) -> Draft | None:
        """What a run that was suspended goes on from; waits for as long as the database is away."""
        if not run.sequence:
            return None
        for attempt in itertools.count():
            try:
                draft = await self._store.draft(run)
                break
            except PASSING as error:
                if not attempt:
                    log.warning("run_delayed", run_id=run.id, context_id=run.context_id, code=error.code)
                await asyncio.sleep(_RETRY_SECONDS[min(attempt, len(_RETRY_SECONDS) - 1)])
        if draft is not None:
            self._ledger.restore(reply, draft.reply.chunks, draft.usage)
        return draft

    # Shutdown

    async def drain(self, grace_seconds: float) -> None:
        """Claims nothing more, lets running replies finish for a while, and interrupts the rest.

        Queued runs stay queued: the next process claims them.
        """
        self.draining = True
        async with self._claiming:
            pass  # What is being claimed now is a run of this process, which has to end.
        if self._runs and grace_seconds > 0:
            log.info("waiting_for_runs", runs=len(self._runs), grace_seconds=grace_seconds)
            await asyncio.wait(self._runs.values(), timeout=grace_seconds)
        ending = [task for attempt, task in self._runs.items() if attempt not in self._given_up]
        if ending:
            log.info("interrupting_runs", runs=len(ending))
        for stop in list(self._stops.values()):
            _tell(stop, Stop.SHUTDOWN)
        if ending:
            await asyncio.wait(ending, timeout=self._limits.cancel_grace + 0.5)
        self._given_up = set(self._runs)
        self._bus.publish(RunQueued())  # Whatever is queued, other nodes may claim.


def _tell(stop: asyncio.Future[Stop], reason: Stop) -> None:
    if not stop.done():
        stop.set_result(reason)


def _mark_as_seen(driver: asyncio.Task[Suspend | None]) -> None:
    """Keeps asyncio from logging what an agent raised after it was stopped: its text may hold what was said."""
    if not driver.cancelled():
        driver.exception()


def _failure_of(error: AgentFailed) -> Failure:
    """What an agent says of its failure, whatever it put there, as it can be stored."""
    code, detail = str(error.code), str(error.detail)
    is_a_code = _CODE.fullmatch(code) is not None
    return Failure(code=code if is_a_code else "agent-error", detail=clean_text(detail)[:_MAX_DETAIL])


def _place_of(error: BaseException) -> str:
    """``file:line`` where the error was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "unknown" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"

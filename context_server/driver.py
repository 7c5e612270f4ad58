"""Drives one agent: hands it what it needs to know, and the ledger what it yields, within the bounds of a run."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from context_server.agents import Agent, AgentFailed, AgentRun, Look
from context_server.agents.driving import deltas_of
from context_server.errors import PASSING
from context_server.hub import Hub
from context_server.ledger import Ledger
from context_server.records import (
    Chunk,
    ChunkKind,
    ContextChanged,
    Delta,
    Run,
    State,
    Suspend,
    Turn,
    Usage,
    now,
)
from context_server.reply import OpenReply
from context_server.store import Store
from context_server.store.reading import Draft

T = TypeVar("T")

ReadFile = Callable[[str, str], Awaitable[bytes]]
"""``(owner, file_id)`` → the file's content."""

_RETRY_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLimits:
    """The bounds of one run; times in seconds, and 0 for none."""

    max_history_bytes: int
    max_seconds: float = 0
    max_silence: float = 0
    max_steps: int = 0
    max_tokens: int = 0


class Driver:
    """Has an agent write the replies of runs."""

    def __init__(
        self, store: Store, ledger: Ledger, hub: Hub, agent: Agent, limits: RunLimits, read_file: ReadFile | None
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._hub = hub
        self._agent = agent
        self._limits = limits
        self._read_file = read_file

    async def drive(self, run: Run, reply: OpenReply, draft: Draft | None) -> Suspend | None:
        """Has the agent write a reply to its end, or to where it cannot go on without a person's decision.

        ``draft`` is what a run that was suspended goes on from.

        Raises:
            AgentFailed: with the code of a bound that was exceeded, or with one of the agent's own.
            Whatever else the agent raises; Fenced, ReplyTooLarge, Unavailable, StorageBroken.
        """
        history = await _patiently(lambda: self._store.history(run, max_bytes=self._limits.max_history_bytes))
        if any(turn.workflow for turn in history[-1:]) and not hasattr(self._agent, "workflows"):
            raise AgentFailed("workflow-unknown", "The agent of this server has no workflows.")
        agent_run = self._agent_run(run, history, draft)
        bounds = _Bounds(self._limits, reply, () if draft is None else draft.reply.chunks)
        async with bounds.kept(), aclosing(deltas_of(self._agent, history, agent_run)) as yielded:
            bounds.wait_for_agent()
            async for value in yielded:
                bounds.is_agents_turn = False
                bounds.check_time()
                if isinstance(value, Delta):
                    if value.kind is ChunkKind.STEP:
                        bounds.count_step(value)
                    await self._ledger.append(reply, value)
                elif isinstance(value, Suspend):
                    return value
                else:
                    self._ledger.note_usage(reply, value)
                    bounds.check_usage(reply.usage)
                bounds.wait_for_agent()
        return None

    def _agent_run(self, run: Run, history: Sequence[Turn], draft: Draft | None) -> AgentRun:
        known = {turn.message_id for turn in history if turn.steers}

        async def look() -> Look:
            # Again with what is known, so that nothing is lost where the first attempt has an unknown outcome.
            taken = await _patiently(lambda: self._store.suspension.look(run, known))
            known.update(turn.message_id for turn in taken.steering)
            if taken.version is not None:
                changed = ContextChanged(context_id=run.context_id, version=taken.version, timestamp=now())
                self._hub.publish(run.owner, changed)
            return Look(mode=taken.mode, steering=taken.steering)

        async def read_file(file_id: str) -> bytes:
            if self._read_file is None:
                raise FileNotFoundError(file_id)
            return await self._read_file(run.owner, file_id)

        return AgentRun(
            run_id=run.id,
            context_id=run.context_id,
            message_id=run.message_id,
            attempt=run.attempt,
            mode=run.mode,
            metadata=run.metadata,
            model=run.model,
            reply=None if draft is None else draft.reply,
            approvals={} if draft is None else {approval.call_id: approval for approval in draft.approvals},
            look_up=look,
            read_file=read_file,
        )


async def _patiently(read: Callable[[], Awaitable[T]]) -> T:
    """What ``read`` gives; waits for a database that is away for a moment."""
    for seconds in _RETRY_SECONDS:
        try:
            return await read()
        except PASSING:
            await asyncio.sleep(seconds)
    return await read()


class _Bounds:
    """The bounds of one run: how long it may take, be silent, and how much it may use.

    The silence is the agent's, and not a tool's nor the disk's. It is watched by one timer that is set anew when it
    fires, and not by one for each delta.
    """

    def __init__(self, limits: RunLimits, reply: OpenReply, chunks: tuple[Chunk, ...]) -> None:
        self._limits = limits
        self._reply = reply
        self._steps = sum(chunk.kind is ChunkKind.STEP and _begins(chunk.data) for chunk in chunks)
        self._clock = asyncio.get_running_loop().time
        self._heard_at = self._clock()
        self._ends_at = self._heard_at + limits.max_seconds if limits.max_seconds else math.inf
        self._was_silent = False
        self._silence = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None
        self.is_agents_turn = False

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Keeps the bounds of time inside.

        Raises:
            AgentFailed: one was exceeded.
        """
        whole = asyncio.timeout(self._limits.max_seconds or None)
        try:
            async with whole, self._silence:
                self._watch(self._limits.max_silence)
                try:
                    yield
                finally:
                    if self._timer is not None:
                        self._timer.cancel()
        except TimeoutError:
            if self._silence.expired() or whole.expired():
                self.check_time(is_over=whole.expired())
            raise
        self.check_time()

    def check_time(self, *, is_over: bool = False) -> None:
        """Passes within the bounds of time; an agent that swallows its cancellation is told here.

        Raises:
            AgentFailed: one was exceeded.
        """
        if self._was_silent:
            detail = f"Nothing came from the agent for {self._limits.max_silence:g} seconds."
            raise AgentFailed("model-silent", detail) from None
        if is_over or self._clock() > self._ends_at:
            detail = f"The run took longer than {self._limits.max_seconds:g} seconds."
            raise AgentFailed("run-too-long", detail) from None

    def wait_for_agent(self) -> None:
        """From now on it is the agent who is silent."""
        self._heard_at = self._clock()
        self.is_agents_turn = True

    def _watch(self, seconds: float) -> None:
        if self._limits.max_silence:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        left = self._heard_at + self._limits.max_silence - self._clock()
        if not self.is_agents_turn or self._reply.phase is State.CALLING_TOOL:
            self._heard_at = self._clock()
            left = self._limits.max_silence
        if left > 0:
            self._watch(left)
        else:
            self._was_silent = True
            self._silence.reschedule(self._clock())

    def count_step(self, delta: Delta) -> None:
        """Takes a step into account.

        Raises:
            AgentFailed: it is one too many.
        """
        self._steps += _begins(delta.data)
        if self._limits.max_steps and self._steps > self._limits.max_steps:
            raise AgentFailed("too-many-steps", f"The run took more than {self._limits.max_steps} steps.")

    def check_usage(self, usage: Usage) -> None:
        """Passes within the bound.

        Raises:
            AgentFailed: the run has used more tokens than it may.
        """
        if self._limits.max_tokens and usage.total_tokens > self._limits.max_tokens:
            raise AgentFailed("too-many-tokens", f"The run used more than {self._limits.max_tokens} tokens.")


def _begins(data: object) -> bool:
    """Whether the data of a ``step`` chunk say that a request to a model begins; a workflow's own step is none."""
    return not (isinstance(data, Mapping) and (data.get("status") == "finished" or "workflow" in data))

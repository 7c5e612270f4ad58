"""The rooms below the API on a temporary database, for tests of one of them: real, with bounds of the test's own."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from context_server.agents import Agent
from context_server.bus import Bus, InProcessBus
from context_server.commands import Commands
from context_server.driver import Driver, RunLimits
from context_server.hub import Hub
from context_server.ledger import Ledger, LedgerLimits
from context_server.mailbox import Pacing
from context_server.metrics import Metrics
from context_server.reader import Reader
from context_server.recent import RecentChunks
from context_server.records import ChunkKind, Message, Receipt, Run
from context_server.reply import OpenReply
from context_server.runner import Runner, RunnerLimits
from context_server.store import Store
from context_server.store.exchanges import Post
from context_server.store.execution import Lease

OWNER = "local"
DEADLINE_SECONDS = 60.0


async def until(reached: Callable[[], Awaitable[bool]]) -> None:
    """Waits for a condition; a test that waits in vain fails by the deadline."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not await reached():  # noqa: ASYNC110  # What is waited for has no event.
            await asyncio.sleep(0.002)


@dataclass
class Rooms:
    """Store, hub and ledger, open, and a runner where there is an agent."""

    store: Store
    hub: Hub
    recent: RecentChunks
    ledger: Ledger
    reader: Reader
    metrics: Metrics
    commands: Commands
    runner: Runner
    fenced: list[str] = field(default_factory=list)

    def metric(self, name: str, **labels: str) -> float:
        """The value of ``context_server_<name>``; 0 when there is none yet."""
        return self.metrics.registry.get_sample_value(f"context_server_{name}", labels) or 0.0

    async def post(self, text: str = "Hello", *, context_id: str | None = None) -> Receipt:
        """Posts a message, in a new context unless one is named."""
        if context_id is None:
            context_id = (await self.store.create_context(OWNER)).id
        return await self.commands.post_message(OWNER, context_id, Post(text=text), if_match=None, once=None)

    async def begin(self) -> OpenReply:
        """A reply of a claimed run that the test writes in place of an agent; to be used without a running runner."""
        context = await self.store.create_context(OWNER)
        await self.store.post_message(OWNER, context.id, Post(text="Hello"))
        ((run, _),) = await self.store.claim_runs(1)
        return self.ledger.begin(run, on_fenced=lambda: self.fenced.append(run.id))

    async def message(self, run: Run | Receipt) -> Message:
        """The reply as the store has it."""
        message_id = run.reply_message_id if isinstance(run, Receipt) else run.message_id
        return await self.store.message(OWNER, run.context_id, message_id)

    async def ended(self, receipt: Receipt) -> Message:
        """The reply, once it has ended."""

        async def has_ended() -> bool:
            return (await self.message(receipt)).status.ended

        await until(has_ended)
        return await self.message(receipt)

    async def quiet(self) -> None:
        """Returns when no run is on in this process."""

        async def none_is_on() -> bool:
            return self.metric("active_runs") == 0

        await until(none_is_on)

    async def chunks(self, run: Run) -> list[tuple[ChunkKind, Any]]:
        """The reply's chunks as ``(kind, text or data)``, read from the database."""
        page = await self.store.page(OWNER, run.context_id, run.message_id, max_bytes=2**40)
        assert [chunk.sequence for chunk in page.chunks] == [*range(1, page.head + 1)]
        return [(chunk.kind, chunk.text if chunk.text is not None else chunk.data) for chunk in page.chunks]

    async def limit_disk(self, *, pages: int) -> None:
        """Has the database file take no more than ``pages`` pages, which is as on a full disk; 0: no limit."""
        await self.store._write(
            lambda connection: connection.exec_driver_sql(f"PRAGMA max_page_count={pages or 2**30}")
        )


def ledger_limits(**changes: Any) -> LedgerLimits:
    """Bounds as by default, without a rest between commits."""
    return LedgerLimits(
        **{
            "commit_interval": 0.0,
            "max_commit_interval": 0.0,
            "max_pending_bytes": 262_144,
            "max_reply_bytes": 16_777_216,
        }
        | changes
    )


def runner_limits(**changes: Any) -> RunnerLimits:
    """Bounds as by default, without much patience."""
    return RunnerLimits(
        **{
            "max_active_runs": 1000,
            "cancel_grace": 0.2,
        }
        | changes
    )


def run_limits(**changes: Any) -> RunLimits:
    """Bounds of a run: none but that of its history."""
    return RunLimits(**{"max_history_bytes": 4_194_304} | changes)


@asynccontextmanager
async def open_rooms(
    folder: Path,
    agent: Agent | None = None,
    *,
    database_url: str | None = None,
    recent_bytes: int = 1_000_000,
    bus: Bus | None = None,
    ledger: LedgerLimits | None = None,
    runner: RunnerLimits | None = None,
    run: RunLimits | None = None,
    lease: Lease | None = None,
) -> AsyncIterator[Rooms]:
    """The rooms on ``folder``'s database, or another. Without an agent no runner runs, and the test is the writer."""
    url = database_url or f"sqlite:///{folder / 'context-server.db'}"
    metrics = Metrics()
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(Store.open(url, connections=4, lease=lease))
        hub = Hub(Pacing(), metrics, asyncio.get_running_loop().time)
        recent = RecentChunks(recent_bytes, metrics)
        writer = await stack.enter_async_context(Ledger(store, hub, recent, metrics, ledger or ledger_limits()))
        bus = bus or InProcessBus()
        commands = Commands(store, recent, hub, bus, max_waiting=20)
        driver = Driver(store, writer, hub, agent or _nobody, run or run_limits(), None)
        runner_room = Runner(store, writer, hub, bus, driver, metrics, runner or runner_limits())
        if agent is not None:
            await stack.enter_async_context(runner_room)
        reader = Reader(store, recent, metrics, max_page_bytes=1_048_576)
        yield Rooms(store, hub, recent, writer, reader, metrics, commands, runner_room)


def _nobody(_history: Any, _run: Any) -> Any:
    raise AssertionError("There is no agent.")

"""Composition root: ``create_app(settings)`` → a Starlette application whose lifespan opens and closes the rooms."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from context_server import __version__
from context_server.agents import Agent, Choice, load_agent
from context_server.api.guard import Guard
from context_server.api.openapi import Documents
from context_server.api.requests import ApiLimits, Rooms
from context_server.api.routes import ENDPOINTS, build_routes, path_not_found
from context_server.bus import open_bus
from context_server.commands import Commands
from context_server.driver import Driver, RunLimits
from context_server.errors import StorageBroken
from context_server.files import FileLimits, Files
from context_server.folder import Folder
from context_server.hub import Hub
from context_server.keeper import Keeper, KeeperLimits
from context_server.ledger import Ledger, LedgerLimits
from context_server.mailbox import Pacing
from context_server.metrics import Metrics
from context_server.reader import Reader
from context_server.recent import RecentChunks
from context_server.records import new_id
from context_server.relay import Relay
from context_server.runner import Runner, RunnerLimits
from context_server.settings import LOOPBACK_HOSTS, Settings
from context_server.slash import Facts, SlashCommands
from context_server.store import Store
from context_server.store.database import file_of
from context_server.store.execution import Lease
from context_server.store.retention import ExpiredContext

EXPOSED_HEADERS = ("ETag", "Location", "Idempotency-Replayed", "Retry-After", "Allow")
ACCEPTED_HEADERS = (
    "Authorization",
    "Content-Type",
    "Idempotency-Key",
    "If-Match",
    "If-None-Match",
    "Last-Event-ID",
    "Cache-Control",
)


class Application(Starlette):
    """Starlette without the two layers that turn exceptions into answers.

    ``api.routes.Resource`` does that, where an answer has not begun; the layers wrap every send, and a pull is two.
    """

    def build_middleware_stack(self) -> ASGIApp:
        """The routes inside the middleware that was given, and nothing else."""
        app: ASGIApp = self.router
        for layer in reversed(self.user_middleware):
            app = layer.cls(app, *layer.args, **layer.kwargs)
        return app


def create_app(
    settings: Settings | None = None,
    *,
    agent: Agent | None = None,
    on_broken: Callable[[StorageBroken], None] | None = None,
    server_cuts_stalled: bool = False,
    metrics: Metrics | None = None,
    worker: int | None = None,
) -> Starlette:
    """The application; it opens its database when its lifespan begins.

    ``agent`` takes the place of the one that ``settings.agent`` names. ``on_broken`` is called once, from any thread,
    when the disk has failed and nothing more will be acknowledged: the process should then end. ``server_cuts_stalled``
    says that the HTTP server itself cuts readers that stall, as ours does; else each stream watches over its sends.
    Where several processes serve a port, ``metrics`` are what they share, and ``worker`` is the number of this one.

    Raises:
        AgentNotLoadable: ``settings.agent`` names nothing that can be loaded.
        DatabaseNotSupported, DatabaseInUse, DatabaseUnreachable, SchemaMismatch, BusNotAvailable: from the lifespan.
    """
    settings = settings or Settings()
    agent = agent or load_agent(settings.agent, _choice(settings))
    metrics = metrics or Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with open_rooms(
            settings, agent, metrics, on_broken, server_cuts_stalled=server_cuts_stalled, worker=worker
        ) as rooms:
            app.state.rooms = rooms
            app.state.drain = lambda: drain(rooms, settings.shutdown_grace_seconds)
            yield

    app = Application(
        routes=build_routes(settings.path_prefix),
        middleware=_middleware(settings, metrics),
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.router.default = path_not_found
    app.state.metrics = metrics
    app.state.openapi = Documents(ENDPOINTS, settings.path_prefix)
    return app


def _middleware(settings: Settings, metrics: Metrics) -> list[Middleware]:
    hosts = frozenset(host.lower() for host in (*LOOPBACK_HOSTS, *settings.allowed_hosts))
    guard = Middleware(Guard, allowed_hosts=hosts, allowed_origins=frozenset(settings.cors_origins), metrics=metrics)
    if not settings.cors_origins:
        return [guard]
    cors = Middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origins,
        allow_methods=("GET", "POST", "PATCH", "DELETE"),
        allow_headers=ACCEPTED_HEADERS,
        expose_headers=EXPOSED_HEADERS,
        max_age=600,
    )
    return [cors, guard]


@contextlib.asynccontextmanager
async def open_rooms(
    settings: Settings,
    agent: Agent,
    metrics: Metrics,
    on_broken: Callable[[StorageBroken], None] | None = None,
    *,
    server_cuts_stalled: bool = False,
    worker: int | None = None,
) -> AsyncIterator[Rooms]:
    """Every room, open: the schema is the newest, what a crash left is repaired, runs are being claimed."""
    clock = asyncio.get_running_loop().time
    async with contextlib.AsyncExitStack() as stack:
        lease = Lease(node_id=new_id(), lease_ms=int(settings.lease_seconds * 1000))
        store = await stack.enter_async_context(
            Store.open(
                settings.database_url, connections=settings.database_connections, lease=lease, on_broken=on_broken
            )
        )
        bus = await stack.enter_async_context(
            open_bus(settings.database_url, settings.bus, namespace=store.epoch, metrics=metrics)
        )
        files = Files(store.files, Folder(_files_path(settings)), _file_limits(settings))
        await files.sweep()
        pacing = Pacing(
            settle=settings.signal_settle_ms / 1000,
            interval=settings.signal_interval_ms / 1000,
            completion=settings.completion_delay_ms / 1000,
            patience=settings.signal_patience_ms / 1000,
        )
        hub = Hub(pacing, metrics, clock)
        recent = RecentChunks(settings.recent_chunk_bytes, metrics)
        relay = None
        if store.shared:
            relay = await stack.enter_async_context(Relay(store, hub, recent, bus, metrics))
        commands = Commands(store, recent, hub, bus, max_waiting=settings.max_waiting_messages)
        ledger = await stack.enter_async_context(Ledger(store, hub, recent, metrics, _ledger_limits(settings, store)))
        driver = Driver(store, ledger, hub, agent, _run_limits(settings), files.read)
        runner = await stack.enter_async_context(
            Runner(store, ledger, hub, bus, driver, metrics, _runner_limits(settings))
        )

        def forget(expired: ExpiredContext) -> None:
            commands.context_is_gone(expired.owner, expired.context_id, expired.version)

        await stack.enter_async_context(Keeper(store, metrics, _keeper_limits(settings), forget))
        stack.callback(hub.close)
        yield Rooms(
            store=store,
            bus=bus,
            ledger=ledger,
            reader=Reader(store, recent, metrics, max_page_bytes=settings.max_page_bytes, relay=relay),
            files=files,
            relay=relay,
            hub=hub,
            commands=commands,
            runner=runner,
            slash=SlashCommands(store, commands, _facts(settings)),
            metrics=metrics,
            limits=_api_limits(settings, server_cuts_stalled=server_cuts_stalled),
            agent_name=settings.writer,
            worker=worker,
        )


async def drain(rooms: Rooms, grace_seconds: float) -> None:
    """Lets running replies finish for a while, interrupts the rest, and says goodbye on every stream."""
    rooms.commands.draining = True
    await rooms.runner.drain(grace_seconds)
    rooms.hub.close()


def _choice(settings: Settings) -> Choice:
    return Choice(
        model=settings.model,
        models=settings.models,
        model_url=settings.model_url,
        model_retries=settings.model_retries,
        mcp=settings.mcp,
    )


def _ledger_limits(settings: Settings, store: Store) -> LedgerLimits:
    return LedgerLimits(
        commit_interval=settings.commit_interval_ms / 1000,
        max_commit_interval=settings.max_commit_interval_ms / 1000,
        max_pending_bytes=settings.max_pending_bytes,
        max_reply_bytes=settings.max_reply_bytes,
        approval_lifetime=settings.approval_hours * 3600,
        renewal=settings.lease_seconds / 3 if store.shared else None,
    )


def _files_path(settings: Settings) -> Path:
    """The folder that the settings name, or one beside the database's file, or in the working directory."""
    if settings.files_directory:
        return Path(settings.files_directory).expanduser().absolute()
    database = file_of(settings.database_url)
    return Path("context-server-files").absolute() if database is None else database.with_name(f"{database.name}-files")


def _file_limits(settings: Settings) -> FileLimits:
    return FileLimits(max_bytes=settings.max_file_bytes, types=settings.file_types)


def _runner_limits(settings: Settings) -> RunnerLimits:
    return RunnerLimits(
        max_active_runs=settings.max_active_runs,
        cancel_grace=settings.cancel_grace_seconds,
    )


def _run_limits(settings: Settings) -> RunLimits:
    return RunLimits(
        max_history_bytes=settings.max_history_bytes,
        max_seconds=settings.max_run_seconds,
        max_silence=settings.max_silence_seconds,
        max_steps=settings.max_run_steps,
        max_tokens=settings.max_run_tokens,
    )


_PUBLIC_SETTINGS = (
    "max_body_bytes",
    "max_file_bytes",
    "file_types",
    "max_waiting_messages",
    "max_run_seconds",
    "max_silence_seconds",
    "max_run_steps",
    "max_run_tokens",
    "approval_hours",
    "heartbeat_seconds",
    "compact_after_hours",
    "retain_days",
)
"""Settings that clients may know: none that says where something is, or how to get in."""


def _facts(settings: Settings) -> Facts:
    return Facts(
        version=__version__,
        agent=settings.writer,
        model=settings.model,
        models=tuple(dict.fromkeys(filter(None, (settings.model, *settings.models)))),
        settings=settings.model_dump(mode="json", include=set(_PUBLIC_SETTINGS)),
    )


def _keeper_limits(settings: Settings) -> KeeperLimits:
    return KeeperLimits(
        idempotency_lifetime_ms=int(settings.idempotency_hours * 3_600_000),
        compact_after_ms=_age_ms(settings.compact_after_hours, 3_600_000),
        retain_ms=_age_ms(settings.retain_days, 86_400_000),
        share=settings.housekeeping_share / settings.workers,
    )


def _age_ms(value: float, unit_ms: int) -> int | None:
    """An age that may be 0, which stands for never."""
    return max(1, int(value * unit_ms)) if value else None


def _api_limits(settings: Settings, *, server_cuts_stalled: bool) -> ApiLimits:
    return ApiLimits(
        max_body_bytes=settings.max_body_bytes,
        max_page_bytes=settings.max_page_bytes,
        max_streams=settings.max_streams,
        max_contexts_per_stream=settings.max_contexts_per_stream,
        heartbeat=settings.heartbeat_seconds,
        send_timeout=None if server_cuts_stalled else settings.send_timeout_seconds,
        idempotency_lifetime_ms=int(settings.idempotency_hours * 3_600_000),
    )

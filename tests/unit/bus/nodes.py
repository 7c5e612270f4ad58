"""Nodes of an installation: a bus each, with what it heard; and the servers that they hear each other by."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import asyncpg
import redis
import redis.asyncio

from context_server.bus import Bus, BusState, Moved, WakeUp, open_bus, owner_tag
from context_server.bus.linked import Timing
from context_server.bus.postgresql import CHANNEL
from context_server.metrics import Metrics
from context_server.records import new_id
from tests.chaos.proxy import Proxy
from tests.engines import Postgres, Redis

DEADLINE_SECONDS = 60.0
OWNER = "Ada Lovelace"
TAG = owner_tag(OWNER)
PATIENT = Timing(start=DEADLINE_SECONDS, flush=DEADLINE_SECONDS)
"""As in production, but a test begins with nodes that hear, however slow the machine is."""
HASTY = Timing(start=DEADLINE_SECONDS, ping=0.2, deaf=2.0, last_retry=0.4)
"""Notices deafness soon, and seldom by mistake."""


async def until(reached: Callable[[], bool]) -> None:
    """Waits for a condition; a test that waits in vain fails by the deadline."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not reached():  # noqa: ASYNC110  # What is waited for has no event.
            await asyncio.sleep(0.005)


@dataclass
class Node:
    """A bus, and what its listeners were told."""

    bus: Bus
    metrics: Metrics
    heard: list[WakeUp] = field(default_factory=list)
    """From other nodes."""
    own: list[WakeUp] = field(default_factory=list)
    gaps: int = 0

    def __post_init__(self) -> None:
        self.bus.subscribe(self._hear)
        self.bus.on_gap(self._miss)

    def _hear(self, wake_up: WakeUp, remote: bool) -> None:
        (self.heard if remote else self.own).append(wake_up)

    def _miss(self) -> None:
        self.gaps += 1

    def counted(self, name: str, **labels: str) -> float:
        """The value of ``context_server_<name>``."""
        labels["bus"] = self.bus.kind
        return self.metrics.registry.get_sample_value(f"context_server_{name}", labels) or 0.0

    async def hears(self, *wake_ups: WakeUp) -> None:
        """Waits until it has heard all of them."""
        await until(lambda: all(each in self.heard for each in wake_ups))

    async def is_in(self, state: BusState) -> None:
        """Waits until its bus is in that state."""
        await until(lambda: self.bus.state is state)


class Server(ABC):
    """A private server of one kind, and the nodes on it."""

    kind: ClassVar[str]

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.port = engine.port

    @abstractmethod
    def make(self, metrics: Metrics, timing: Timing, port: int, namespace: str) -> Bus:
        """A bus, not open yet."""

    @abstractmethod
    async def sever(self) -> None:
        """Has the server end every connection of a bus."""

    @abstractmethod
    async def say(self, payload: str) -> None:
        """Says something on the channel that every node hears."""

    @abstractmethod
    def overhear(self) -> AbstractAsyncContextManager[list[str]]:
        """Everything that is said by any node from now on, as it stands on the wire."""

    @abstractmethod
    async def deafen(self, proxy: Proxy) -> None:
        """Has all who begin to ``follow_all`` by way of the proxy hear nothing any more; what they say is taken."""

    @abstractmethod
    async def undeafen(self, proxy: Proxy) -> None:
        """Has new connections hear again."""

    @abstractmethod
    def stop(self) -> None:
        """Ends the server at once."""

    def start(self) -> None:
        """Starts it again."""
        self.engine.start()

    def node(self, timing: Timing = PATIENT, *, port: int | None = None, namespace: str = "test") -> Node:
        """A node whose bus is not open yet, by way of another port where one is given."""
        metrics = Metrics()
        return Node(self.make(metrics, timing, port or self.port, namespace), metrics)

    @asynccontextmanager
    async def nodes(self, count: int, timing: Timing = PATIENT, **options: Any) -> AsyncIterator[list[Node]]:
        """Nodes that hear all of each other."""
        nodes = [self.node(timing, **options) for _ in range(count)]
        for node in nodes:
            node.bus.follow_all()
            await node.bus.__aenter__()
        try:
            assert [node.bus.state for node in nodes] == [BusState.CONNECTED] * count
            yield nodes
        finally:
            for node in nodes:
                await node.bus.__aexit__(None, None, None)


class PostgresServer(Server):
    """LISTEN and NOTIFY."""

    kind = "postgresql"
    engine: Postgres

    def __init__(self, engine: Postgres) -> None:
        super().__init__(engine)
        self._database = f"bus_{new_id().replace('-', '')}"
        engine.create(self._database)

    def make(self, metrics: Metrics, timing: Timing, port: int, namespace: str) -> Bus:
        url = self.engine.url(self._database, port)
        return open_bus(url, "", namespace=namespace, metrics=metrics, timing=timing)

    async def sever(self) -> None:
        await self._do(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'context-server bus hear'"
        )

    async def say(self, payload: str) -> None:
        await self._do("SELECT pg_notify($1, $2)", CHANNEL, payload)

    @asynccontextmanager
    async def overhear(self) -> AsyncIterator[list[str]]:
        said: list[str] = []
        async with self._connection() as connection:
            await connection.add_listener(CHANNEL, lambda *heard: said.append(heard[-1]))
            yield said

    async def deafen(self, proxy: Proxy) -> None:
        await self._define_notify("NULL")

    async def undeafen(self, proxy: Proxy) -> None:
        await self._define_notify("PERFORM pg_catalog.pg_notify($1, $2)")

    async def open(self) -> None:
        """Has every connection notify by a function of the test's own, which can be made to do nothing."""
        await self._do(f"ALTER DATABASE {self._database} SET search_path = public, pg_catalog")
        await self._define_notify("PERFORM pg_catalog.pg_notify($1, $2)")

    async def _define_notify(self, body: str) -> None:
        await self._do(
            "CREATE OR REPLACE FUNCTION public.pg_notify(text, text) RETURNS void LANGUAGE plpgsql AS "
            f"$body$BEGIN {body}; END$body$"
        )

    def stop(self) -> None:
        self.engine.crash()

    async def _do(self, statement: str, *arguments: Any) -> None:
        async with self._connection() as connection:
            await connection.execute(statement, *arguments)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Any]:
        connection = await asyncpg.connect(host="127.0.0.1", port=self.port, user="postgres", database=self._database)
        try:
            yield connection
        finally:
            await connection.close()


class RedisServer(Server):
    """PUBLISH and SUBSCRIBE."""

    kind = "redis"
    engine: Redis

    def make(self, metrics: Metrics, timing: Timing, port: int, namespace: str) -> Bus:
        url = f"redis://127.0.0.1:{port}/0"
        return open_bus("postgresql://unused", url, namespace=namespace, metrics=metrics, timing=timing)

    async def sever(self) -> None:
        await self._do("CLIENT", "KILL", "TYPE", "pubsub")

    async def say(self, payload: str) -> None:
        await self._do("PUBLISH", "context-server:test:runs", payload.encode())

    @asynccontextmanager
    async def overhear(self) -> AsyncIterator[list[str]]:
        said: list[str] = []
        async with redis.asyncio.Redis(port=self.port) as client, client.pubsub() as channels:
            await channels.psubscribe("context-server:*")
            assert (await channels.get_message(timeout=DEADLINE_SECONDS))["type"] == "psubscribe"

            async def listen() -> None:
                while True:
                    message = await channels.get_message(timeout=None)
                    said.append(message["data"].decode())

            task = asyncio.create_task(listen())
            yield said
            task.cancel()
            await asyncio.wait({task})

    async def deafen(self, proxy: Proxy) -> None:
        proxy.lose_answers_to(b"SUBSCRIBE")

    async def undeafen(self, proxy: Proxy) -> None:
        proxy.lose_nothing()

    def stop(self) -> None:
        self.engine.kill()

    async def _do(self, *command: Any) -> None:
        with redis.Redis(port=self.port) as client:
            client.execute_command(*command)


def moved(context_id: str | None = None, version: int | None = 1, **says: Any) -> Moved:
    """A ``Moved`` of a context, a new one unless it is named."""
    says = {"message_id": None, "sequence": None} | says
    return Moved(context_id or new_id(), TAG, version, **says)


async def hear_each_other(nodes: list[Node]) -> None:
    """Returns when each node has heard something new of each other one."""
    for speaker in nodes:
        context_id = new_id()
        begun = time.monotonic()
        others = [node for node in nodes if node is not speaker]
        while not all(any(moved(context_id) == each for each in node.heard) for node in others):
            assert time.monotonic() < begun + DEADLINE_SECONDS, "what was said was not heard"
            speaker.bus.publish(moved(context_id))
            await asyncio.sleep(0.02)

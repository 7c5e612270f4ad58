"""Packets by LISTEN and NOTIFY, on connections of the bus's own.

Two connections, one that listens and one that notifies. With one alone the echo would prove nothing: a server hands a
session its own notifications with the answer to the statement, which also passes a pooler in transaction mode, where
those of others are thrown away.

NOTIFY takes a lock of the whole database at commit, so it has no place in the transactions of the store. Its statement
is a transaction by itself, and many packets are one statement.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

import asyncpg  # type: ignore[import-untyped]  # It has no types.

from context_server.bus.line import Ears
from context_server.bus.packets import Item

CHANNEL: Final = "context_server"
"""One for each database: NOTIFY does not cross databases."""

_NOTIFY = "SELECT pg_notify($1, packet) FROM unnest($2::text[]) AS packet"
_CLOSE_SECONDS = 1.0
_STUCK_MS = 30_000
"""How long the server waits for a node that does not read: until then it keeps all that was ever notified, since
PostgreSQL forgets a notification when its last listener has had it, and has room for 8 GB of them."""


class PostgresLine:
    """A PostgreSQL database; every node hears everything."""

    kind = "postgresql"

    def __init__(self, database_url: str, connect_seconds: float) -> None:
        self._arguments = connect_arguments(database_url)
        self._connect_seconds = connect_seconds

    async def connect(self, node: str, ears: Ears) -> "PostgresConnection":
        """A connection that listens and one that notifies. ``node`` has no channel of its own: pings are few.

        Raises:
            OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError: there is no server, it refuses, or it
                is one where one cannot listen, such as a standby.
        """
        drivers: list[asyncpg.Connection] = []
        try:
            async with asyncio.timeout(self._connect_seconds):
                for purpose in ("hear", "speak"):
                    name = {"application_name": f"context-server bus {purpose}"}
                    drivers.append(await asyncpg.connect(**self._arguments, server_settings=name))
                connection = PostgresConnection(*drivers)
                await connection.listen(ears)
        except BaseException:
            for driver in drivers:
                driver.terminate()
            raise
        return connection

    def follow(self, context_id: str) -> None:
        """Everything is heard."""

    def unfollow(self, context_id: str) -> None:
        """Everything is heard."""

    def follow_all(self) -> None:
        """Everything is heard."""

    def unfollow_all(self) -> None:
        """Everything is heard."""


class PostgresConnection:
    """A connection that listens and one that notifies; when one breaks, both end."""

    def __init__(self, hearing: asyncpg.Connection, speaking: asyncpg.Connection) -> None:
        self._hearing = hearing
        self._speaking = speaking
        self._sending = False
        self._ended = asyncio.Event()
        for driver in (hearing, speaking):
            driver.add_termination_listener(lambda _: self._ended.set())

    async def listen(self, ears: Ears) -> None:
        """Begins to hear."""

        def hear(_driver: Any, _process: int, _channel: str, packet: str) -> None:
            ears.hear(packet)

        with suppress(asyncpg.PostgresError):  # Not every server that speaks like PostgreSQL has this setting.
            await self._hearing.execute("SELECT set_config('tcp_user_timeout', $1, false)", str(_STUCK_MS))
        await self._hearing.add_listener(CHANNEL, hear)

    def works(self) -> Sequence[Coroutine[Any, Any, None]]:
        """Waits for the end; asyncpg itself reads."""
        return (self._until_ended(),)

    async def _until_ended(self) -> None:
        await self._ended.wait()

    def channel_of(self, item: Item) -> str:
        """The one that there is."""
        return CHANNEL

    async def send(self, packets: Sequence[tuple[str, str]]) -> None:
        """Notifies of all packets in one transaction; they arrive in their order.

        Raises:
            OSError, asyncpg.PostgresError, asyncpg.InterfaceError: the connection is broken, or not good for this.
        """
        self._sending = True
        await self._speaking.execute(_NOTIFY, CHANNEL, [packet for _, packet in packets])
        self._sending = False

    async def close(self) -> None:
        """Takes leave of the server, unless it owes an answer, which it may never give."""
        if not self._sending:
            with suppress(Exception):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await self._speaking.close()
                    await self._hearing.close()
        self._speaking.terminate()
        self._hearing.terminate()


def connect_arguments(database_url: str) -> dict[str, Any]:
    """How asyncpg is told what the store's URL says.

    ``postgresql+asyncpg://me@db:5433/chat?ssl=require`` → ``{"user": "me", "host": "db", "port": 5433, …}``. What is
    not said is left to asyncpg, which asks ``PGHOST`` and the like, as it does for the store.
    """
    parts = urlsplit(database_url)
    query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    said = {
        "host": parts.hostname or query.get("host"),
        "port": parts.port or (int(query["port"]) if "port" in query else None),
        "user": unquote(parts.username or "") or query.get("user"),
        "password": unquote(parts.password or "") or query.get("password"),
        "database": unquote(parts.path.removeprefix("/")) or query.get("database"),
        "ssl": query.get("ssl"),
        "passfile": query.get("passfile"),
    }
    return {name: value for name, value in said.items() if value is not None and value != ""}

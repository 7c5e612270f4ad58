"""Packets by PUBLISH and SUBSCRIBE of Redis, in channels by shard: a node hears of little that it has no use for.

Two connections, since one that is subscribed can say nothing else (protocol 2, which every server speaks). ``PubSub``
of redis-py is not used: it reconnects without telling, and what was published meanwhile would be missed without a gap.
"""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any

from redis.asyncio.connection import AbstractConnection, Connection, parse_url
from redis.backoff import NoBackoff
from redis.retry import Retry

from context_server.bus.interest import Interest, shard_of
from context_server.bus.line import Ears
from context_server.bus.packets import Item, Ping
from context_server.bus.wakeups import Moved


class RedisLine:
    """A Redis server. ``namespace`` keeps installations apart that share one: channels are not kept apart by database.

    Raises:
        ValueError, TypeError: the URL is wrong; the message may hold it.
    """

    kind = "redis"

    def __init__(self, url: str, namespace: str, connect_seconds: float) -> None:
        self._url = url
        self._prefix = f"context-server:{namespace}"
        self._connect_seconds = connect_seconds
        self._interest = Interest()
        self._driver()

    def _driver(self) -> AbstractConnection:
        """A connection, not open yet, that never waits for itself nor repeats anything: the bus does."""
        arguments: dict[str, Any] = dict(parse_url(self._url))
        kind: type[AbstractConnection] = arguments.pop("connection_class", Connection)
        return kind(
            **arguments
            | {
                "protocol": 2,
                "socket_connect_timeout": self._connect_seconds,
                "socket_timeout": None,
                "socket_keepalive": True,
                "retry": Retry(NoBackoff(), 0),
                "driver_info": None,
                "client_name": "context-server-bus",
            }
        )

    async def connect(self, node: str, ears: Ears) -> "RedisConnection":
        """Both connections, subscribed to what this node wants to hear.

        Raises:
            TimeoutError, redis.exceptions.RedisError: there is no server, it refuses, or does not let us subscribe.
        """
        connection = RedisConnection(self._driver(), self._driver(), self._prefix, node, self._interest, ears)
        try:
            async with asyncio.timeout(self._connect_seconds):
                await connection.open()
        except BaseException:
            await connection.close()
            raise
        return connection

    def follow(self, context_id: str) -> None:
        """Hears the context's shard from soon on; then there is a gap, for what was said until then."""
        self._interest.follow(context_id)

    def unfollow(self, context_id: str) -> None:
        """Hears its shard no more when nobody wants it."""
        self._interest.unfollow(context_id)

    def follow_all(self) -> None:
        """Hears every shard from soon on."""
        self._interest.follow_all()

    def unfollow_all(self) -> None:
        """Hears every shard no more when nobody wants it."""
        self._interest.unfollow_all()


class RedisConnection:
    """A connection that hears and one that speaks; when one breaks, both end."""

    def __init__(
        self,
        hearing: AbstractConnection,
        speaking: AbstractConnection,
        prefix: str,
        node: str,
        interest: Interest,
        ears: Ears,
    ) -> None:
        self._hearing = hearing
        self._speaking = speaking
        self._runs = f"{prefix}:runs"
        self._echo = f"{prefix}:echo:{node}"
        self._prefix = prefix
        self._interest = interest
        self._ears = ears
        self._heard: frozenset[int] = frozenset()
        """The shards that the server was told to send."""
        self._unconfirmed = 0

    async def open(self) -> None:
        """Connects and subscribes; what is published after this is heard."""
        for each in (self._hearing, self._speaking):
            await each.connect()  # type: ignore[no-untyped-call]  # untyped in the library
        self._interest.changed.clear()
        self._heard = self._interest.shards()
        await self._subscribe([self._runs, self._echo, *map(self._shard, self._heard)])
        while self._unconfirmed:
            self._take(await self._hearing.read_response())

    def works(self) -> Sequence[Coroutine[Any, Any, None]]:
        """Reads, and subscribes to what becomes of interest."""
        return self._read_forever(), self._adapt_forever()

    def channel_of(self, item: Item) -> str:
        """A ping's own, a shard's, or that of runs, which all nodes hear."""
        if isinstance(item, Moved):
            return self._shard(shard_of(item.context_id))
        return self._echo if isinstance(item, Ping) else self._runs

    def _shard(self, shard: int) -> str:
        return f"{self._prefix}:{shard:02}"

    async def send(self, packets: Sequence[tuple[str, str]]) -> None:
        """Publishes all packets in one go; those of one channel arrive in their order.

        Raises:
            redis.exceptions.RedisError: the connection is broken, or not good for this.
        """
        commands = [("PUBLISH", channel, packet) for channel, packet in packets]
        await self._speaking.send_packed_command(self._speaking.pack_commands(commands))
        for _ in commands:
            await self._speaking.read_response()

    async def close(self) -> None:
        """Closes both without waiting for the server."""
        await self._hearing.disconnect(nowait=True)
        await self._speaking.disconnect(nowait=True)

    async def _read_forever(self) -> None:
        while True:
            if self._take(await self._hearing.read_response()):
                self._ears.miss()  # What was said in the new shards before is to be read.

    def _take(self, response: Any) -> bool:
        """Whether this was the last confirmation that was waited for."""
        match response:
            case [b"message", bytes(), bytes(packet)]:
                # A packet is ASCII; anything else is refused where packets are read.
                self._ears.hear(packet.decode("ascii", errors="replace"))
            case [b"subscribe", *_]:
                self._unconfirmed -= 1
                return not self._unconfirmed
        return False

    async def _adapt_forever(self) -> None:
        while True:
            await self._interest.changed.wait()
            self._interest.changed.clear()
            wanted = self._interest.shards()
            new, old = wanted - self._heard, self._heard - wanted
            self._heard = wanted
            if new:
                await self._subscribe(map(self._shard, new))
            if old:
                await self._hearing.send_command("UNSUBSCRIBE", *map(self._shard, old))

    async def _subscribe(self, channels: Iterable[str]) -> None:
        names = list(channels)
        self._unconfirmed += len(names)
        await self._hearing.send_command("SUBSCRIBE", *names)

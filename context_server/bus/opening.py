"""Which bus a node uses: by its database, and by the setting ``bus``. Drivers are imported when they are chosen."""

from context_server.bus.contract import Bus
from context_server.bus.in_process import InProcessBus
from context_server.bus.linked import LinkedBus, Timing
from context_server.errors import BusNotAvailable
from context_server.metrics import Metrics

_POSTGRES = ("postgresql", "postgres")
_REDIS = ("redis", "rediss")


def open_bus(database_url: str, bus: str, *, namespace: str, metrics: Metrics, timing: Timing | None = None) -> Bus:
    """The bus, to be used with ``async with``; that other nodes are not heard is no failure, but its ``state``.

    ``bus`` is empty (in process on SQLite, LISTEN and NOTIFY on PostgreSQL) or the URL of a Redis server. ``namespace``
    is what nodes on one database have in common and no others have, such as its epoch.

    Raises:
        BusNotAvailable: ``bus`` names none that is known, or is of no use with this database, or its driver is not
            installed. No URL is in the message: it may hold a password.
    """
    timing = timing or Timing()
    on_postgres = _scheme(database_url).partition("+")[0] in _POSTGRES
    if not bus:
        return _open_postgres(database_url, metrics, timing) if on_postgres else InProcessBus()
    if _scheme(bus) not in _REDIS:
        raise BusNotAvailable("--bus takes a URL of Redis, redis://… or rediss://…, or nothing")
    if not on_postgres:
        raise BusNotAvailable(
            "--bus is of no use on SQLite, whose file one process serves: leave it out, or use PostgreSQL, "
            "--database postgresql+asyncpg://…"
        )
    return _open_redis(bus, namespace, metrics, timing)


def _scheme(url: str) -> str:
    return url.partition(":")[0].lower()


def _open_postgres(database_url: str, metrics: Metrics, timing: Timing) -> Bus:
    try:
        from context_server.bus.postgresql import PostgresLine
    except ImportError:
        raise BusNotAvailable("PostgreSQL needs the extra 'postgres': pip install 'context-server[postgres]'") from None
    return LinkedBus(PostgresLine(database_url, timing.connect), metrics, timing)


def _open_redis(url: str, namespace: str, metrics: Metrics, timing: Timing) -> Bus:
    try:
        from context_server.bus.redis import RedisLine
    except ImportError:
        raise BusNotAvailable("--bus redis://… needs the extra 'redis': pip install 'context-server[redis]'") from None
    try:
        line = RedisLine(url, namespace, timing.connect)
    except (ValueError, TypeError):
        raise BusNotAvailable(
            "--bus is no URL that Redis's client understands: redis://[user:password@]host:port/0"
        ) from None
    return LinkedBus(line, metrics, timing)

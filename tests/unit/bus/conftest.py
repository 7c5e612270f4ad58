"""Private servers for the bus, which a test may break, and has to leave running: one of each kind for all tests."""

import asyncio
from collections.abc import Iterator

import pytest

from tests.chaos.proxy import Proxy
from tests.engines import Postgres, Redis
from tests.unit.bus.nodes import PostgresServer, RedisServer, Server


@pytest.fixture(scope="package")
def postgres_server() -> Iterator[PostgresServer]:
    with Postgres(quick=True) as engine:
        made = PostgresServer(engine)
        asyncio.run(made.open())
        yield made


@pytest.fixture(scope="package")
def redis_server() -> Iterator[RedisServer]:
    with Redis() as engine:
        yield RedisServer(engine)


@pytest.fixture(params=["postgres_server", "redis_server"], ids=["postgresql", "redis"], scope="package")
def server(request: pytest.FixtureRequest) -> Server:
    """A server of each kind that carries wake-ups between nodes."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    """The network before the server."""
    with Proxy(server.port) as made:
        yield made

"""Two nodes on one PostgreSQL, which the tests of this folder put behind nginx."""

from collections.abc import Iterator

import pytest

from tests.databases import new_database
from tests.proxy.nginx import NAME, Nginx
from tests.server import Server

HEARTBEAT_SECONDS = 0.5


@pytest.fixture(scope="package")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    with new_database("postgresql", tmp_path_factory.mktemp("database")) as url:
        settings = {"database": url, "agent": "metronome", "allowed_hosts": NAME, "log_format": "json"}
        with (
            Server(tmp_path_factory.mktemp("first"), heartbeat_seconds=HEARTBEAT_SECONDS, **settings) as first,
            Server(tmp_path_factory.mktemp("second"), heartbeat_seconds=HEARTBEAT_SECONDS, **settings) as second,
        ):
            yield [first, second]


@pytest.fixture
def ports(nodes: list[Server]) -> list[int]:
    return [node.port for node in nodes]


@pytest.fixture
def nginx(ports: list[int]) -> Iterator[Nginx]:
    """nginx with the documented file before the two nodes."""
    with Nginx(ports) as running:
        yield running

"""What only PostgreSQL can do to a bus."""

import asyncio

import asyncpg
import pytest

from context_server.bus import BusState
from context_server.bus import postgresql as postgresql_module
from context_server.bus.linked import Timing
from context_server.bus.postgresql import CHANNEL, PostgresConnection
from tests.chaos.proxy import Proxy
from tests.unit.bus.nodes import HASTY, PATIENT, PostgresServer, moved, until
from tests.unit.bus.pooler import pooler


@pytest.mark.scenario("wake-ups", "A pooler that passes nothing on")
async def test_behind_a_pooler_in_transaction_mode_the_server_polls(postgres_server):
    async with pooler(postgres_server.port) as port, postgres_server.nodes(1) as (there,):
        node = postgres_server.node(Timing(start=0.5, ping=HASTY.ping, deaf=HASTY.deaf), port=port)
        async with node.bus:
            assert node.bus.state is BusState.POLLING
            node.bus.publish(moved(context_id := moved().context_id))
            await there.hears(moved(context_id))
            there.bus.publish(moved())
        assert node.gaps == 0  # It never took itself for connected.


@pytest.mark.scenario("wake-ups", "A pooler that passes nothing on")
async def test_with_an_echo_over_the_listening_connection_a_pooler_is_not_noticed(postgres_server, monkeypatch):
    """The negative control: who speaks where it listens hears itself, and nobody else."""
    make = PostgresConnection.__init__

    def make_with_one(connection, hearing, speaking):
        speaking.terminate()
        make(connection, hearing, hearing)

    monkeypatch.setattr(PostgresConnection, "__init__", make_with_one)
    async with pooler(postgres_server.port) as port:
        node = postgres_server.node(PATIENT, port=port)
        async with node.bus:
            assert node.bus.state is BusState.CONNECTED


@pytest.mark.scenario("wake-ups", "A node that does not read")
async def test_the_server_lets_go_of_a_node_that_does_not_read(postgres_server, monkeypatch):
    """Beside it the negative control: one that the server has no patience with, and one that it waits for."""
    unending = Timing(start=PATIENT.start, flush=0.1, ping=3600, deaf=3600)
    with Proxy(postgres_server.port) as proxy, Proxy(postgres_server.port) as other:
        monkeypatch.setattr(postgresql_module, "_STUCK_MS", 0)
        waited_for = postgres_server.node(unending, port=other.port)
        async with waited_for.bus:
            monkeypatch.setattr(postgresql_module, "_STUCK_MS", 1000)
            async with postgres_server.node(unending, port=proxy.port).bus:
                assert await listening(postgres_server) == 2
                proxy.cut()
                other.cut()
                async with asyncio.timeout(PATIENT.start):
                    while await listening(postgres_server) == 2:
                        await fill_the_queue(postgres_server)
                assert await listening(postgres_server) == 1
                proxy.mend()
                other.mend()
    await until(lambda: waited_for.bus.state is BusState.POLLING)


async def listening(postgres_server: PostgresServer) -> int:
    """How many connections of nodes the server has that listen."""
    connection = await asyncpg.connect(
        host="127.0.0.1", port=postgres_server.port, user="postgres", database="postgres"
    )
    try:
        return await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'context-server bus hear'"
        )
    finally:
        await connection.close()


async def fill_the_queue(postgres_server: PostgresServer) -> None:
    """Says more than lies on the way to a node that does not read, after a few times."""
    async with postgres_server._connection() as connection:
        await connection.execute(
            "SELECT pg_catalog.pg_notify($1, repeat('x', 7990) || number) FROM generate_series(1, 500) AS number",
            CHANNEL,
        )

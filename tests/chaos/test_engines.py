"""The servers that trials break do crash, and come back with what was committed, and with nothing else."""

import asyncio

from tests.chaos.rows import connect
from tests.engines import HOST, Postgres, Redis


async def test_postgresql_crashes_and_comes_back_with_what_was_committed() -> None:
    with Postgres(quick=True) as server:
        url = server.create("crashing")
        connection = await connect(url)
        settings = [await connection.fetchval(f"SHOW {name}") for name in ("fsync", "synchronous_commit")]
        await connection.execute("CREATE TABLE said (word text); INSERT INTO said VALUES ('committed')")
        await connection.execute("BEGIN; INSERT INTO said VALUES ('not committed')")

        server.crash()
        server.start()

        assert settings == ["on", "on"]
        again = await connect(url)
        assert [row["word"] for row in await again.fetch("SELECT word FROM said")] == ["committed"]
        await again.close()
        connection.terminate()


async def test_redis_is_gone_when_it_is_killed_and_back_when_it_is_started() -> None:
    with Redis() as server:
        assert await answers(server)

        server.kill()

        assert not await answers(server)
        server.start()
        assert await answers(server)


async def answers(server: Redis) -> bool:
    try:
        reader, writer = await asyncio.open_connection(HOST, server.port)
    except OSError:
        return False
    writer.write(b"PING\r\n")
    answer = await reader.readline()
    writer.close()
    return answer == b"+PONG\r\n"

"""The network that trials break does what they say: a trial behind one that only forwards would prove nothing."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from tests.chaos.proxy import HOST, Proxy

SILENCE_SECONDS = 0.2
BROKEN = (ConnectionResetError, asyncio.IncompleteReadError)
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while piece := await reader.read(100):
            writer.write(piece)
    writer.close()


@asynccontextmanager
async def network() -> AsyncIterator[Proxy]:
    """A proxy before a server that says what it hears."""
    server = await asyncio.start_server(_echo, HOST, 0)
    async with server:
        with Proxy(server.sockets[0].getsockname()[1]) as proxy:
            yield proxy


@asynccontextmanager
async def connected(proxy: Proxy) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection(HOST, proxy.port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def say(connection: Connection, text: bytes) -> bytes:
    connection[1].write(text)
    return await heard(connection, len(text))


async def heard(connection: Connection, size: int) -> bytes:
    async with asyncio.timeout(10):
        return await connection[0].readexactly(size)


async def is_silent(connection: Connection) -> bool:
    try:
        async with asyncio.timeout(SILENCE_SECONDS):
            await connection[0].read(1)
    except TimeoutError:
        return True
    return False


async def test_a_whole_network_forwards_both_ways_and_passes_on_the_end() -> None:
    async with network() as proxy, connected(proxy) as connection:
        assert await say(connection, b"one") == b"one"
        connection[1].write_eof()
        async with asyncio.timeout(10):
            assert await connection[0].read() == b""


async def test_a_cut_is_silent_and_what_was_sent_arrives_when_it_is_mended() -> None:
    async with network() as proxy, connected(proxy) as old:
        assert await say(old, b"one") == b"one"

        proxy.cut()

        old[1].write(b"two")
        async with connected(proxy) as new:
            new[1].write(b"three")
            assert await is_silent(old)
            assert await is_silent(new)

            proxy.mend()

            assert await heard(old, 3) == b"two"
            assert await heard(new, 5) == b"three"


async def test_a_reset_breaks_what_is_open_and_nothing_later() -> None:
    async with network() as proxy, connected(proxy) as old:
        await say(old, b"one")

        proxy.reset()

        with pytest.raises(ConnectionResetError):
            await heard(old, 1)
        async with connected(proxy) as new:
            assert await say(new, b"two") == b"two"


async def test_a_refusing_network_resets_every_connection_until_it_is_mended() -> None:
    async with network() as proxy, connected(proxy) as old:
        await say(old, b"one")

        proxy.refuse()

        with pytest.raises(ConnectionResetError):
            await heard(old, 1)
        with pytest.raises(BROKEN):
            async with connected(proxy) as new:
                await heard(new, 1)
        proxy.mend()
        async with connected(proxy) as new:
            assert await say(new, b"two") == b"two"


async def test_answers_are_delayed_and_lost_when_the_connection_is_reset_before() -> None:
    async with network() as proxy, connected(proxy) as connection:
        await say(connection, b"one")
        proxy.delay_answers(0.3)
        clock = asyncio.get_running_loop().time
        began = clock()
        assert await say(connection, b"two") == b"two"
        assert clock() - began >= 0.3

        connection[1].write(b"three")
        assert await is_silent(connection)
        proxy.reset()

        with pytest.raises(ConnectionResetError):
            await heard(connection, 1)


async def test_the_answer_to_one_request_is_lost_and_with_it_all_later_ones_until_the_connection_is_reset() -> None:
    async with network() as proxy, connected(proxy) as connection, connected(proxy) as other:
        proxy.lose_answers_to(b"commit")
        assert await say(connection, b"begin") == b"begin"

        connection[1].write(b"commit")
        assert await is_silent(connection)
        proxy.lose_nothing()
        connection[1].write(b"more")

        assert await is_silent(connection)
        assert await say(other, b"commit") == b"commit"
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            await heard(connection, 1)


async def test_a_target_that_does_not_listen_is_seen_as_a_break() -> None:
    with Proxy(1) as proxy, pytest.raises(BROKEN):
        async with connected(proxy) as connection:
            await heard(connection, 1)

"""A pooler in transaction mode, as far as a listener notices: between statements it passes nothing on.

pgbouncer gives a client a server's connection for a transaction, and throws away what that says at other times
("got packet 'A' from server when not linked"). Here each client keeps a connection of its own, which is the kindest
that a pooler can be: the client hears its own notifications, with the answer to its statement.
"""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

HOST = "127.0.0.1"
_LENGTH = struct.Struct("!i")
_ENCRYPT = struct.pack("!ii", 8, 80877103)
"""A client's first words when it would like to encrypt (PostgreSQL's documentation, 55.7: SSLRequest)."""


@asynccontextmanager
async def pooler(server_port: int) -> AsyncIterator[int]:
    """The port of a pooler before the server; it does not encrypt."""
    links: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        links.add(task)
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            far_reader, far_writer = await asyncio.open_connection(HOST, server_port)
            try:
                await _link(reader, writer, far_reader, far_writer)
            finally:
                far_writer.transport.abort()
                writer.transport.abort()

    server = await asyncio.start_server(accept, HOST, 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in links:
            task.cancel()
        await asyncio.gather(*links)


async def _link(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    far_reader: asyncio.StreamReader,
    far_writer: asyncio.StreamWriter,
) -> None:
    """One client; it returns when a side ends."""
    idle = asyncio.Event()

    async def ask() -> None:
        head = await reader.readexactly(len(_ENCRYPT))
        if head == _ENCRYPT:
            writer.write(b"N")
        else:
            far_writer.write(head)
        while piece := await reader.read(65_536):
            idle.clear()
            far_writer.write(piece)

    async def answer() -> None:
        while True:
            head = await far_reader.readexactly(5)
            body = await far_reader.readexactly(_LENGTH.unpack(head[1:])[0] - 4)
            if head[:1] == b"A" and idle.is_set():
                continue
            if head[:1] == b"Z":
                idle.set()
            writer.write(head + body)

    tasks = {asyncio.create_task(ask()), asyncio.create_task(answer())}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

"""A server of several processes on a database of its own, and connections to each of them by its number."""

import json
import os
import signal
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from tests.chaos import wire
from tests.databases import new_database
from tests.server import Server

SECONDS = 60.0
Connection = tuple[StreamReader, StreamWriter]


@contextmanager
def crew(folder: Path, workers: int, *command: str, **settings: Any) -> Iterator[Server]:
    """A server of so many processes on PostgreSQL; not measured where it has a ``command`` of its own."""
    settings = {"agent": "tests.chaos.agents:scripted", "database_connections": 3, "log_format": "json", **settings}
    with new_database("postgresql", folder) as database:
        server = Server(folder, workers=workers, database=database, **settings)
        if command:
            server.command = command
        with server:
            yield server


def told(server: Server, event: str, **fields: Any) -> list[dict[str, Any]]:
    """The lines of its log with this event and these fields."""
    lines = [line for line in server.log.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
    entries = [json.loads(line) for line in lines]
    return [each for each in entries if each["event"] == event and fields.items() <= each.items()]


async def complete(server: Server) -> dict[int, int]:
    """The process id of each worker by its number, once all serve."""

    async def serving() -> bool:
        return bool(told(server, "serving"))

    await wire.until(serving, SECONDS)
    return {entry["worker"]: entry["pid"] for entry in told(server, "worker_ready")}


async def ask(connection: Connection, method: str, target: str, body: Any = None) -> wire.Answer:
    """One request on a connection that stays open."""
    reader, writer = connection
    writer.write(wire.request_bytes(method, target, body))
    return await wire.read_answer(reader)


@asynccontextmanager
async def connections(server: Server, *workers: int) -> AsyncIterator[list[Connection]]:
    """A connection to each of these workers, in this order."""
    async with AsyncExitStack() as stack:
        found: dict[int, Connection] = {}
        while not found.keys() >= set(workers):
            connection = await stack.enter_async_context(wire.connected(server.port))
            found[(await ask(connection, "GET", "/readyz")).json["worker"]] = connection
        yield [found[number] for number in workers]


async def subscribed(connection: Connection, target: str) -> wire.Stream:
    """The stream at ``target``, opened on a connection that stays open."""
    reader, writer = connection
    writer.write(wire.request_bytes("GET", target))
    status, headers = await wire.read_head(reader)
    assert status == 200
    return wire.Stream(reader, headers)


async def sample(connection: Connection, name: str) -> float:
    """The value of ``context_server_<name>`` on the page that this connection's worker shows; 0 if it is not there."""
    lines = (await ask(connection, "GET", "/metrics")).body.decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"context_server_{name} "))


def alive(pid: int) -> bool:
    """Whether a process runs: a zombie does not."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return False


def values_of(pid: int) -> Path:
    """The directory that holds a worker's metrics."""
    maps = Path(f"/proc/{pid}/maps").read_text(encoding="ascii").splitlines()
    return Path(next(line.split()[-1] for line in maps if line.endswith(".db"))).parent


def kill(pid: int) -> None:
    """SIGKILL."""
    os.kill(pid, signal.SIGKILL)


async def gone(*pids: int, seconds: float = SECONDS) -> None:
    """Returns once none of the processes runs.

    Raises:
        TimeoutError: one still does.
    """

    async def none() -> bool:
        return not any(map(alive, pids))

    await wire.until(none, seconds)


async def taken_again(server: Server, worker: int, lives: int, seconds: float = SECONDS) -> int:
    """The process id of a worker's ``lives``-th holder, once it serves.

    Raises:
        TimeoutError: there is none.
    """

    async def serves() -> bool:
        return len(told(server, "worker_ready", worker=worker)) >= lives

    await wire.until(serves, seconds)
    return int(told(server, "worker_ready", worker=worker)[lives - 1]["pid"])

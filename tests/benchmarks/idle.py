"""Idle streams: what an open stream that gets nothing but its heartbeat costs in memory, processor and descriptors.

    python -m tests.benchmarks.idle --streams 2000 --seconds 30

Every stream has a context of its own. The baseline is taken with all contexts in the database, after some were read at
once (which opens the server's database connections) and one stream was opened and closed. The processor is watched for
two whole heartbeats, unless ``--seconds`` says otherwise.
"""

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any

import uvloop

from tests.benchmarks import report
from tests.benchmarks.load import Connection, SignalStream
from tests.benchmarks.server import HOST, Server, allow_descriptors, running

OPENING_AT_ONCE = 50
SETTLE_SECONDS = 60
CLOSE_SECONDS = 30
HEADER = (
    "streams", "KiB per stream", "resident before", "resident with", "opened in", "idle CPU", "heartbeats received",
    "descriptors before → with → after", "back to baseline in",
)  # fmt: skip


def _ignore(signal: dict[str, Any]) -> None:
    """Idle clients have nothing to do with a signal; the stream counts it."""


async def _settled_bytes(server: Server) -> int:
    """Resident memory once it has moved by less than 64 KiB over two seconds."""
    deadline = time.monotonic() + SETTLE_SECONDS
    last = server.resident_bytes()
    while time.monotonic() < deadline:
        await asyncio.sleep(2)
        now = server.resident_bytes()
        if abs(now - last) < 65_536:
            return now
        last = now
    return last


async def _contexts(server: Server, count: int) -> list[str]:
    connection = await Connection.open(HOST, server.port)
    try:
        return [(await connection.request("POST", "/contexts", {}, 201))["id"] for _ in range(count)]
    finally:
        connection.close()


async def _read_at_once(server: Server, contexts: list[str]) -> None:
    """Have the server open every database connection that it keeps; opened later they would look like a leak."""

    async def one(context_id: str) -> None:
        connection = await Connection.open(HOST, server.port)
        await connection.request("GET", f"/contexts/{context_id}")
        connection.close()

    await asyncio.gather(*(one(context_id) for context_id in contexts))


async def _open(server: Server, contexts: list[str]) -> list[SignalStream]:
    limit = asyncio.Semaphore(OPENING_AT_ONCE)

    async def one(context_id: str) -> SignalStream:
        async with limit:
            return await SignalStream.open(HOST, server.port, f"/contexts/{context_id}/stream", _ignore)

    return list(await asyncio.gather(*(one(context_id) for context_id in contexts)))


async def _back_to(server: Server, descriptors: int) -> float | None:
    """Seconds until the server had no more than ``descriptors`` open, None when it never did."""
    began = time.monotonic()
    while time.monotonic() - began < CLOSE_SECONDS:
        if server.descriptors() <= descriptors:
            return time.monotonic() - began
        await asyncio.sleep(0.02)
    return None


async def _measure(server: Server, count: int, seconds: float) -> list[object]:
    contexts = await _contexts(server, count)
    await _read_at_once(server, contexts[:OPENING_AT_ONCE])
    for stream in await _open(server, contexts[:OPENING_AT_ONCE]):
        stream.close()
    before = await _settled_bytes(server)
    descriptors_before = server.descriptors()

    began = time.monotonic()
    streams = await _open(server, contexts)
    opened_seconds = time.monotonic() - began
    loaded = await _settled_bytes(server)
    descriptors_with = server.descriptors()

    signals, cpu, began = sum(stream.signals for stream in streams), server.cpu_seconds(), time.monotonic()
    await asyncio.sleep(seconds)
    share = (server.cpu_seconds() - cpu) / (time.monotonic() - began)
    heartbeats = sum(stream.signals for stream in streams) - signals

    for stream in streams:
        stream.close()
    back = await _back_to(server, descriptors_before)
    return [
        f"{count:,}",
        f"{(loaded - before) / count / 1024:.1f}",
        f"{before / 2**20:.1f} MiB",
        f"{loaded / 2**20:.1f} MiB",
        f"{opened_seconds:.1f} s",
        f"{share:.1%}",
        f"{heartbeats:,}",
        f"{descriptors_before} → {descriptors_with} → {server.descriptors()}",
        "never" if back is None else f"{back:.1f} s",
    ]


def main() -> None:
    """Open the streams against a fresh server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=30, help="how long to watch the idle processor")
    options = parser.parse_args()
    allow_descriptors(2 * options.streams + 200)
    with report.work_directory() as name:
        report.announce(report.command_line("idle"), Path(name))
        with running(Path(name)) as server:
            row = uvloop.run(_measure(server, options.streams, options.seconds))
    print(report.table(HEADER, [row]))


if __name__ == "__main__":
    main()

"""SIGTERM: replies finish or are interrupted, every stream is told, and nobody who does not read holds anything up."""

import asyncio
import hashlib
import os
import resource
import signal
import socket
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.blackbox.calls import SCRIPTED, release, script
from tests.chaos import wire
from tests.chaos.agents import script_of
from tests.server import Server

STREAMS = 200
EXIT_SECONDS = 15.0
LONG = "words=300000 seed=1"
"""A reply of some megabytes: more than the kernel and the server keep for a peer that does not read."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path, agent="tests.chaos.agents:scripted", max_active_runs=1, shutdown_grace_seconds=1) as running:
        yield running


@pytest.fixture
def descriptors() -> Iterator[None]:
    """Room for the connections of a test that opens many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def terminate(server: Server) -> "asyncio.Future[int]":
    """Sends SIGTERM; the exit code, once the process has ended."""
    os.kill(server.pid, signal.SIGTERM)
    return asyncio.ensure_future(asyncio.to_thread(server.wait))


async def is_draining(server: Server) -> bool:
    return (await wire.call(server.port, "GET", "/readyz")).status == 503


def row_of(server: Server, receipt: dict[str, Any]) -> tuple[Any, ...]:
    """``(status, digest, error, text)`` of a reply in the file of a server that has ended."""
    connection = sqlite3.connect(server.database)
    try:
        reply = (receipt["reply_message_id"],)
        row = connection.execute("SELECT status, digest, error FROM messages WHERE id = ?", reply).fetchone()
        chunks = connection.execute("SELECT text FROM chunks WHERE message_id = ? ORDER BY sequence", reply).fetchall()
        return (*row, "".join(text for (text,) in chunks))
    finally:
        connection.close()


def is_held(server: Server, peer: socket.socket) -> bool:
    """Whether the server's end of a connection still has a descriptor: one that was closed has no inode."""
    ends = [f":{server.port:04X}", f":{peer.getsockname()[1]:04X}"]
    for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines():
        fields = line.split()
        if [fields[1][-5:], fields[2][-5:]] == ends:
            return fields[9] != "0"
    return False


def no_error_line(server: Server) -> bool:
    log = server.log.read_text().lower()
    return not any(word in log for word in ("error", "critical", "traceback", "exception"))


@pytest.mark.scenario("operations", "Termination lets replies finish")
async def test_a_running_reply_finishes_and_nothing_new_begins(tmp_path: Path) -> None:
    with Server(tmp_path, agent=SCRIPTED, shutdown_grace_seconds=60) as server:
        context_id, other = await wire.new_context(server.port), await wire.new_context(server.port)
        prompt = script(["text", "begun "], ["wait", "gate"], ["text", "and finished"])
        receipt = await wire.post(server.port, context_id, prompt)
        await wire.follow(server.port, receipt, until=1)
        ended = terminate(server)
        await wire.until(lambda: is_draining(server))

        posted = await wire.call(server.port, "POST", f"/contexts/{other}/messages", wire.message("words=1"))
        streamed = await wire.call(server.port, "GET", f"/contexts/{other}/stream")
        release(server, "gate")

        for answer in (posted, streamed):
            assert (answer.status, answer.json["code"]) == (503, "shutting-down")
            assert answer.headers["retry-after"]
        assert await ended == 0
        text = "begun and finished"
        assert row_of(server, receipt) == ("completed", hashlib.sha256(text.encode()).hexdigest(), None, text)
        assert no_error_line(server)


@pytest.mark.scenario("operations", "Termination interrupts the rest")
async def test_what_outlasts_the_grace_period_is_interrupted_and_kept(server: Server) -> None:
    context_id, other = await wire.new_context(server.port), await wire.new_context(server.port)
    receipt = await wire.post(server.port, context_id, "words=20 seed=2 hold")
    queued = await wire.post(server.port, other, "words=2 seed=3")
    seen = await wire.follow(server.port, receipt, until=1)
    before = asyncio.get_running_loop().time()

    assert await terminate(server) == 0

    assert asyncio.get_running_loop().time() - before >= 1
    status, digest, error, text = row_of(server, receipt)
    assert status == "failed"
    assert '"interrupted"' in error
    assert text.startswith(seen["content"])
    assert digest == hashlib.sha256(text.encode()).hexdigest()
    assert no_error_line(server)
    server.start()
    assert (await wire.follow(server.port, queued))["content"] == "3.0 3.1 "


@asynccontextmanager
async def stalled(server: Server, context_id: str, message_id: str) -> AsyncIterator[socket.socket]:
    """A connection that asks for a long reply and reads nothing, with as much under way as the kernels keep."""
    with socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.connect((wire.HOST, server.port))
        peer.sendall(wire.request_bytes("GET", f"/contexts/{context_id}/messages/{message_id}/events"))
        peer.setblocking(False)
        loop = asyncio.get_running_loop()
        assert (await loop.sock_recv(peer, 12)).startswith(b"HTTP/1.1 200")
        yield peer


async def metric(server: Server, name: str) -> float:
    text = (await wire.call(server.port, "GET", "/metrics")).body.decode()
    return next(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"{name} "))


@pytest.mark.scenario("operations", "Farewell on every stream")
@pytest.mark.usefixtures("descriptors")
async def test_every_stream_that_reads_gets_a_farewell(server: Server) -> None:
    context_id = await wire.new_context(server.port)
    receipt = await wire.post(server.port, context_id, LONG)
    await wire.reached(server.port, context_id, "idle")
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(stalled(server, context_id, receipt["reply_message_id"]))
        live = [
            await stack.enter_async_context(wire.stream(server.port, f"/contexts/{context_id}/stream"))
            for _ in range(STREAMS - 1)
        ]
        assert await metric(server, "context_server_open_streams") == STREAMS
        before = asyncio.get_running_loop().time()
        ended = terminate(server)
        async with asyncio.timeout(EXIT_SECONDS):
            farewells = [[event async for event in stream][-1] for stream in live]
            assert await ended == 0

    assert asyncio.get_running_loop().time() - before < EXIT_SECONDS
    assert {event.type for event in farewells} == {"goodbye"}
    assert all(event.retry == event.data["retry_ms"] for event in farewells)
    assert len({event.retry for event in farewells}) > STREAMS / 2
    assert no_error_line(server)


@pytest.mark.scenario("signals", "Slow reader")
async def test_a_reader_that_stalls_holds_nobody_up_and_is_let_go(tmp_path: Path) -> None:
    with Server(tmp_path, agent="tests.chaos.agents:scripted", send_timeout_seconds=1) as server:
        context_id = await wire.new_context(server.port)
        receipt = await wire.post(server.port, context_id, LONG)
        await wire.reached(server.port, context_id, "idle")
        async with stalled(server, context_id, receipt["reply_message_id"]) as peer:
            assert is_held(server, peer)
            assert await metric(server, "context_server_open_streams") == 1
            prompt = "words=100 rate=200 seed=5"
            reply = await wire.follow(server.port, await wire.post(server.port, context_id, prompt))

            async def let_go() -> bool:
                streams = await metric(server, "context_server_open_streams")
                return streams == 0 and not is_held(server, peer)

            await wire.until(let_go, 30)
        assert reply["content"] == "".join(script_of(prompt))
        assert no_error_line(server)

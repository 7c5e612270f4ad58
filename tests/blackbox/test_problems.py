"""Every documented code, caused once: status, code and further keys are those of the documentation."""

import asyncio
import json
import re
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import launch, wire
from tests.server import Server

PROTOCOL = Path(__file__).resolve().parents[2] / "docs" / "protocol.md"
ROW = re.compile(r"^\| (\d{3}) \| `([a-z-]+)` \|[^|]*\|([^|]*)\|$", re.MULTILINE)
ELSEWHERE = {
    "approval-decided",
    "arguments-not-editable",
    "database-busy",
    "database-unreachable",
    "files-unavailable",
    "outcome-unknown",
    "range-not-satisfiable",
    "shutting-down",
    "storage-broken",
    "storage-full",
}
"""Caused in ``tests/chaos/test_storage.py``, ``test_database_away.py``, ``test_shutdown.py``, ``test_approvals.py`` and
``test_files.py``."""
MAX_BODY_BYTES = 4096
UNKNOWN = "00000000-0000-7000-8000-000000000000"
HEADER_SECONDS = 1.0
LET_GO_SECONDS = 60.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("problems")
    running = Server(
        directory,
        agent="tests.chaos.agents:scripted",
        max_streams=1,
        max_body_bytes=MAX_BODY_BYTES,
        max_waiting_messages=1,
        log_format="json",
    )
    running.command = launch.command("--header-seconds", str(HEADER_SECONDS))
    with running:
        yield running


async def raw(server: Server, request: bytes) -> wire.Answer:
    """What the server answers to bytes that need not be HTTP."""
    async with asyncio.timeout(wire.ANSWER_SECONDS), wire.connected(server.port) as (reader, writer):
        writer.write(request)
        return await wire.read_answer(reader)


async def problems(server: Server) -> AsyncIterator[wire.Answer]:
    """One answer for each code that a client can cause."""
    port = server.port
    context_id = await wire.new_context(port)
    context = f"/contexts/{context_id}"
    receipt = await wire.post(port, context_id, "words=2 hold")
    await wire.follow(port, receipt, until=1)
    key = {"Idempotency-Key": "one-key"}

    yield await wire.call(port, "POST", "/contexts", b"{")
    yield await raw(server, b"NOT HTTP\r\n\r\n")
    yield await wire.call(port, "POST", "/contexts", {}, {"Origin": "http://evil.example"})
    yield await wire.call(port, "GET", "/nowhere")
    yield await wire.call(port, "GET", f"/contexts/{UNKNOWN}")
    yield await wire.call(port, "GET", f"{context}/messages/{UNKNOWN}/content")
    yield await wire.call(port, "PUT", context)
    yield await raw(server, b"GET / HTTP/1.1\r\nHost: local")
    yield await wire.call(port, "POST", f"{context}/messages", wire.message("again"))
    yield await wire.call(port, "GET", f"{context}/messages/{receipt['reply_message_id']}/content?from_sequence=999")
    yield await wire.call(port, "PATCH", context, {"title": "new"}, {"If-Match": '"1"'})
    yield await wire.call(port, "POST", "/contexts", {"title": "x" * MAX_BODY_BYTES})
    yield await wire.call(port, "POST", "/contexts", {}, {"Content-Type": "text/plain"})
    yield await wire.call(port, "GET", "/contexts", None, {"Host": "evil.example"})
    yield await wire.call(port, "GET", "/contexts?limit=0")
    await wire.call(port, "POST", "/contexts", {}, key)
    yield await wire.call(port, "POST", "/contexts", {"title": "other"}, key)
    yield await raw(server, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 40_000 + b"\r\n\r\n")
    async with wire.stream(port, f"{context}/stream"):
        yield await wire.call(port, "GET", f"{context}/stream")
    yield await wire.call(port, "POST", f"{context}/approvals/{UNKNOWN}", {"decision": "approve"})
    yield await wire.call(port, "DELETE", f"{context}/queue/{UNKNOWN}")
    yield await wire.call(port, "GET", f"/files/{UNKNOWN}")
    reply_id = receipt["reply_message_id"]
    yield await wire.call(port, "GET", f"{context}/messages/{reply_id}/chunks/first")
    yield await wire.call(port, "POST", f"{context}/fork", {"message_id": reply_id})
    waiting = {"payload": {"type": "text", "content": "words=1"}, "if_busy": "queue"}
    await wire.call(port, "POST", f"{context}/messages", waiting)
    yield await wire.call(port, "POST", f"{context}/messages", waiting)
    with broken(server):
        yield await wire.call(port, "GET", f"{context}/messages")
    await wire.call(port, "POST", f"{context}/cancel")


class broken:  # noqa: N801  # It reads as what it does.
    """A defect: a table that the server counts on has another name."""

    def __init__(self, server: Server) -> None:
        self._database = server.database

    def _rename(self, old: str, new: str) -> None:
        connection = sqlite3.connect(self._database)
        connection.execute(f"ALTER TABLE {old} RENAME TO {new}")
        connection.close()

    def __enter__(self) -> None:
        self._rename("messages", "gone")

    def __exit__(self, *_: object) -> None:
        self._rename("gone", "messages")


@pytest.mark.scenario("operations", "Problem documents")
async def test_each_code_is_as_documented(server: Server) -> None:
    documented = {
        code: (int(status), set(re.findall(r"`([a-z_]+)", keys)))
        for status, code, keys in ROW.findall(PROTOCOL.read_text(encoding="utf-8"))
    }
    seen: dict[str, wire.Answer] = {}
    async for answer in problems(server):
        seen[answer.json["code"]] = answer

    assert set(seen) == set(documented) - ELSEWHERE - {"not-ready"}
    for code, answer in seen.items():
        status, keys = documented[code]
        document = answer.json
        assert (answer.status, document["status"]) == (status, status), code
        assert answer.headers["content-type"] == "application/problem+json"
        assert set(document) == {"type", "title", "status", "detail", "code"} | keys
        assert ("retry-after" in answer.headers) == (status in (503, 507))
        assert document["title"]
        assert document["detail"]
    assert "GET" in seen["method-not-allowed"].headers["allow"]
    assert seen["command-not-allowed"].json["allowed_commands"] == ["cancel"]
    assert seen["invalid-request"].json["errors"][0]["where"] == "query.limit"


@pytest.mark.scenario("operations", "Problem documents")
async def test_a_defect_says_nothing_about_itself_or_the_request(server: Server) -> None:
    context_id = await wire.new_context(server.port)
    with broken(server):
        answer = await wire.call(server.port, "POST", f"/contexts/{context_id}/messages", wire.message("canary"))
        alive = await wire.call(server.port, "GET", "/healthz")

    assert (answer.status, answer.json["code"]) == (500, "internal-error")
    assert not re.search(rb"canary|messages|Traceback|sqlite|no such", answer.body, re.IGNORECASE)
    assert alive.status == 200
    entries = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert any(entry["event"] == "request_failed" for entry in entries)
    assert "canary" not in server.log.read_text()
    assert (
        await wire.call(server.port, "POST", f"/contexts/{context_id}/messages", wire.message("words=1"))
    ).status == 202


def resident_bytes(server: Server) -> int:
    """Memory that the server holds."""
    pages = int(Path(f"/proc/{server.pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


@asynccontextmanager
async def sending(server: Server, piece: bytes, count: int) -> AsyncIterator[asyncio.StreamReader]:
    """A request that goes on and on, as far as the server takes it."""
    async with wire.connected(server.port) as (reader, writer):
        with suppress(ConnectionError):
            for _ in range(count):
                writer.write(piece)
                await writer.drain()
        yield reader


@pytest.mark.parametrize("head", [b"GET / HTTP/1.1\r\nX: ", b"GET /"])
async def test_endless_headers_are_cut_and_not_kept(server: Server, head: bytes) -> None:
    before = resident_bytes(server)

    async with sending(server, head + b"x" * 65_536, 480) as reader:
        try:
            answered = await reader.read(12)
        except ConnectionError:
            answered = b""

    assert answered in (b"HTTP/1.1 431", b"")
    assert resident_bytes(server) - before < 16 * 2**20
    assert (await wire.call(server.port, "GET", "/healthz")).status == 200


async def test_an_endless_body_is_cut_and_not_kept(server: Server) -> None:
    before = resident_bytes(server)
    head = wire.request_bytes(
        "POST", "/contexts", headers={"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
    )
    async with wire.connected(server.port) as (reader, writer):
        writer.write(head)
        with suppress(ConnectionError):
            for _ in range(480):
                writer.write(b"10000\r\n" + b" " * 65_536 + b"\r\n")
                await writer.drain()
        answer: Any = None
        with suppress(*wire.BROKEN):
            answer = await wire.read_answer(reader)

    assert answer is None or answer.status == 413
    assert resident_bytes(server) - before < 16 * 2**20


async def test_a_connection_that_asks_for_nothing_is_let_go(server: Server) -> None:
    async def answered(sent: bytes) -> bytes:
        async with wire.connected(server.port) as (reader, writer):
            writer.write(sent)
            async with asyncio.timeout(LET_GO_SECONDS):
                return await reader.read()

    half = [b"G", b"GET / HTTP/1.1\r\nHost: localhost\r\nX"]
    silent, *halves = await asyncio.gather(*map(answered, [b"", *half]))
    assert silent == b""
    assert [answer[:12] for answer in halves] == [b"HTTP/1.1 408"] * len(half)


async def test_dripped_headers_do_not_win_time(server: Server) -> None:
    async with wire.connected(server.port) as (reader, writer):
        closed = asyncio.ensure_future(reader.read())
        begun = asyncio.get_running_loop().time()
        while not closed.done():
            assert asyncio.get_running_loop().time() - begun < LET_GO_SECONDS
            writer.write(b"G")
            await asyncio.wait({closed}, timeout=HEADER_SECONDS / 5)
        assert (await closed).startswith(b"HTTP/1.1 4")


async def test_requests_in_a_row_are_answered_in_order(server: Server) -> None:
    request = wire.request_bytes("GET", "/healthz") + wire.request_bytes("GET", "/nowhere")
    async with wire.connected(server.port) as (reader, writer):
        writer.write(request + wire.request_bytes("GET", "/healthz"))
        answers = [await wire.read_answer(reader) for _ in range(3)]

    assert [answer.status for answer in answers] == [200, 404, 200]

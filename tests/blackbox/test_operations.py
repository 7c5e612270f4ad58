"""What the person who runs the server sees of it, and how it lives below a path or inside another application."""

import asyncio
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from context_server.app import create_app
from context_server.settings import Settings
from tests.chaos import wire
from tests.chaos.agents import script_of
from tests.ports import free_port
from tests.server import Server

AGENT = "tests.chaos.agents:scripted"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Signals are so far apart that some are merged."""
    with Server(tmp_path, agent=AGENT, signal_interval_ms=200) as running:
        yield running


@pytest.mark.scenario("operations", "Health and readiness")
async def test_health_and_readiness(server: Server) -> None:
    health = await wire.call(server.port, "GET", "/healthz")
    ready = await wire.call(server.port, "GET", "/readyz")

    assert (health.status, health.json["status"]) == (200, "ok")
    assert ready.status == 200
    assert ready.json["database"] == "sqlite"
    assert ready.json["schema_revision"]
    assert ready.json["sqlite"]["version"] == sqlite3.sqlite_version
    version = sqlite3.sqlite_version_info
    mended = version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)
    assert ready.json["sqlite"]["has_wal_bug"] is not mended


@pytest.mark.scenario("operations", "Health and readiness")
async def test_a_server_that_cannot_use_its_database_is_alive_and_not_ready(tmp_path: Path) -> None:
    app = create_app(Settings(database=str(tmp_path / "file.db"), agent=AGENT))
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost") as http,
    ):
        assert (await http.get("/readyz")).status_code == 200
        app.state.rooms.store.fail("SQLITE_IOERR_FSYNC")

        ready, alive = await http.get("/readyz"), await http.get("/healthz")
        refused = await http.post("/contexts")

    assert (ready.status_code, ready.json()["code"]) == (503, "not-ready")
    assert "SQLITE_IOERR_FSYNC" in ready.json()["detail"]
    assert alive.status_code == 200
    assert (refused.status_code, refused.json()["code"]) == (503, "storage-broken")


async def metrics_of(server: Server) -> dict[str, float]:
    """Every sample: ``name{label="value"}`` → its value."""
    answer = await wire.call(server.port, "GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = (line for line in answer.body.decode().splitlines() if not line.startswith("#"))
    return {name.removeprefix("context_server_"): float(value) for name, _, value in (s.rpartition(" ") for s in lines)}


@pytest.mark.scenario("operations", "Metrics")
async def test_metrics_count_what_happened(server: Server) -> None:
    begun = asyncio.get_running_loop().time()
    context_id = await wire.new_context(server.port)
    old = await wire.post(server.port, context_id, "words=2 seed=1")
    await wire.follow(server.port, old)
    assert server.stop() == 0
    server.start()

    async with wire.stream(server.port, f"/contexts/{context_id}/stream") as signals:
        receipt = await wire.post(server.port, context_id, "words=300 rate=200 seed=2 hold")
        await wire.follow(server.port, receipt, until=1)
        during = await metrics_of(server)
        await wire.until(lambda: holds(server, receipt["reply_message_id"], context_id, "2.299 "))
        await wire.call(server.port, "POST", f"/contexts/{context_id}/cancel")
        while (await signals.until("message_completed")).data["message_id"] != receipt["reply_message_id"]:
            pass
    before = await metrics_of(server)
    for _ in range(3):
        reply = await wire.pull(server.port, context_id, receipt["reply_message_id"])
    for _ in range(2):
        await wire.pull(server.port, context_id, old["reply_message_id"])
    for _ in range(4):
        await wire.call(server.port, "GET", "/contexts/unknown")
    await wire.until(lambda: has(server, "open_streams", 0))
    after = await metrics_of(server)
    seconds = asyncio.get_running_loop().time() - begun

    assert (during["open_streams"], during["active_runs"]) == (1, 1)
    assert (after["open_streams"], after["active_runs"]) == (0, 0)
    assert after["chunks_committed_total"] == reply["final_sequence"] == after["commit_chunks_sum"]
    assert after["bytes_committed_total"] == len(reply["content"].encode())
    assert after["commit_seconds_count"] == after["commit_chunks_count"] >= 2
    assert 0 < after["commit_seconds_sum"] < seconds
    assert after['commit_chunks_bucket{le="+Inf"}'] == after["commit_chunks_count"]
    assert after["recent_bytes"] >= len(reply["content"])
    assert after['pulls_total{source="memory"}'] - before['pulls_total{source="memory"}'] == 3
    assert after['pulls_total{source="database"}'] - before['pulls_total{source="database"}'] == 2
    assert after['signals_sent_total{type="message_completed"}'] >= 1
    assert after['signals_sent_total{type="content_delta"}'] >= 1
    assert after["signals_merged_total"] > 0
    assert after['problems_total{code="context-not-found"}'] == 4
    assert sum(value for name, value in after.items() if name.startswith("runs_ended_total")) == 1


async def holds(server: Server, message_id: str, context_id: str, text: str) -> bool:
    return str((await wire.pull(server.port, context_id, message_id))["content"]).endswith(text)


async def has(server: Server, name: str, value: float) -> bool:
    return (await metrics_of(server))[name] == value


@pytest.mark.scenario("operations", "Path prefix")
async def test_everything_lies_below_the_prefix(tmp_path: Path) -> None:
    with Server(tmp_path, agent=AGENT, path_prefix="/api/v1") as server:
        created = await wire.call(server.port, "POST", "/api/v1/contexts", {})
        location = created.headers["location"]
        description = (await wire.call(server.port, "GET", "/api/v1/openapi.json")).json
        found = await wire.call(server.port, "GET", location)
        page = await wire.call(server.port, "GET", "/api/v1/docs")
        without = [
            await wire.call(server.port, "GET", path)
            for path in ("/contexts", location.removeprefix("/api/v1"), "/openapi.json", "/healthz", "/readyz", "/docs")
        ]
        async with wire.stream(server.port, f"{location}/stream") as signals:
            body = wire.message("words=2 seed=1")
            posted = await wire.call(server.port, "POST", f"{location}/messages", body)
            await signals.until("message_completed")
        target = f"{location}/messages/{posted.json['reply_message_id']}/content"
        reply = await wire.call(server.port, "GET", target)

    assert location.startswith("/api/v1/contexts/")
    assert found.json == created.json
    bases = {server["url"] for server in description.get("servers", [])} or {""}
    assert all((base + path).startswith("/api/v1/") for base in bases for path in description["paths"])
    assert page.status == 200
    assert {(answer.status, answer.json["code"]) for answer in without} == {(404, "not-found")}
    assert reply.json["content"] == "1.0 1.1 "


HOST = """
import contextlib
from {framework} import {application}
from context_server.app import create_app
from context_server.settings import Settings
from tests.chaos.agents import scripted

chat = create_app(Settings(database="chat.db", shutdown_grace_seconds=2), agent=scripted)

@contextlib.asynccontextmanager
async def lifespan(app):
    async with chat.router.lifespan_context(chat):
        yield
        await chat.state.drain()

app = {application}(lifespan=lifespan)
app.mount("/chat", chat)
"""


@contextmanager
def hosted(directory: Path, port: int, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """The other application, under uvicorn as it comes."""
    command = [sys.executable, "-m", "uvicorn", "host:app", "--port", str(port), "--timeout-graceful-shutdown", "10"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with log.open("wb") as file, subprocess.Popen(
        command, cwd=directory, env=environment, stdout=file, stderr=file
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.scenario("operations", "Mounted application")
@pytest.mark.parametrize(
    ("framework", "application"), [("starlette.applications", "Starlette"), ("fastapi", "FastAPI")]
)
async def test_a_mounted_server_starts_and_stops_with_its_host(
    tmp_path: Path, framework: str, application: str
) -> None:
    (tmp_path / "host.py").write_text(HOST.format(framework=framework, application=application))
    port, log = free_port(), tmp_path / "log"
    with hosted(tmp_path, port, log) as process:
        await wire.until(lambda: answers(port), 90)
        location = (await wire.call(port, "POST", "/chat/contexts", {})).headers["location"]
        async with wire.stream(port, f"{location}/stream") as signals:
            body = wire.message("words=20 rate=200 seed=3")
            receipt = (await wire.call(port, "POST", f"{location}/messages", body)).json
            await signals.until("message_completed")
            target = f"{location}/messages/{receipt['reply_message_id']}/content"
            reply = (await wire.call(port, "GET", target)).json
            elsewhere = await wire.call(port, "GET", "/contexts")

            process.send_signal(signal.SIGTERM)
            farewell = await signals.until("goodbye")
            assert [event async for event in signals] == []
        code = await asyncio.to_thread(process.wait, 60)

    assert location.startswith("/chat/contexts/")
    assert reply["content"] == "".join(script_of("words=20 seed=3"))
    assert elsewhere.status == 404
    assert farewell.retry == farewell.data["retry_ms"]
    assert code in (0, -signal.SIGTERM)
    assert not re.search(r"error|traceback", log.read_text(), re.IGNORECASE)


async def answers(port: int) -> bool:
    try:
        return (await wire.call(port, "GET", "/chat/readyz")).status == 200
    except wire.BROKEN:
        return False

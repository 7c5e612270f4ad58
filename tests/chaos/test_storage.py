"""A disk that is full, a database that is locked, and a disk that fails: nothing acknowledged is lost."""

import asyncio
import resource
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import wire
from tests.chaos.agents import script_of
from tests.server import Server

AGENT = "tests.chaos.agents:scripted"
EXIT_STORAGE_BROKEN = 70
BUSY_SECONDS = 5.0
"""How long a write waits for the database."""

Fill = Callable[[Server], None]


@contextmanager
def small_disk(directory: Path) -> Iterator[tuple[Path, Fill, Fill]]:
    """A folder on a file system of 8 MiB, and how it is filled to the last byte and emptied again."""
    disk = directory / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    filler = disk / "filler"

    def fill(_server: Server) -> None:
        with filler.open("wb", buffering=0) as file:
            for size in (65536, 4096, 1):
                try:
                    while file.write(b"\0" * size):
                        pass
                except OSError:
                    continue

    try:
        yield disk, fill, lambda _server: filler.unlink()
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@contextmanager
def small_files(directory: Path) -> Iterator[tuple[Path, Fill, Fill]]:
    """A folder, and how a process is kept from making its files any larger, and let go on."""

    def limit(server: Server, size: int) -> None:
        _, hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (size, hard))

    yield directory, lambda server: limit(server, 8192), lambda server: limit(server, resource.RLIM_INFINITY)


async def is_refused(server: Server, context_id: str) -> bool:
    """Whether a post is answered by 507."""
    answer = await wire.call(server.port, "POST", f"/contexts/{context_id}/messages", wire.message("words=1"))
    if answer.status == 507:
        assert answer.json["code"] == "storage-full"
    return answer.status == 507


@pytest.mark.scenario("operations", "Disk full")
@pytest.mark.parametrize("disk", [small_disk, small_files])
async def test_a_full_disk_refuses_new_work_and_loses_nothing(tmp_path: Path, disk: Any) -> None:
    prompt = "words=3000 rate=1000 seed=1"
    with (
        disk(tmp_path) as (directory, fill, empty),
        Server(tmp_path, agent=AGENT, database=directory / "context-server.db") as server,
    ):
        busy, other = await wire.new_context(server.port), await wire.new_context(server.port)
        receipt = await wire.post(server.port, busy, prompt)
        async with wire.stream(server.port, f"/contexts/{busy}/stream") as signals:
            seen = await wire.follow(server.port, receipt, until=5)

            fill(server)

            await wire.until(lambda: is_refused(server, other))
            assert (await wire.call(server.port, "POST", "/contexts", {})).status == 507
            stopped = await wire.pull(server.port, busy, receipt["reply_message_id"])
            assert stopped["status"] == "streaming"
            assert stopped["content"].startswith(seen["content"])
            async with wire.stream(server.port, f"/contexts/{busy}/stream") as late:
                snapshot = [await late.next(), await late.next()]
            assert snapshot[1].data["current_sequence"] == stopped["sequence"]
            assert (await wire.call(server.port, "GET", "/healthz")).status == 200

            empty(server)

            reply = await wire.follow(server.port, receipt)
            assert (await signals.until("message_completed")).data["status"] == "completed"
        assert reply["content"] == "".join(script_of(prompt))
        again = await wire.follow(server.port, await wire.post(server.port, other, "words=2 seed=2"))
        assert again["content"] == "2.0 2.1 "
        assert "Traceback" not in server.log.read_text()


@contextmanager
def locked(database: Path) -> Iterator[Callable[[], None]]:
    """The write lock of the database, held by another process until the function is called."""
    code = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "c.execute('BEGIN EXCLUSIVE'); print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, database], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == "locked\n"
        try:
            yield holder.stdin.close
        finally:
            if not holder.stdin.closed:
                holder.stdin.close()


def post_later(server: Server, context_id: str) -> "asyncio.Task[wire.Answer]":
    """A post that is under way."""
    target = f"/contexts/{context_id}/messages"
    return asyncio.ensure_future(wire.call(server.port, "POST", target, wire.message("words=1")))


@pytest.mark.scenario("operations", "Locked database")
async def test_a_locked_database_is_waited_for_and_then_refused(tmp_path: Path) -> None:
    with Server(tmp_path, agent=AGENT) as server:
        context_id = await wire.new_context(server.port)
        receipt = await wire.post(server.port, context_id, "words=3 seed=3")
        await wire.follow(server.port, receipt)
        before = await wire.pull(server.port, context_id, receipt["reply_message_id"])
        clock = asyncio.get_running_loop().time

        with locked(server.database) as release:
            begun = clock()
            waiting = post_later(server, context_id)
            asyncio.get_running_loop().call_later(1.0, release)
            answer = await waiting
        assert answer.status == 202
        assert clock() - begun >= 0.9
        await wire.reached(server.port, context_id, "idle")

        with locked(server.database):
            waiting = post_later(server, context_id)
            held, slowest = 0, 0.0
            while not waiting.done():
                begun = clock()
                assert await wire.pull(server.port, context_id, receipt["reply_message_id"]) == before
                assert await wire.state_of(server.port, context_id) == "idle"
                held, slowest = held + 1, max(slowest, clock() - begun)
            refused = await waiting
        assert (refused.status, refused.json["code"]) == (503, "database-busy")
        assert refused.headers["retry-after"]
        assert held > 10
        assert slowest < BUSY_SECONDS / 2
        again = await wire.follow(server.port, await wire.post(server.port, context_id, "words=2 seed=4"))
        assert again["content"] == "4.0 4.1 "


@contextmanager
def failing_sync(pid: int, log: Path) -> Iterator[None]:
    """Lets every sync of the process fail from now on."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    inject = "inject=fdatasync,fsync:error=EIO"
    tracer = subprocess.Popen(
        [strace, "-f", "-p", str(pid), "-o", log, "-e", "trace=fdatasync,fsync", "-e", inject],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert tracer.stderr is not None
    try:
        attached = tracer.stderr.readline()
        if "attached" not in attached:
            pytest.skip(f"strace cannot attach: {attached.strip()}")
        drain = threading.Thread(target=tracer.stderr.read)
        drain.start()
        yield
    finally:
        tracer.terminate()
        tracer.wait()
        tracer.stderr.close()


@pytest.mark.scenario("content-log", "Signalled content is committed")
async def test_a_failed_sync_ends_the_server_and_loses_nothing(tmp_path: Path) -> None:
    prompt = "words=3000 rate=200 seed=5"
    with Server(tmp_path, agent=AGENT) as server:
        context_id = await wire.new_context(server.port)
        receipt = await wire.post(server.port, context_id, prompt)
        seen = await wire.follow(server.port, receipt, until=5)
        with failing_sync(server.pid, tmp_path / "strace.log"):
            code = await asyncio.to_thread(server.wait)
        assert code == EXIT_STORAGE_BROKEN
        assert "storage_broken" in server.log.read_text()

        server.start()

        reply = await wire.follow(server.port, receipt)
        assert reply["status"] == "failed"
        assert reply["content"].startswith(seen["content"])
        assert "".join(script_of(prompt)).startswith(reply["content"])
        again = await wire.follow(server.port, await wire.post(server.port, context_id, "words=2 seed=6"))
        assert again["content"] == "6.0 6.1 "
        assert server.stop() == 0
    connection = sqlite3.connect(server.database)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()

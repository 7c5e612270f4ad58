"""Several processes begin and end as one: by SIGTERM, by Ctrl-C, by a supervisor that is killed, or not at all."""

import asyncio
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from context_server.__main__ import main
from context_server.store.maintenance import change_schema
from tests.blackbox.crew import complete, crew, gone, told, values_of
from tests.blackbox.test_command_line import run, the_line
from tests.chaos import wire
from tests.chaos.agents import script_of
from tests.databases import new_database, run_beside
from tests.ports import free_port
from tests.server import Server

EXIT_SECONDS = 25.0
"""What a single process takes at most, and a slow machine."""


def tell(server: Server, number: int) -> None:
    os.kill(server.pid, number)


async def ended(server: Server) -> int:
    async with asyncio.timeout(EXIT_SECONDS):
        return await asyncio.to_thread(server.wait)


def row_of(server: Server, receipt: dict[str, Any]) -> tuple[Any, ...]:
    """``(status, text)`` of a reply."""
    reply = receipt["reply_message_id"]
    ((status,),) = run_beside(server.database_url, f"SELECT status FROM messages WHERE id = '{reply}'")
    chunks = run_beside(server.database_url, f"SELECT text FROM chunks WHERE message_id = '{reply}' ORDER BY sequence")
    return status, "".join(text for (text,) in chunks)


@pytest.mark.scenario("operations", "Workers end together")
async def test_running_replies_finish_and_all_processes_end(tmp_path: Path) -> None:
    with crew(tmp_path, 2) as server:
        pids = await complete(server)
        values = values_of(pids[1])
        prompts = [f"words=100 rate=60 seed={number}" for number in range(6)]
        receipts = [await wire.post(server.port, await wire.new_context(server.port), prompt) for prompt in prompts]
        await asyncio.gather(*(wire.follow(server.port, receipt, until=1) for receipt in receipts))

        tell(server, signal.SIGTERM)

        assert await ended(server) == 0
        await gone(*pids.values())
        assert [row_of(server, receipt) for receipt in receipts] == [
            ("completed", "".join(script_of(prompt))) for prompt in prompts
        ]
        assert not values.exists()
        assert not told(server, "worker_died")
        assert not told(server, "worker_killed")


@pytest.mark.scenario("operations", "Workers end together")
async def test_a_second_ctrl_c_does_not_wait_for_replies(tmp_path: Path) -> None:
    with crew(tmp_path, 2, shutdown_grace_seconds=300) as server:
        pids = await complete(server)
        receipt = await wire.post(server.port, await wire.new_context(server.port), "words=2 seed=1 hold")
        await wire.follow(server.port, receipt, until=1)
        tell(server, signal.SIGINT)

        async def draining() -> bool:
            return len(told(server, "waiting_for_runs")) == 1

        await wire.until(draining, EXIT_SECONDS)
        tell(server, signal.SIGINT)

        assert await ended(server) == 0
        await gone(*pids.values())
        assert row_of(server, receipt) == ("failed", "1.0 1.1 ")


@pytest.mark.scenario("operations", "No orphans")
async def test_workers_end_with_a_supervisor_that_was_killed(tmp_path: Path) -> None:
    with crew(tmp_path, 2) as server:
        pids = await complete(server)
        values = values_of(pids[1])

        server.kill()

        await gone(*pids.values())
        assert not values.exists()
        with socket.create_server((wire.HOST, server.port)):
            pass  # Nobody holds the port any more.


@pytest.mark.scenario("operations", "Workers refused")
def test_more_than_one_worker_on_sqlite_is_refused(tmp_path: Path) -> None:
    line = the_line(run(tmp_path, "serve", "--workers", "2", "--port", "0"))

    assert "PostgreSQL" in line
    assert "2 workers" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.scenario("operations", "Workers refused")
@pytest.mark.parametrize("value", ["0", "many", "257"])
def test_a_wrong_number_of_workers_is_refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], value: str
) -> None:
    for arguments, named in ((["--workers", value], "--workers"), ([], "CONTEXT_SERVER_WORKERS")):
        if not arguments:
            monkeypatch.setenv("CONTEXT_SERVER_WORKERS", value)
        with pytest.raises(SystemExit) as ended:
            main(["serve", *arguments])
        out, line = capfd.readouterr()
        assert (ended.value.code, out, line.count("\n")) == (2, "", 1)
        assert named in line


@pytest.mark.scenario("operations", "Workers refused")
@pytest.mark.parametrize("case", ["no server", "unknown schema"])
def test_workers_that_cannot_begin_are_one_line(tmp_path: Path, case: str) -> None:
    with new_database("postgresql", tmp_path) as url:
        if case == "no server":
            url, named = f"postgresql+asyncpg://postgres@127.0.0.1:{free_port()}/none", "database"
        else:
            asyncio.run(change_schema(url, "head", down=False))
            run_beside(url, "UPDATE alembic_version SET version_num = 'from_the_future'")
            named = "from_the_future"
        finished: subprocess.CompletedProcess[str] = run(
            tmp_path, "serve", "--workers", "2", "--port", "0", "--database", url, log_level="error"
        )  # fmt: skip

    assert named in the_line(finished)

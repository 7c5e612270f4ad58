"""SIGTERM ends the process whatever its agent does: an agent may be interrupted, and then it is not waited for."""

import os
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.blackbox.calls import Calls, marked
from tests.server import Server

EXIT_SECONDS = 30.0
"""Far more than both graces together, and far less than the agents below go on."""

HANGS_IN_A_THREAD = """
    yield "half"
    Path("hangs").write_text("in a thread")
    await asyncio.to_thread(time.sleep, 60)
"""
HEEDS_NO_CANCELLATION = """
    yield "half"
    Path("hangs").write_text("in a task")
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass
"""


@pytest.mark.scenario("operations", "Termination interrupts the rest")
@pytest.mark.parametrize("body", [HANGS_IN_A_THREAD, HEEDS_NO_CANCELLATION], ids=["thread", "task"])
def test_an_agent_that_does_not_stop_does_not_hold_up_the_end(tmp_path: Path, body: str) -> None:
    source = f"import asyncio, time\nfrom pathlib import Path\n\n\nasync def reply(history, run):{body}"
    (tmp_path / "stubborn.py").write_text(source)
    graces = {"shutdown_grace_seconds": 0.2, "cancel_grace_seconds": 0.3}
    with Server(tmp_path, agent="stubborn:reply", **graces) as server:
        calls = Calls(server)
        posted = calls.post(calls.create(), "Hello")
        marked(server, "hangs")
        told = time.monotonic()
        os.kill(server.pid, signal.SIGTERM)
        assert server.wait() == 0
        assert time.monotonic() - told < EXIT_SECONDS

    with closing(sqlite3.connect(server.database)) as database:
        reply = (posted["reply_message_id"],)
        status, error = database.execute("SELECT status, error FROM messages WHERE id = ?", reply).fetchone()
        chunks = database.execute("SELECT text FROM chunks WHERE message_id = ?", reply).fetchall()
    assert (status, chunks) == ("failed", [("half",)])
    assert '"interrupted"' in error

"""Many contexts that wait for people, for a day: nothing of them is held in the server, and each goes on when told."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import text

from tests.blackbox.calls import SCRIPTED, Calls, eventually
from tests.databases import KINDS, beside
from tests.server import Server

DATABASES = KINDS

CONTEXTS = 100
WARM_UP = 60
DAY_MS = 86_400_000
MAX_GROWTH_BYTES = 4_000_000
"""A task and its agent alone cost some 30 KiB: a hundred of them, with their replies in memory, would show."""
TIMES = {
    "contexts": ("created_at", "updated_at"),
    "messages": ("created_at", "completed_at"),
    "runs": ("created_at", "started_at"),
    "approvals": ("created_at", "expires_at"),
}


def resident_bytes(server: Server) -> int:
    pages = int(Path(f"/proc/{server.pid}/statm").read_text().split()[1])
    return pages * 4096


def ask(calls: Calls, _number: int) -> tuple[str, str]:
    context_id = calls.create()
    call = {"id": "call-1", "tool": "send", "arguments": {"to": "ann"}}
    posted = calls.run(context_id, ["text", "Wait."], ["approve", call], ["text", " done"])
    eventually(lambda: calls.approvals(context_id), "a request")
    return context_id, posted["reply_message_id"]


def a_day_goes_by(server: Server) -> None:
    """Moves every time in the database back, as the clock would have moved on."""
    with beside(server.database_url).begin() as connection:
        for table, columns in TIMES.items():
            moved = ", ".join(f"{column} = {column} - {DAY_MS}" for column in columns)
            connection.execute(text(f"UPDATE {table} SET {moved}"))


@pytest.mark.scenario("approvals", "Waiting costs nothing")
def test_a_hundred_contexts_wait_for_a_day_and_go_on(database_kind: str | None, tmp_path: Path) -> None:
    with Server(tmp_path, agent=SCRIPTED, recent_chunk_bytes=0) as server, ThreadPoolExecutor(8) as pool:
        calls = Calls(server)
        for number in range(WARM_UP):  # Whatever is built once is built now.
            ask(calls, number)
        before = resident_bytes(server)
        waiting = list(pool.map(lambda number: ask(calls, number), range(CONTEXTS)))
        growth = resident_bytes(server) - before
        assert calls.metric("context_server_active_runs") == 0
        assert calls.call("GET", "/readyz").json["runs"] == {"queued": 0, "running": 0, "suspended": CONTEXTS + WARM_UP}
        print(f"{growth} bytes for {CONTEXTS} contexts")
        assert growth < MAX_GROWTH_BYTES, growth
        a_day_goes_by(server)
        if database_kind == "sqlite":  # One half after a restart.
            server.stop()
            server.start()

        def approve(context_id: str) -> int:
            (approval,) = calls.approvals(context_id)
            return calls.decide(context_id, approval["id"], "approve").status

        assert list(pool.map(lambda each: approve(each[0]), waiting)) == [200] * CONTEXTS
        for context_id, reply_id in waiting:
            assert calls.ended(context_id, reply_id)["status"] == "completed"
            assert (tmp_path / f"called-{context_id}").read_text().count("\n") == 1

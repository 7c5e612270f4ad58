"""How a run is cancelled, how it fails, and what cannot end it."""

import contextlib
import hashlib
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.blackbox.calls import PATIENCE_MS, SCRIPTED, Calls, eventually, faults, marked, release
from tests.databases import KINDS, run_beside
from tests.server import Server

DATABASES = KINDS

CANCEL_GRACE_SECONDS = 0.3
MAX_REPLY_BYTES = 200_000
MAX_PENDING_BYTES = 32_768


@pytest.fixture(scope="module")
def calls(database_kind: str | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    settings = {
        "cancel_grace_seconds": CANCEL_GRACE_SECONDS,
        "max_reply_bytes": MAX_REPLY_BYTES,
        "max_pending_bytes": MAX_PENDING_BYTES,
        "heartbeat_seconds": 0.1,
        "signal_patience_ms": PATIENCE_MS,
    }
    with Server(tmp_path_factory.mktemp("stopping"), agent=SCRIPTED, log_format="json", **settings) as server:
        yield Calls(server)
        expected = ("agent_failed", "agent_ignores_cancellation")
        assert [line for line in faults(server) if not any(event in line for event in expected)] == []


@pytest.mark.scenario("runs", "Cancel a running reply")
def test_cancel_stops_the_agent_and_keeps_what_it_wrote(calls: Calls) -> None:
    context_id = calls.create()
    posted = calls.run(context_id, ["text", "kept "], ["hold", "never", "cancel-told"], ["text", "not written"])
    with calls.signals(context_id) as stream:
        stream.until("content_delta")
        cancelled = calls.cancel(context_id)
        stream.until("message_completed", status="cancelled")
        stream.until("state_changed", new_state="idle")
    reply = calls.message(context_id, posted["reply_message_id"])
    assert cancelled["state"] == "cancelling"
    assert cancelled["allowed_commands"] == []
    assert marked(calls.server, "cancel-told") == "told to stop"
    assert (reply["status"], reply["content"], reply["error"]) == ("cancelled", "kept ", None)
    assert reply["final_sequence"] == reply["sequence"] == 1
    assert reply["digest"] == hashlib.sha256(b"kept ").hexdigest()
    again = calls.run(context_id, ["text", "next"])
    assert calls.ended(context_id, again["reply_message_id"])["status"] == "completed"


@pytest.mark.scenario("runs", "Cancel a queued run")
def test_a_run_that_waits_is_cancelled_at_once(tmp_path: Path) -> None:
    with Server(tmp_path, agent=SCRIPTED, log_format="json", max_active_runs=1) as server:
        calls = Calls(server)
        busy, waiting, behind = calls.create(), calls.create(), calls.create()
        first = calls.run(busy, ["text", "a"], ["wait", "gate"], ["text", "b"])
        with calls.signals(busy) as stream:
            stream.until("content_delta")
        with calls.signals(waiting) as stream:
            second = calls.run(waiting, ["mark", "begun"], ["text", "never"])
            stream.until("state_changed", new_state="queued")
            third = calls.run(behind, ["text", "c"])
            cancelled = calls.cancel(waiting)
            completed = stream.until("message_completed")
            stream.until("state_changed", new_state="idle")
        assert (cancelled["state"], cancelled["active_run"]) == ("idle", None)
        assert (completed.data["status"], completed.data["final_sequence"]) == ("cancelled", 0)
        reply = calls.message(waiting, second["reply_message_id"])
        assert (reply["status"], reply["content"], reply["final_sequence"]) == ("cancelled", "", 0)
        release(server, "gate")
        assert calls.ended(busy, first["reply_message_id"])["content"] == "ab"
        assert calls.ended(behind, third["reply_message_id"])["content"] == "c"
        assert not (tmp_path / "begun").exists()
        assert faults(server) == []


@pytest.mark.scenario("runs", "Cancel when nothing runs")
def test_cancel_with_nothing_to_cancel_changes_nothing(calls: Calls) -> None:
    idle, failed, cancelling = calls.create(), calls.create(), calls.create()
    calls.ended(failed, calls.run(failed, ["fail", "x"])["reply_message_id"])
    posted = calls.run(cancelling, ["stubborn", "cancel-nothing", "late", "cancel-nothing-refused"])
    with calls.signals(cancelling) as stream:
        stream.until("state_changed", new_state="thinking")
    calls.cancel(cancelling)
    for context_id, state in ((cancelling, "cancelling"), (idle, "idle"), (failed, "failed")):
        before = calls.context(context_id)
        assert before["state"] == state
        assert [calls.cancel(context_id), calls.cancel(context_id)] == [before, before]
    release(calls.server, "cancel-nothing")
    assert calls.ended(cancelling, posted["reply_message_id"])["status"] == "cancelled"
    missing = calls.call("POST", "/contexts/0198c1de-0000-7000-8000-000000000000/cancel")
    assert (missing.status, missing.json["code"]) == (404, "context-not-found")


@pytest.mark.scenario("runs", "Agent slow to stop")
def test_an_agent_that_does_not_stop_is_left_behind(calls: Calls) -> None:
    context_id = calls.create()
    posted = calls.run(context_id, ["text", "before "], ["stubborn", "slow-gate", "too late", "slow-refused"])
    with calls.signals(context_id) as stream:
        stream.until("content_delta")
        asked = time.monotonic()
        calls.cancel(context_id)
        stream.until("state_changed", new_state="cancelling")
        stopped = stream.until("state_changed", new_state="idle")
    assert stopped.at - asked >= CANCEL_GRACE_SECONDS
    before = calls.message(context_id, posted["reply_message_id"])
    assert (before["status"], before["content"]) == ("cancelled", "before ")
    following = calls.run(context_id, ["text", "next"])
    calls.ended(context_id, following["reply_message_id"])
    release(calls.server, "slow-gate")
    assert marked(calls.server, "slow-refused") == "refused"
    assert calls.message(context_id, posted["reply_message_id"]) == before
    assert calls.message(context_id, following["reply_message_id"])["content"] == "next"


@pytest.mark.scenario("runs", "Agent that raises")
@pytest.mark.parametrize(
    "step",
    [["fail", "of the exception"], *(["rubbish", name] for name in ("number", "none", "bytes", "list")), ["exit"]],
)
def test_an_agent_that_fails_leaves_what_it_wrote(calls: Calls, step: list[str]) -> None:
    context_id = calls.create()
    posted = calls.run(context_id, ["text", "before "], step, ["text", "not written"])
    reply = calls.ended(context_id, posted["reply_message_id"])
    context = calls.context(context_id)
    assert (context["state"], context["allowed_commands"], context["active_run"]) == ("failed", ["send"], None)
    assert (reply["status"], reply["error"]["code"]) == ("failed", "agent-error")
    assert "of the exception" not in reply["error"]["detail"]
    assert calls.pull(context_id, reply["id"])["content"] == "before "
    again = calls.run(context_id, ["text", "works"])
    assert calls.ended(context_id, again["reply_message_id"])["content"] == "works"
    assert "of the exception" not in calls.server.log.read_text()


@pytest.mark.scenario("runs", "Oversized reply")
def test_a_reply_has_an_end(calls: Calls) -> None:
    context_id, other = calls.create(), calls.create()
    beside = calls.run(other, ["text", "a"], ["wait", "oversized-gate"], ["text", "b"])
    posted = calls.run(context_id, ["endless", 999, "oversized-closed"])
    reply = calls.ended(context_id, posted["reply_message_id"])
    assert (reply["status"], reply["error"]["code"]) == ("failed", "reply-too-large")
    assert MAX_REPLY_BYTES - 999 < len(reply["content"]) <= MAX_REPLY_BYTES
    assert marked(calls.server, "oversized-closed") == "closed"
    release(calls.server, "oversized-gate")
    assert calls.ended(other, beside["reply_message_id"])["content"] == "ab"
    assert calls.context(context_id)["state"] == "failed"


@pytest.mark.only("sqlite")
@pytest.mark.scenario("runs", "Agent quicker than the disk")
def test_an_agent_waits_for_the_disk(calls: Calls) -> None:
    context_id, lines, size = calls.create(), 190, 1000
    progress = calls.server.directory / "flood-progress"
    with calls.signals(context_id) as stream:
        posted = calls.run(context_id, ["wait", "flood-gate"], ["flood", lines, size, progress.name])
        stream.until("state_changed", new_state="thinking")
        with contextlib.closing(sqlite3.connect(calls.server.database, isolation_level=None)) as disk:
            disk.execute("BEGIN IMMEDIATE")  # Until it ends, no commit of the server does.
            release(calls.server, "flood-gate")
            eventually(lambda: _number(progress) * size >= MAX_PENDING_BYTES - 2 * size, "as much as may wait")
            for _ in range(3):
                stream.until("heartbeat")
            taken = _number(progress)
            disk.execute("ROLLBACK")
        stream.until("message_completed")
    # The delta that fills it up is taken, and its yield does not return.
    assert taken * size < MAX_PENDING_BYTES + size
    reply = calls.message(context_id, posted["reply_message_id"])
    assert reply["status"] == "completed"
    assert reply["content"] == "".join(f"{number:0{size - 1}d}\n" for number in range(lines))


def _number(path: Path) -> int:
    """What the agent wrote there last; 0 before it did, and while it does."""
    return int(path.read_text() or 0) if path.exists() else 0


@pytest.mark.scenario("runs", "Delete in mid-reply")
def test_deleting_a_context_ends_everything_of_it(calls: Calls) -> None:
    context_id = calls.create()
    posted = calls.run(context_id, ["text", "begun "], ["hold", "never", "delete-told"])
    reply = posted["reply_message_id"]
    with (
        calls.signals(context_id) as stream,
        calls.inline(context_id, reply) as inline,
        ThreadPoolExecutor() as threads,
    ):
        stream.until("content_delta")
        inline.until("text_delta")
        path = f"/contexts/{context_id}/messages/{reply}/content?from_sequence=1&wait=30"
        pulls = calls.metric('context_server_pulls_total{source="memory"}')
        waiting = threads.submit(calls.call, "GET", path)
        eventually(lambda: calls.metric('context_server_pulls_total{source="memory"}') > pulls, "the waiting pull")
        version = calls.context(context_id)["version"]
        answer = calls.call("DELETE", f"/contexts/{context_id}")
        rest = stream.rest()
        assert [event for event in inline.rest() if event.type != "heartbeat"] == []
        assert (waiting.result().status, waiting.result().json["code"]) == (404, "context-not-found")
    assert answer.status == 204
    assert [event.type for event in rest if event.type != "heartbeat"] == ["context_deleted"]
    assert rest[-1].data["version"] == version + 1
    assert marked(calls.server, "delete-told") == "told to stop"
    assert calls.call("GET", f"/contexts/{context_id}").status == 404
    for table in ("messages", "chunks", "runs"):
        column = "message_id" if table == "chunks" else "context_id"
        key = reply if table == "chunks" else context_id
        assert run_beside(calls.server.database_url, f"SELECT count(*) FROM {table} WHERE {column} = ?", key) == [(0,)]


@pytest.mark.scenario("runs", "Client disconnects in mid-reply")
def test_no_connection_is_needed(calls: Calls) -> None:
    context_id = calls.create()
    posted = calls.run(context_id, ["text", "a"], ["wait", "cut-gate"], ["words", 50, 0.2])
    reply = posted["reply_message_id"]
    pull = f"/contexts/{context_id}/messages/{reply}/content?from_sequence=1&wait=30"
    with calls.signals(context_id) as stream, calls.inline(context_id, reply) as inline:
        stream.until("content_delta")
        inline.until("text_delta")
        with pytest.raises(TimeoutError):
            calls.call("GET", pull, seconds=0.2)  # Gives up, and closes its connection.
    eventually(lambda: calls.metric("context_server_open_streams") == 0, "no open stream")
    release(calls.server, "cut-gate")
    ended = calls.ended(context_id, reply)
    assert (ended["status"], ended["content"]) == ("completed", "a" + "".join(f"{number} " for number in range(50)))


INSERT_RUN = "INSERT INTO runs (id, context_id, message_id, status, attempt, created_at) VALUES ('new', ?, ?, ?, 1, 0)"
INSERT_CHUNK = "INSERT INTO chunks (message_id, sequence, kind, text) VALUES (?, ?, 'text', 'x')"


@pytest.mark.only("sqlite")
@pytest.mark.scenario("runs", "Second active run")
def test_the_database_itself_refuses_a_second_run(tmp_path: Path) -> None:
    with Server(tmp_path, agent=SCRIPTED, log_format="json", max_active_runs=1) as server:
        calls = Calls(server)
        running, queued = calls.create(), calls.create()
        first = calls.run(running, ["text", "a"], ["wait", "never"])
        with calls.signals(running) as stream:
            stream.until("content_delta")
        second = calls.run(queued, ["text", "b"])
        server.kill()
        with contextlib.closing(sqlite3.connect(server.database, isolation_level=None)) as database:
            database.execute("PRAGMA foreign_keys = ON")
            statuses = database.execute("SELECT status FROM runs ORDER BY id").fetchall()
            assert statuses == [("running",), ("queued",)]
            for status in ("queued", "running", "suspended"):
                database.execute("UPDATE runs SET status = ? WHERE id = ?", (status, first["run_id"]))
                for other in ("queued", "running", "suspended"):
                    _refused(database, INSERT_RUN, running, first["reply_message_id"], other)
                _refused(database, INSERT_RUN, queued, second["reply_message_id"], status)
            database.execute("UPDATE runs SET status = 'running' WHERE id = ?", (first["run_id"],))
            _refused(database, "UPDATE contexts SET state = 'dreaming' WHERE id = ?", running)
            _refused(database, "UPDATE contexts SET state = 'idle' WHERE id = ?", running)
            _refused(database, INSERT_CHUNK, first["reply_message_id"], 1)
            _refused(database, INSERT_CHUNK, "no message", 1)
        server.start()
        assert calls.ended(queued, second["reply_message_id"])["content"] == "b"


def _refused(database: sqlite3.Connection, statement: str, *values: Any) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        database.execute(statement, values)

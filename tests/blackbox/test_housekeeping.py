"""Keeping house seen from outside: a log that is being compacted answers as before, and old contexts end cleanly."""

from contextlib import contextmanager
from pathlib import Path

import pytest

from context_server.store.maintenance import change_schema
from tests.blackbox.calls import Calls, eventually, faults
from tests.databases import KINDS, new_database, run_beside
from tests.old_log import choose_pulls, fill
from tests.server import Server

CHUNKS = 3000


@contextmanager
def serving(folder: Path, database: str, **settings: object):
    with Server(folder, database=database, log_format="json", agent="metronome", **settings) as running:
        yield Calls(running)


def fingerprint(calls: Calls, path: str) -> tuple[str, str, bytes]:
    answer = calls.call("GET", path)
    assert answer.status == 200, answer
    return answer.headers["etag"], answer.headers["cache-control"], answer.body


@pytest.mark.scenario("retention", "Compaction unseen")
@pytest.mark.parametrize("kind", KINDS)
async def test_pulls_answer_the_same_bytes_before_during_and_after(tmp_path, kind):
    with new_database(kind, tmp_path) as database:
        await change_schema(database, "head", down=False)
        replies = fill(database, CHUNKS)
        pulls = choose_pulls(replies, 30, seed=7)
        listed = [f"/contexts/{reply.context_id}/messages?include=content" for reply in replies]
        with serving(tmp_path, database, compact_after_hours=0) as calls:
            expected = {path: fingerprint(calls, path) for path in pulls}
            messages = {path: calls.call("GET", path).body for path in listed}
        with serving(tmp_path, database, compact_after_hours=1, housekeeping_share=0.5) as calls:
            rounds = 0
            while calls.metric("context_server_chunks_compacted_total") < CHUNKS or not rounds:
                assert {path: fingerprint(calls, path) for path in pulls} == expected
                rounds += 1
            assert run_beside(database, "SELECT count(*) FROM chunks") == [(0,)]
            assert run_beside(database, "SELECT count(*) FROM segments") == [(6,)]
            assert {path: fingerprint(calls, path) for path in pulls} == expected
            assert {path: calls.call("GET", path).body for path in listed} == messages
            assert faults(calls.server) == []


@pytest.mark.scenario("retention", "Compaction interrupted")
async def test_a_server_that_is_killed_while_it_compacts_leaves_every_answer_as_it_was(tmp_path):
    database = str(tmp_path / "context-server.db")
    url = f"sqlite:///{database}"
    await change_schema(url, "head", down=False)
    replies = fill(url, 2 * CHUNKS)
    chunks = sum(reply.length for reply in replies)
    pulls = choose_pulls(replies, 20, seed=11)
    with serving(tmp_path, database, compact_after_hours=0) as calls:
        expected = {path: fingerprint(calls, path) for path in pulls}
    server = Server(tmp_path, database=database, log_format="json", compact_after_hours=1, housekeeping_share=0.1)
    with server:
        calls = Calls(server)
        eventually(lambda: calls.metric("context_server_chunks_compacted_total") > 0)
        server.kill()
    with server:
        calls = Calls(server)
        assert {path: fingerprint(calls, path) for path in pulls} == expected
        eventually(lambda: run_beside(url, "SELECT count(*) FROM chunks") == [(0,)])
        compacted = calls.metric("context_server_chunks_compacted_total")
        assert {path: fingerprint(calls, path) for path in pulls} == expected
    assert 0 < compacted < chunks, "it was killed too early or too late to show anything"
    assert run_beside(url, "SELECT sum(last_sequence - first_sequence + 1) FROM segments") == [(chunks,)]


@pytest.mark.scenario("retention", "Expired context")
@pytest.mark.scenario("retention", "Active context")
def test_a_context_without_activity_ends_for_whoever_follows_it(tmp_path):
    with serving(tmp_path, str(tmp_path / "context-server.db"), retain_days=2 / 86_400) as calls:
        idle = calls.create()
        busy = calls.create()
        calls.post(busy, "rate=20 seconds=600")
        with calls.signals(busy) as stream:
            eventually(lambda: calls.call("GET", f"/contexts/{idle}").status == 404)
            assert calls.context(busy)["state"] == "streaming"
            calls.cancel(busy)
            deleted = stream.until("context_deleted")
        assert deleted.data["context_id"] == busy
        for path in ("", "/stream", "/messages"):
            assert calls.call("GET", f"/contexts/{busy}{path}").status == 404
        eventually(lambda: run_beside(calls.server.database_url, "SELECT count(*) FROM contexts") == [(0,)])
        assert calls.metric("context_server_contexts_expired_total") == 2
        assert faults(calls.server) == []


@pytest.mark.scenario("retention", "Expired context on another node")
def test_streams_on_every_node_learn_of_an_expired_context(tmp_path):
    """Whichever node's keeper comes first."""
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    age = {"retain_days": 2 / 86_400}
    with (
        new_database("postgresql", tmp_path) as database,
        serving(folders[0], database, **age) as here,  # It makes the schema.
        serving(folders[1], database, **age) as there,
    ):
        context_id = here.create()
        here.post(context_id, "rate=20 seconds=600")
        with here.signals(context_id) as stream, there.signals(context_id) as other:
            there.cancel(context_id)
            for each in (stream, other):
                assert each.until("context_deleted").data["context_id"] == context_id
        for calls in (here, there):
            assert calls.call("GET", f"/contexts/{context_id}").status == 404
            assert faults(calls.server) == []

"""Heartbeats after a restart: what was queued before it is open, also while nothing has claimed it."""

from pathlib import Path

import pytest

from tests.blackbox.calls import SCRIPTED, Calls, marked, release
from tests.server import Server


@pytest.mark.scenario("signals", "Heartbeat with heads")
def test_what_was_queued_before_a_restart_is_in_the_heads(tmp_path: Path) -> None:
    settings = {"max_active_runs": 1, "heartbeat_seconds": 0.1, "log_format": "json"}
    with Server(tmp_path, agent=SCRIPTED, **settings) as server:
        calls = Calls(server)
        contexts = [calls.create() for _ in range(3)]
        calls.run(contexts[0], ["mark", "running"], ["wait", "never"])
        marked(server, "running")
        queued = [calls.run(contexts[1], ["mark", "claimed"], ["wait", "go"]), calls.run(contexts[2], ["text", "end"])]
        server.kill()
        server.start()

        marked(server, "claimed")  # One of the two runs now, so the other is still queued.
        assert calls.context(contexts[2])["active_run"]["status"] == "queued"
        open_replies = {posted["reply_message_id"] for posted in queued}
        with calls.shared() as stream:
            heads = stream.until("heartbeat").data["heads"]
            assert {head["message_id"] for head in heads} == open_replies
            assert {head["current_sequence"] for head in heads} == {0}
        release(server, "go")
        assert calls.ended(contexts[2], queued[1]["reply_message_id"])["content"] == "end"
        with calls.shared() as stream:
            assert stream.until("heartbeat").data["heads"] == []

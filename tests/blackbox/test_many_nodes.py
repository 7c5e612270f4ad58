"""Two nodes on one database: what is asked of one concerns a reply that the other writes."""

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.blackbox.calls import SCRIPTED, Calls, eventually, release
from tests.databases import new_database
from tests.server import Server

DEAF = (sys.executable, "-m", "tests.chaos.launch", "--defect", "deaf", "--", "serve")


@contextmanager
def nodes(
    directory: Path, command: tuple[str, ...] = Server.command, **settings: Any
) -> Iterator[tuple[Server, Server]]:
    """Two nodes, of which only the first has been started."""
    with ExitStack() as stack:
        url = stack.enter_context(new_database("postgresql", directory))
        made = []
        for name in ("first", "second"):
            (directory / name).mkdir()
            server = Server(directory / name, agent=SCRIPTED, log_format="json", database=url, **settings)
            server.command = command
            made.append(server)
        stack.callback(lambda: [server.kill() for server in made if server.is_running])
        made[0].start()
        yield made[0], made[1]


@pytest.mark.scenario("many-nodes", "Cancel on another node")
@pytest.mark.parametrize("command", [Server.command, DEAF], ids=["told", "deaf"])
def test_a_reply_is_cancelled_at_another_node(tmp_path: Path, command: tuple[str, ...]) -> None:
    with nodes(tmp_path, command) as (writer, other):
        here, there = Calls(writer), Calls(other)
        contexts = [here.create() for _ in range(5)]
        for context_id in contexts:
            posted = here.run(context_id, ["text", "kept"], ["hold", "never", f"told-{context_id}"])
            with here.signals(context_id) as stream:
                stream.until("content_delta")
        other.start()
        took = []
        for context_id in contexts:
            began = time.monotonic()
            assert there.cancel(context_id)["state"] == "cancelling"
            eventually(lambda key=context_id: there.context(key)["state"] == "idle", "the end")
            took.append(time.monotonic() - began)
        reply = there.message(contexts[-1], posted["reply_message_id"])
        assert (reply["status"], reply["content"]) == ("cancelled", "kept")
        # With wake-ups it is some hundredths; without, half a sweep of two seconds.
        assert statistics.median(took) < (1.0 if command == Server.command else 3.0), took


@pytest.mark.scenario("many-nodes", "Node asked to stop")
def test_a_node_that_stops_leaves_what_is_queued_to_another(tmp_path: Path) -> None:
    with nodes(tmp_path, max_active_runs=1, shutdown_grace_seconds=0.5) as (first, second):
        here, there = Calls(first), Calls(second)
        held, busy, queued = here.create(), here.create(), here.create()
        interrupted = here.run(held, ["text", "kept"], ["hold", "never", "told"])
        with here.signals(held) as stream:
            stream.until("content_delta")
        second.start()
        running = there.run(busy, ["text", "a"], ["wait", "gate"])
        with there.signals(busy) as stream:
            stream.until("content_delta")
        waiting = here.run(queued, ["text", "later"])
        assert there.context(queued)["state"] == "queued"
        assert first.stop() == 0
        reply = there.message(held, interrupted["reply_message_id"])
        assert (reply["status"], reply["error"]["code"], reply["content"]) == ("failed", "interrupted", "kept")
        assert there.context(queued)["state"] == "queued"
        release(second, "gate")
        assert there.ended(busy, running["reply_message_id"])["status"] == "completed"
        assert there.ended(queued, waiting["reply_message_id"])["content"] == "later"

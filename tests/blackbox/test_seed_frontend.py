"""The simple frontend of ``seed_frontend.js`` in a real browser, on a page of another origin than the server's."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.blackbox.browser import PAGE_SECONDS, Page, converse, opened
from tests.blackbox.calls import Calls, eventually
from tests.ports import free_port
from tests.server import Server

# Wide enough for a slow machine. test_pacing.py reckons what the defaults do; chaos/simple_frontend.py tries them.
ROOMY = {
    "signal_settle_ms": 250,
    "signal_interval_ms": 250,
    "completion_delay_ms": 750,
    "signal_patience_ms": 5000,
}
# How long page or server may stand still, which is much shorter than what ROOMY grants, before a trial is void.
VOID_SECONDS = ROOMY["signal_settle_ms"] / 3000
ATTEMPTS = 4


@contextmanager
def pulse(calls: Calls) -> Iterator[list[float]]:
    """Asks the server for its health all the time; how long each answer took, in seconds."""
    taken = [0.0]
    done = threading.Event()

    def ask() -> None:
        while not done.wait(0.02):
            start = time.monotonic()
            assert calls.call("GET", "/healthz").status == 200
            taken.append(time.monotonic() - start)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield taken
    finally:
        done.set()
        thread.join()


def is_exact(server: Server, page: Page, browser: str, directory: Path, texts: list[str]) -> bool:
    """Whether the frontend shows what was written. A trial in which the machine stood still and it did not is void."""
    for _ in range(ATTEMPTS):
        with pulse(Calls(server)) as taken:
            conversation = converse(Calls(server), page, browser, directory, texts)
        print(conversation, max(taken))
        assert all(reply.written for reply in conversation)
        if all(reply.is_exact for reply in conversation):
            assert len(conversation) == len(texts)
            assert conversation[0].parts >= 3  # It was streamed, and not only fetched at the end.
            return True
        if max(taken) < VOID_SECONDS and all(reply.longest_pause_ms < VOID_SECONDS * 1000 for reply in conversation):
            break
    return False


METRONOME = ["rate=50 seconds=2", "rate=500 seconds=1", "rate=0 words=3"]
DEMO = ["Please fail."]


@pytest.mark.scenario("signals", "Paced signals")
@pytest.mark.parametrize(("agent", "texts"), [("metronome", METRONOME), ("demo", DEMO)])
def test_a_simple_frontend_is_exact(tmp_path: Path, page: Page, browser: str, agent: str, texts: list[str]) -> None:
    with Server(tmp_path, agent=agent, log_format="json", cors_origins=page.origin, **ROOMY) as server:
        assert is_exact(server, page, browser, tmp_path, texts)


def test_a_simple_frontend_is_not_exact_without_the_pace(tmp_path: Path, page: Page, browser: str) -> None:
    """The control: what the pace is for."""
    settings = ROOMY | {"signal_patience_ms": 0, "max_commit_interval_ms": 0}
    with Server(tmp_path, agent="metronome", log_format="json", cors_origins=page.origin, **settings) as server:
        conversation = converse(Calls(server), page, browser, tmp_path, ["rate=2000 seconds=1"])
    assert not conversation[0].is_exact
    assert conversation[0].text != conversation[0].written


@pytest.mark.scenario("signals", "Named events")
@pytest.mark.scenario("signals", "Reconnect with Last-Event-ID")
def test_an_event_source_returns_after_a_restart(tmp_path: Path, page: Page, browser: str) -> None:
    port = free_port()
    with Server(tmp_path, port=port, agent="metronome", log_format="json", cors_origins=page.origin) as server:
        calls = Calls(server)
        context_id = calls.create()
        seen = []

        def until(kind: str, **fields: Any) -> dict[str, Any]:
            deadline = time.monotonic() + PAGE_SECONDS
            while time.monotonic() < deadline:
                seen.append(page.next("event"))
                data = seen[-1].get("data", seen[-1])
                if seen[-1]["type"] == kind and all(data.get(name) == value for name, value in fields.items()):
                    return dict(seen[-1])
            raise AssertionError(f"no {kind} with {fields} came")

        with opened(browser, page, tmp_path, calls, part="listen", context=context_id):
            until("state_changed", new_state="idle")
            first = calls.post(context_id, "rate=0 words=3")["reply_message_id"]
            until("message_completed", message_id=first, status="completed")
            second = calls.post(context_id, "rate=100 seconds=30")["reply_message_id"]
            until("content_delta", message_id=second)
            server.kill()
            until("error", readyState=0)  # CONNECTING: it will come back by itself.
            before = len(seen)
            server.start()
            third = calls.post(context_id, "rate=0 words=3")["reply_message_id"]
            eventually(lambda: calls.message(context_id, third)["status"] == "completed", "the end of the third reply")
            until("message_completed", message_id=third)
    endings = [event["data"] for event in seen[before:] if event["type"] == "message_completed"]
    # The second is not the newest reply: that it is told of it is due to the id that the browser sent.
    assert [(event["message_id"], event["status"]) for event in endings] == [(second, "failed"), (third, "completed")]
    assert not [event for event in seen if event["type"] == "unnamed"]
    version = 0
    for event in seen:
        if "id" in event:
            version = event["data"].get("version", version)
            assert event["id"] == str(version)

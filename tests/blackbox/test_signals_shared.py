"""Streams of several contexts, and the bounds, paces and silences of streams."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

import pytest

from tests.blackbox.calls import PATIENCE_MS, SCRIPTED, Calls, eventually, faults, release
from tests.blackbox.sse import EventStream
from tests.databases import KINDS
from tests.server import Server

DATABASES = KINDS


@pytest.fixture(scope="module")
def calls(database_kind: str | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    directory = tmp_path_factory.mktemp("shared")
    settings = {"heartbeat_seconds": 0.2, "signal_patience_ms": PATIENCE_MS}
    with Server(directory, agent=SCRIPTED, log_format="json", **settings) as server:
        yield Calls(server)
        assert faults(server) == []


def contexts_seen(stream: EventStream) -> set[str]:
    return {event.data["context_id"] for event in stream.seen if "context_id" in event.data}


@pytest.mark.scenario("signals", "Stream of several contexts")
def test_a_shared_stream_carries_what_it_names(calls: Calls) -> None:
    first, second, third = calls.create(), calls.create(), calls.create()
    with calls.shared(first, second) as stream:
        for context_id in (first, second):
            stream.until("state_changed", context_id=context_id, previous_state=None, new_state="idle")
        for context_id in (third, first, second):
            posted = calls.run(context_id, ["text", "word"])
            calls.ended(context_id, posted["reply_message_id"])
        for _ in range(2):
            stream.until("message_completed", status="completed")
        assert {event.data["context_id"] for event in stream.of_type("message_completed")} == {first, second}
        deleted_version = calls.context(first)["version"] + 1
        assert calls.call("DELETE", f"/contexts/{first}").status == 204
        deleted = stream.until("context_deleted")
        calls.run(second, ["text", "more"])
        stream.until("message_completed", context_id=second)
    assert deleted.data | {"timestamp": 0} == {
        "type": "context_deleted",
        "context_id": first,
        "version": deleted_version,
        "timestamp": 0,
    }
    assert contexts_seen(stream) == {first, second}


@pytest.mark.scenario("signals", "Stream of all contexts")
def test_a_stream_without_names_carries_all(calls: Calls) -> None:
    old = calls.create()
    for _ in range(100):
        calls.create()  # So many are more recent that the old one is in no snapshot.
    with calls.shared() as stream:
        stream.until("heartbeat")
        assert old not in contexts_seen(stream)
        assert len(contexts_seen(stream)) == 100
        new = calls.create()
        for context_id in (old, new):
            posted = calls.run(context_id, ["text", "word"], ["wait", f"all-{context_id}"])
            stream.until("content_delta", context_id=context_id, message_id=posted["reply_message_id"])
            heads = [{"context_id": context_id, "message_id": posted["reply_message_id"], "current_sequence": 1}]
            stream.until("heartbeat", heads=heads)
            release(calls.server, f"all-{context_id}")
            stream.until("message_completed", context_id=context_id, message_id=posted["reply_message_id"])


@pytest.mark.scenario("signals", "Reconnect a shared stream")
@pytest.mark.parametrize("named", [True, False])
def test_a_shared_stream_is_taken_up_again(calls: Calls, named: bool) -> None:
    contexts = [calls.create(), calls.create(), calls.create()]
    last: dict[str, str | None] = {}
    with calls.shared(*contexts) as stream:
        for context_id in contexts:
            calls.run(context_id, ["text", "before"])
        # States, since each context's last one is sent after everything that led to it.
        while len(last) < len(contexts):
            event = stream.until("state_changed", new_state="idle")
            if event.data["previous_state"] is not None:
                last[event.data["context_id"]] = event.id
    missed = {}
    for context_id in contexts[:2]:
        missed[context_id] = [_reply(calls, context_id) for _ in range(2)]
    before = {context_id: calls.messages(context_id)[1]["id"] for context_id in contexts}
    entries = [str(last[context_id]) for context_id in contexts]
    # Without versions by name, the last event's id counts for the context that it names.
    options = {} if named else {"headers": {"Last-Event-ID": entries[0]}}
    with calls.shared(*(entries if named else contexts), **options) as stream:
        for newest in (missed.get(context_id, [before[context_id]])[-1] for context_id in contexts):
            if not any(event.data["message_id"] == newest for event in stream.of_type("message_completed")):
                stream.until("message_completed", message_id=newest)
    endings = {context_id: [] for context_id in contexts}
    for event in stream.of_type("message_completed"):
        endings[event.data["context_id"]].append(event.data["message_id"])
    first, second, third = contexts
    assert endings[first] == [before[first], *missed[first]]
    assert endings[second] == ([before[second], *missed[second]] if named else missed[second][-1:])
    assert endings[third] == [before[third]]
    version: dict[str, int] = {}
    for event in stream.seen:
        if context_id := event.data.get("context_id"):
            version[context_id] = event.data.get("version", version.get(context_id))
            assert event.id == f"{context_id}:{version[context_id]}"


def _reply(calls: Calls, context_id: str) -> str:
    posted = calls.run(context_id, ["text", "word"])
    calls.ended(context_id, posted["reply_message_id"])
    return str(posted["reply_message_id"])


@pytest.mark.scenario("signals", "Too many streams")
def test_no_more_streams_than_allowed_are_open(tmp_path: Path) -> None:
    with Server(tmp_path, agent=SCRIPTED, log_format="json", max_streams=2, max_contexts_per_stream=3) as server:
        calls = Calls(server)
        contexts = [calls.create() for _ in range(4)]
        with ExitStack() as stack:
            first = stack.enter_context(calls.signals(contexts[0]))
            second = stack.enter_context(calls.shared(*contexts[:3]))
            assert (first.status, second.status) == (200, 200)
            refused = calls.call("GET", f"/contexts/{contexts[0]}/stream")
            assert (refused.status, refused.json["code"]) == (503, "too-many-streams")
            assert "retry-after" in refused.headers
            first.close()
            eventually(lambda: calls.metric("context_server_open_streams") == 1, "one open stream")
            assert stack.enter_context(calls.shared()).status == 200
            assert calls.call("GET", "/stream").status == 503
        many = calls.call("GET", "/stream?" + "&".join(f"context={context_id}" for context_id in contexts))
        assert (many.status, many.json["code"]) == (422, "invalid-request")
        assert [error["where"] for error in many.json["errors"]] == ["query.context"]
        eventually(lambda: calls.metric("context_server_open_streams") == 0, "no open stream")
        assert faults(server) == []


@pytest.mark.scenario("signals", "Slow reader")
def test_who_does_not_read_gets_the_newest_only(tmp_path: Path) -> None:
    conversations, words = 20, 600
    settings = {"agent": "metronome", "signal_patience_ms": 0, "send_timeout_seconds": 60}
    with Server(tmp_path, log_format="json", **settings) as server:
        calls = Calls(server)
        contexts = [calls.create() for _ in range(conversations)]
        slow = EventStream(server.port, "/stream", receive_buffer_bytes=4096)
        with slow, calls.shared() as quick:
            replies = {
                calls.post(context_id, f"rate={words / 3} seconds=3")["reply_message_id"]: context_id
                for context_id in contexts
            }
            for _ in contexts:
                quick.until("message_completed")
            pages = {message_id: calls.pull(context_id, message_id) for message_id, context_id in replies.items()}
            chunks = sum(page["final_sequence"] for page in pages.values())
            merged = calls.metric("context_server_signals_merged_total")
            for _ in contexts:
                slow.until("message_completed")
            # The state is told after the ending; each context's last one is that of now.
            for context_id in contexts:
                if not any(event.data["new_state"] == "idle" for event in _states(slow, context_id)[1:]):
                    slow.until("state_changed", context_id=context_id, new_state="idle")
    deltas = slow.of_type("content_delta")
    newest = {event.data["message_id"]: event.data["current_sequence"] for event in deltas}
    assert newest == {message_id: page["final_sequence"] for message_id, page in pages.items()}
    endings = {event.data["message_id"]: event.data["final_sequence"] for event in slow.of_type("message_completed")}
    assert endings == newest
    assert len(slow.of_type("message_completed")) == conversations
    # It got what the sockets between had room for and the newest of each: so the rest was merged, not kept.
    assert len(deltas) < len(quick.of_type("content_delta")) < chunks + 1
    assert merged >= len(quick.of_type("content_delta")) - len(deltas) > 0


def _states(stream: EventStream, context_id: str) -> list[object]:
    return [event for event in stream.of_type("state_changed") if event.data["context_id"] == context_id]


@pytest.mark.scenario("signals", "Paced signals")
def test_signals_keep_their_distance(tmp_path: Path) -> None:
    interval, delay = 0.2, 0.6
    settings = {
        "signal_interval_ms": interval * 1000,
        "completion_delay_ms": delay * 1000,
        "signal_patience_ms": interval * 1000,
    }
    with Server(tmp_path, agent=SCRIPTED, log_format="json", **settings) as server:
        calls = Calls(server)
        context_id = calls.create()
        with calls.signals(context_id) as stream:
            begun = time.monotonic()
            posted = calls.run(context_id, ["words", 100, 1.2])
            completed = stream.until("message_completed")
            completed_at = time.time()
        reply = calls.message(context_id, posted["reply_message_id"])
        assert faults(server) == []
    deltas = stream.of_type("content_delta")
    # Single ones may arrive late, but all together not early; they are sent after what they tell of was written.
    assert 2 <= len(deltas) <= (deltas[-1].at - begun) / interval + 1
    assert reply["sequence"] > 2 * len(deltas)
    assert deltas[-1].data["current_sequence"] == reply["final_sequence"] == completed.data["final_sequence"]
    assert completed_at - datetime.fromisoformat(deltas[-1].data["timestamp"]).timestamp() >= delay - 0.01
    assert stream.seen[-1] is completed

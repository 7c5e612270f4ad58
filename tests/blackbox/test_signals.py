"""The signals of one context: what comes, when, and in which order."""

import time
from collections.abc import Iterator

import pytest

from tests.blackbox.calls import PATIENCE_MS, SCRIPTED, Calls, faults, release
from tests.blackbox.sse import Event, EventStream
from tests.databases import KINDS
from tests.server import Server

DATABASES = KINDS

HEARTBEAT_SECONDS = 0.2


@pytest.fixture(scope="module")
def calls(database_kind: str | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    directory = tmp_path_factory.mktemp("signals")
    settings = {"heartbeat_seconds": HEARTBEAT_SECONDS, "signal_patience_ms": PATIENCE_MS}
    with Server(directory, agent=SCRIPTED, log_format="json", **settings) as server:
        yield Calls(server)
        assert faults(server) == [line for line in faults(server) if '"agent_failed"' in line]


def is_signal(event: Event) -> bool:
    return event.type != "heartbeat"


def next_signal(stream: EventStream) -> Event:
    """The next event that is no heartbeat."""
    while not is_signal(event := stream.next()):
        pass
    return event


def signals(stream: EventStream) -> list[Event]:
    return [event for event in stream.seen if is_signal(event)]


@pytest.mark.scenario("signals", "Snapshot on connect")
def test_a_stream_begins_with_the_state_as_it_is(calls: Calls) -> None:
    idle, busy = calls.create(), calls.create()
    posted = calls.run(busy, ["text", "some ", "words"], ["wait", "snapshot-gate"])
    with calls.signals(busy) as stream:
        stream.until("content_delta")
    with calls.signals(idle) as of_idle, calls.signals(busy) as of_busy:
        of_the_idle, of_the_busy, delta = next_signal(of_idle), next_signal(of_busy), next_signal(of_busy)
        now = {context_id: calls.context(context_id) for context_id in (idle, busy)}
        pulled = calls.pull(busy, posted["reply_message_id"])
    release(calls.server, "snapshot-gate")
    for event, context_id, state in ((of_the_idle, idle, "idle"), (of_the_busy, busy, "streaming")):
        assert event.data == {
            "type": "state_changed",
            "context_id": context_id,
            "new_state": state,
            "previous_state": None,
            "version": now[context_id]["version"],
            "epoch": now[context_id]["epoch"],
            "run_id": posted["run_id"] if context_id == busy else None,
            "timestamp": event.data["timestamp"],
        }
        assert event.id == str(now[context_id]["version"])
    assert delta.data | {"timestamp": None} == {
        "type": "content_delta",
        "context_id": busy,
        "message_id": posted["reply_message_id"],
        "current_sequence": pulled["sequence"],
        "timestamp": None,
    }
    assert pulled["content"] == "some words"
    for stream in (of_idle, of_busy):
        assert stream.status == 200
        assert stream.headers["content-type"] == "text/event-stream"
        assert stream.headers["cache-control"] == "no-store, no-transform"
        assert stream.headers["x-accel-buffering"] == "no"


@pytest.mark.scenario("signals", "Subscribe after the reply has ended")
@pytest.mark.parametrize(("step", "status"), [("text", "completed"), ("fail", "failed")])
def test_who_comes_late_learns_of_the_end(calls: Calls, step: str, status: str) -> None:
    context_id = calls.create()
    posted = calls.run(context_id, ["text", "before "], [step, "x"])
    reply = calls.ended(context_id, posted["reply_message_id"])
    with calls.signals(context_id) as stream:
        completed = stream.until("message_completed")
    state, delta, last = signals(stream)
    assert (state.type, delta.type, last) == ("state_changed", "content_delta", completed)
    assert delta.data["message_id"] == completed.data["message_id"] == reply["id"]
    assert delta.data["current_sequence"] == completed.data["final_sequence"] == reply["final_sequence"] >= 1
    assert completed.data["status"] == reply["status"] == status


@pytest.mark.scenario("signals", "Subscribe after the reply has ended")
def test_an_empty_reply_has_an_end_and_no_delta(calls: Calls) -> None:
    context_id = calls.create()
    posted = calls.run(context_id)
    calls.ended(context_id, posted["reply_message_id"])
    with calls.signals(context_id) as stream:
        completed = stream.until("message_completed")
    assert [event.type for event in signals(stream)] == ["state_changed", "message_completed"]
    assert completed.data["final_sequence"] == 0


@pytest.mark.scenario("signals", "Reconnect with Last-Event-ID")
@pytest.mark.parametrize("in_the_query", [False, True])
def test_who_comes_back_learns_of_every_end(calls: Calls, in_the_query: bool) -> None:
    context_id = calls.create()
    replies = []
    with calls.signals(context_id) as stream:
        for text in ("one", "two"):
            replies.append(calls.run(context_id, ["text", text])["reply_message_id"])
            stream.until("message_completed")
            last = stream.until("state_changed", new_state="idle")
    for steps in (["text", "three"], ["fail", "four"], ["text", "five"]):
        replies.append(calls.run(context_id, steps)["reply_message_id"])
        calls.ended(context_id, replies[-1])
    headers = {} if in_the_query else {"Last-Event-ID": str(last.id)}
    query = {"last_event_id": last.id} if in_the_query else {}
    with calls.signals(context_id, headers=headers, **query) as stream:
        for reply in replies[1:]:
            stream.until("message_completed", message_id=reply)
        # The snapshot is sent at once, so what is not there by the next heartbeat was not in it.
        stream.until("heartbeat")
    endings = stream.of_type("message_completed")
    # The one that ended at that very version is told again: its ending may have been cut off behind the state.
    assert [event.data["message_id"] for event in endings] == replies[1:]
    assert [event.data["status"] for event in endings] == ["completed", "completed", "failed", "completed"]


@pytest.mark.scenario("signals", "Signals of a reply")
def test_a_reply_is_signalled_from_queued_to_idle(calls: Calls) -> None:
    context_id = calls.create()
    pulled = {}
    with calls.signals(context_id) as stream:
        next_signal(stream)
        steps = [step for number in range(5) for step in (["words", 8, 0.05], ["wait", f"growth-{number}"])]
        posted = calls.run(context_id, *steps)
        while (event := next_signal(stream)).data.get("new_state") != "idle":
            if event.type == "content_delta":
                release(calls.server, f"growth-{len(pulled)}")
                # At once, and no further: it gets less when the sequence cannot be pulled when it is signalled.
                reach = event.data["current_sequence"]
                page = calls.pull(context_id, posted["reply_message_id"], to_sequence=reach)
                pulled[reach] = page["sequence"]
    states, deltas = stream.of_type("state_changed"), stream.of_type("content_delta")
    assert [event.data["new_state"] for event in states] == ["idle", "queued", "thinking", "streaming", "idle"]
    assert [event.data["previous_state"] for event in states[1:]] == ["idle", "queued", "thinking", "streaming"]
    versions = [event.data["version"] for event in states]
    assert versions == list(range(versions[0], versions[0] + 5))
    assert {event.data["run_id"] for event in states[1:]} == {posted["run_id"]}
    sequences = [event.data["current_sequence"] for event in deltas]
    assert len(sequences) >= 5
    assert sequences == sorted(set(sequences))
    assert pulled == {sequence: sequence for sequence in sequences}
    (completed,) = stream.of_type("message_completed")
    assert signals(stream).index(completed) > signals(stream).index(deltas[-1])
    assert completed.data["final_sequence"] == sequences[-1]
    assert completed.data["status"] == "completed"
    assert completed.data["version"] == versions[-1]
    version = None
    for event in signals(stream):
        assert event.name is None
        version = event.data.get("version", version)
        assert event.id == str(version)
    text = calls.message(context_id, posted["reply_message_id"])["content"]
    assert text == "".join(f"{number} " for number in range(8)) * 5


@pytest.mark.scenario("signals", "One ending for every reply")
@pytest.mark.parametrize(
    ("last_step", "status", "state"),
    [(["text", "end"], "completed", "idle"), (["fail", "x"], "failed", "failed"), (None, "cancelled", "idle")],
)
def test_every_reply_has_one_ending(calls: Calls, last_step: list[str] | None, status: str, state: str) -> None:
    context_id = calls.create()
    with calls.signals(context_id) as one, calls.signals(context_id) as other:
        posted = calls.run(context_id, ["text", "begun "], last_step or ["wait", "never"])
        if last_step is None:
            one.until("content_delta")
            calls.cancel(context_id)
        calls.ended(context_id, posted["reply_message_id"])
        for stream in (one, other):
            stream.until("message_completed")
            # Of a second ending there would be a sign by the heartbeat after the last state.
            stream.until("state_changed", new_state=state)
            stream.until("heartbeat")
    pulled = calls.pull(context_id, posted["reply_message_id"])
    for stream in (one, other):
        (completed,) = stream.of_type("message_completed")
        assert completed.data["status"] == pulled["status"] == status
        assert completed.data["final_sequence"] == pulled["final_sequence"] == pulled["sequence"] >= 1


@pytest.mark.scenario("signals", "Heartbeat with heads")
def test_heartbeats_name_the_heads_of_open_replies(calls: Calls) -> None:
    context_id, other = calls.create(), calls.create()
    begun = time.monotonic()
    with calls.signals(context_id) as stream:
        assert stream.until("heartbeat").data["heads"] == []
        calls.run(other, ["text", "of another context"], ["wait", "heads-other"])
        posted = calls.run(context_id, ["text", "one"], ["wait", "heads-1"], ["textual", "reasoning", "two"])
        reply = posted["reply_message_id"]
        first = stream.until("heartbeat", heads=[_head(context_id, reply, 1)])
        release(calls.server, "heads-1")
        stream.until("message_completed")
        assert stream.until("heartbeat").data["heads"] == []
        beats, seconds = stream.of_type("heartbeat"), time.monotonic() - begun
    release(calls.server, "heads-other")
    assert set(first.data) == {"type", "timestamp", "heads"}
    assert first.id is None
    # Some may arrive late, and then several at once; but all together not early.
    assert len(beats) <= seconds / HEARTBEAT_SECONDS + 1


def _head(context_id: str, message_id: str, sequence: int) -> dict[str, object]:
    return {"context_id": context_id, "message_id": message_id, "current_sequence": sequence}


@pytest.mark.scenario("signals", "Lost signals")
def test_heartbeats_alone_lead_to_the_whole_text(calls: Calls) -> None:
    context_id = calls.create()
    held: dict[str, str] = {}
    sequences: dict[str, int] = {}
    status = None
    with calls.signals(context_id) as stream:
        next_signal(stream)
        calls.run(context_id, ["words", 100, 1.0])
        while status is None:
            beat = stream.until("heartbeat")  # Whatever else came was read and dropped.
            heads = {head["message_id"]: head["current_sequence"] for head in beat.data["heads"]}
            for message_id in held.keys() | heads.keys():
                page = calls.pull(context_id, message_id, from_sequence=sequences.get(message_id, 0))
                held[message_id] = held.get(message_id, "") + page["content"]
                sequences[message_id] = page["sequence"]
                assert page["sequence"] >= heads.get(message_id, 0)
                if message_id not in heads:
                    assert page["sequence"] == page["final_sequence"]
                    status = page["status"]
    assert list(held.values()) == ["".join(f"{number} " for number in range(100))]
    assert status == "completed"


@pytest.mark.scenario("signals", "Named events")
def test_named_events_say_the_same(calls: Calls) -> None:
    context_id = calls.create()
    with calls.signals(context_id, named="true") as named, calls.signals(context_id) as plain:
        calls.run(context_id, ["text", "a"], ["wait", "named-gate"], ["text", "b"])
        for stream in (named, plain):
            stream.until("content_delta")
        release(calls.server, "named-gate")
        for stream in (named, plain):
            stream.until("message_completed")
            stream.until("state_changed", new_state="idle")
            stream.until("heartbeat")
    assert len(signals(named)) == len(signals(plain)) == 8
    for one, other in zip(signals(named), signals(plain), strict=True):
        assert one.raw == b"id: %s\nevent: %s\ndata: %s" % (*_bytes(one.id, one.type), one.raw.split(b"data: ")[1])
        assert other.raw == b"id: %s\ndata: %s" % (*_bytes(other.id), other.raw.split(b"data: ")[1])
        # The snapshot is made for each subscriber, at a moment of its own.
        assert one.data | {"timestamp": 0} == other.data | {"timestamp": 0}
    for beat in named.of_type("heartbeat"):
        assert beat.raw.startswith(b"event: heartbeat\ndata: ")


def _bytes(*texts: str | None) -> list[bytes]:
    return [str(text).encode() for text in texts]


@pytest.mark.scenario("signals", "Types filter")
def test_a_filter_keeps_what_it_names_and_heartbeats(calls: Calls) -> None:
    context_id = calls.create()
    with (
        calls.signals(context_id, types="content_delta,message_completed") as stream,
        calls.signals(context_id) as all_,
    ):
        calls.run(context_id, ["text", "a"])
        for each in (stream, all_):
            each.until("message_completed")
            each.until("heartbeat")
    assert {event.type for event in stream.seen} == {"content_delta", "message_completed", "heartbeat"}
    assert all_.of_type("state_changed")[-1].data["previous_state"] is not None
    wrong = calls.call("GET", f"/contexts/{context_id}/stream?types=content_delta,texts")
    assert (wrong.status, wrong.json["code"]) == (422, "invalid-request")


@pytest.mark.scenario("signals", "Signal of a change")
def test_a_change_is_signalled_without_what_changed(calls: Calls) -> None:
    context_id = calls.create(title="before")
    with calls.signals(context_id) as stream:
        next_signal(stream)
        answer = calls.call("PATCH", f"/contexts/{context_id}", {"title": "afterwards"})
        changed = next_signal(stream)
    assert answer.status == 200
    assert set(changed.data) == {"type", "context_id", "version", "timestamp"}
    assert (changed.type, changed.data["context_id"]) == ("context_changed", context_id)
    assert changed.data["version"] == answer.json["version"]
    assert b"afterwards" not in stream.body


def test_a_stream_of_no_context_is_refused(calls: Calls) -> None:
    with calls.signals("0198c1de-0000-7000-8000-000000000000") as stream:
        pass
    assert (stream.status, stream.headers["content-type"]) == (404, "application/problem+json")
    assert b'"context-not-found"' in stream.body


def test_two_parallel_tools_are_one_visit_of_calling_tool(calls: Calls) -> None:
    context_id = calls.create()
    with calls.signals(context_id) as stream:
        next_signal(stream)
        steps = []
        for number, (kind, tool) in enumerate(
            [("tool_call", "1"), ("tool_call", "2"), ("tool_result", "2"), ("tool_result", "1")]
        ):
            steps += [["data", kind, {"id": tool}], ["wait", f"tools-{number}"]]
        posted = calls.run(context_id, *steps, ["text", "done"], ["wait", "tools-4"])
        for number in range(5):
            stream.until("content_delta", current_sequence=number + 1)
            release(calls.server, f"tools-{number}")
        stream.until("state_changed", new_state="idle")
    states = [event.data["new_state"] for event in stream.of_type("state_changed")]
    assert states == ["idle", "queued", "thinking", "calling_tool", "thinking", "streaming", "idle"]
    kinds = [chunk["kind"] for chunk in calls.chunks(context_id, posted["reply_message_id"])]
    assert kinds == ["tool_call", "tool_call", "tool_result", "tool_result", "text"]

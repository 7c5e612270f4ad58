"""The inline view: the log of a message pushed as server-sent events, for ``curl -N`` and simple clients."""

import json
from collections.abc import Iterator

import pytest

from tests.blackbox.calls import SCRIPTED, Calls, faults, release, script
from tests.blackbox.sse import EventStream
from tests.blackbox.wire import STEPS, begin, message_body
from tests.databases import KINDS
from tests.server import Server

DATABASES = KINDS


@pytest.fixture(scope="module")
def calls(database_kind: str | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    with Server(tmp_path_factory.mktemp("inline"), agent=SCRIPTED, log_format="json") as server:
        yield Calls(server)
        assert faults(server) == []


@pytest.mark.scenario("content-pull", "Inline view of a reply")
def test_the_inline_view_pushes_each_chunk_once(calls: Calls) -> None:
    context_id = calls.create()
    posted = calls.run(context_id, *STEPS, ["words", 40, 0.2], ["data", "step", {"number": 2}])
    ids = (context_id, posted["reply_message_id"])
    with calls.inline(*ids) as stream:
        *events, last = [event for event in stream.rest() if event.type != "heartbeat"]
    assert (stream.status, stream.headers["content-type"]) == (200, "text/event-stream")
    chunks = [{name: value for name, value in event.data.items() if name != "type"} for event in events]
    assert {event.type for event in events} == {"chunk"}
    assert {event.name for event in (*events, last)} == {None}
    assert chunks == calls.chunks(*ids)
    assert [event.id for event in events] == [str(number) for number in range(1, len(events) + 1)]
    assert (last.type, last.id) == ("message_completed", f"{len(events)}:end")
    message = calls.message(*ids)
    expected = {"context_id": ids[0], "message_id": ids[1], "final_sequence": len(events), "status": "completed"}
    assert {name: last.data[name] for name in expected} == expected
    assert message["content"] == "".join(chunk["text"] for chunk in chunks if chunk["kind"] == "text")


@pytest.mark.scenario("content-pull", "Inline view resumed")
def test_an_inline_view_goes_on_after_the_last_event(calls: Calls) -> None:
    ids = begin(calls, ["words", 10, 0.05], gate="inline-resumed")
    path = f"/contexts/{ids[0]}/messages/{ids[1]}/events"
    with calls.inline(*ids) as stream:
        held = [stream.next() for _ in range(3)]
    with EventStream(calls.server.port, path, {"Last-Event-ID": held[-1].id or ""}) as resumed:
        held += [resumed.next() for _ in range(5)]
        release(calls.server, "inline-resumed")
        held += resumed.rest()
    chunks = [event.data for event in held if event.type == "chunk"]
    assert [event.id for event in held[:-1]] == [str(number) for number in range(1, len(held))]
    assert [{"type": "chunk", **chunk} for chunk in calls.chunks(*ids)] == chunks
    ended = calls.call("GET", path, headers={"Last-Event-ID": held[-1].id or ""})
    assert (held[-1].type, ended.status, ended.body) == ("message_completed", 204, b"")
    with EventStream(calls.server.port, f"{path}?from_sequence={len(chunks) - 1}") as last:
        assert [event.id for event in last.rest()] == [str(len(chunks)), f"{len(chunks)}:end"]


@pytest.mark.scenario("content-pull", "Post answered inline")
def test_a_post_is_answered_by_the_stream_of_its_reply(calls: Calls) -> None:
    context_id = calls.create()
    body = message_body(script(*STEPS, ["words", 10, 0.05]))
    path = f"/contexts/{context_id}/messages"
    headers = {"Accept": "text/event-stream"}
    with EventStream(calls.server.port, path, headers, method="POST", content=body) as stream:
        accepted, *chunks, last = stream.rest()
    user, reply = calls.messages(context_id)
    expected = {
        "type": "message_accepted",
        "context_id": context_id,
        "message_id": user["id"],
        "reply_message_id": reply["id"],
        "run_id": reply["run_id"],
        "state": "queued",
        "version": 2,
    }
    assert (stream.status, accepted.data, accepted.id) == (200, expected, None)
    assert [event.data for event in chunks] == [
        {"type": "chunk", **chunk} for chunk in calls.chunks(context_id, reply["id"])
    ]
    assert (last.type, last.id) == ("message_completed", f"{len(chunks)}:end")
    assert json.loads(body)["payload"]["content"] == user["content"]

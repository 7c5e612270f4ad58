"""The inline view: the log of a message pushed as server-sent events, for ``curl -N`` and simple clients."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.blackbox.calls import SCRIPTED, Calls, faults, release, script
from tests.blackbox.sse import Event, EventStream
from tests.blackbox.wire import STEPS, begin, message_body, problem, wheres, written
from tests.databases import KINDS
from tests.server import Server

DATABASES = KINDS

EVENTS = {
    "text": "text_delta",
    "reasoning": "reasoning_delta",
    "tool_call": "tool_call_started",
    "tool_result": "tool_call_finished",
    "step": "step",
    "error": "error",
}


@pytest.fixture(scope="module")
def calls(database_kind: str | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    with Server(tmp_path_factory.mktemp("inline"), agent=SCRIPTED, log_format="json") as server:
        yield Calls(server)
        assert [line for line in faults(server) if json.loads(line)["event"] != "agent_failed"] == []


def told(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The data of the events that tell of some chunks."""
    return [
        {"type": EVENTS[chunk["kind"]], **{name: value for name, value in chunk.items() if name != "kind"}}
        for chunk in chunks
    ]


def without_heartbeats(events: list[Event]) -> list[Event]:
    return [event for event in events if event.type != "heartbeat"]


@pytest.mark.scenario("content-pull", "Inline view of a reply")
def test_the_inline_view_pushes_each_chunk_once(calls: Calls) -> None:
    context_id = calls.create()
    posted = calls.run(context_id, *STEPS, ["words", 40, 0.2], ["data", "error", {"message": "slow"}])
    ids = (context_id, posted["reply_message_id"])
    with calls.inline(*ids) as stream:
        first, *events, last = without_heartbeats(stream.rest())
    assert (stream.status, stream.headers["content-type"]) == (200, "text/event-stream")
    assert (first.type, first.id) == ("run_started", "0")
    assert first.data.items() >= {"context_id": ids[0], "message_id": ids[1], "sequence": 0}.items()
    assert {event.name for event in (first, *events, last)} == {None}
    assert [event.data for event in events] == told(calls.chunks(*ids))
    assert [event.id for event in events] == [str(number) for number in range(1, len(events) + 1)]
    message = calls.message(*ids)
    assert (last.type, last.id) == ("run_finished", f"{len(events)}:end")
    for name in ("context_id", "run_id", "status", "final_sequence", "usage", "digest"):
        assert last.data[name] == message[name], name
    assert message["content"] == "".join(event.data["text"] for event in events if event.type == "text_delta")


@pytest.mark.scenario("content-pull", "Inline view resumed")
def test_an_inline_view_goes_on_after_the_last_event(calls: Calls) -> None:
    ids = begin(calls, ["words", 10, 0.05], gate="inline-resumed")
    path = f"/contexts/{ids[0]}/messages/{ids[1]}/events"
    with calls.inline(*ids) as stream:
        held = [stream.next() for _ in range(4)]
    with EventStream(calls.server.port, path, {"Last-Event-ID": held[-1].id or ""}) as resumed:
        held += [resumed.next() for _ in range(5)]
        release(calls.server, "inline-resumed")
        held += without_heartbeats(resumed.rest())
    chunks = held[1:-1]
    assert [event.id for event in held[:-1]] == [str(number) for number in range(len(held) - 1)]
    assert told(calls.chunks(*ids)) == [event.data for event in chunks]
    ended = calls.call("GET", path, headers={"Last-Event-ID": held[-1].id or ""})
    assert (held[-1].type, ended.status, ended.body) == ("run_finished", 204, b"")
    with EventStream(calls.server.port, path, {"Last-Event-ID": "0"}) as once_more:
        assert [event.data for event in once_more.rest()][:-1] == [event.data for event in chunks]
    with EventStream(calls.server.port, f"{path}?from_sequence={len(chunks) - 1}") as last:
        number = len(chunks)
        assert [event.id for event in last.rest()] == [str(number - 1), str(number), f"{number}:end"]


@pytest.mark.scenario("content-pull", "Post answered inline")
def test_a_post_is_answered_by_the_stream_of_its_reply(calls: Calls) -> None:
    context_id = calls.create()
    body = message_body(script(*STEPS, ["words", 10, 0.05]))
    path = f"/contexts/{context_id}/messages"
    headers = {"Accept": "text/event-stream"}
    with EventStream(calls.server.port, path, headers, method="POST", content=body) as stream:
        started, *chunks, last = without_heartbeats(stream.rest())
    user, reply = calls.messages(context_id)
    expected = {
        "context_id": context_id,
        "message_id": user["id"],
        "reply_message_id": reply["id"],
        "run_id": reply["run_id"],
        "state": "queued",
        "version": 2,
    }
    assert (stream.status, started.type, started.id) == (200, "run_started", "0")
    assert started.data["posted"].items() >= expected.items()
    assert started.data["message_id"] == reply["id"]
    assert [event.data for event in chunks] == told(calls.chunks(context_id, reply["id"]))
    assert (last.type, last.id) == ("run_finished", f"{len(chunks)}:end")
    assert json.loads(body)["payload"]["content"] == user["content"]


@pytest.mark.scenario("content-pull", "Inline view of a reply that fails")
def test_a_failure_is_told_before_the_end(calls: Calls) -> None:
    ids = written(calls, ["text", "so far"], ["fail", "secret"])
    with calls.inline(*ids) as stream:
        _, text, error, last = stream.rest()
    failure = calls.message(*ids)["error"]
    assert text.data["text"] == "so far"
    assert (error.data, error.id) == ({"type": "error", **failure}, None)
    assert (last.type, last.data["status"], last.id) == ("run_finished", "failed", "1:end")
    assert "secret" not in stream.body.decode()


@pytest.mark.scenario("content-pull", "Inline view of some types")
def test_only_the_asked_types_come_and_the_end(calls: Calls) -> None:
    ids = written(calls, *STEPS)
    with calls.inline(*ids, types="text_delta,step", named="true") as stream:
        events = stream.rest()
    wanted = [chunk for chunk in told(calls.chunks(*ids)) if chunk["type"] in ("text_delta", "step")]
    assert [event.data for event in events[:-1]] == wanted
    assert [event.name for event in events] == [event.type for event in events]
    assert (events[-1].type, events[-1].id) == ("run_finished", f"{len(STEPS)}:end")


@pytest.mark.scenario("content-pull", "Inline view with unknown types")
def test_what_an_inline_view_cannot_speak_is_refused_with_what_it_can(calls: Calls) -> None:
    ids = written(calls, ["text", "a"])
    events = f"/contexts/{ids[0]}/messages/{ids[1]}/events"
    unknown = problem(calls.call("GET", f"{events}?types=step,LLM_CHUNK"), 422, "invalid-request")
    assert "knows no LLM_CHUNK" in unknown["errors"][0]["detail"]
    assert "text_delta" in unknown["errors"][0]["detail"]
    assert (
        "LLM_CHUNK"
        in problem(calls.call("GET", f"{events}?dialect=agent&types=x"), 422, "invalid-request")["errors"][0][
            "detail"
        ].partition("known: ")[2]
    )
    assert wheres(calls.call("GET", f"{events}?dialect=klingon")) == ["query.dialect"]
    before = len(calls.messages(ids[0]))
    for query in ("dialect=klingon", "types=x", "named=maybe"):
        refused = calls.call("POST", f"/contexts/{ids[0]}/messages?{query}", message_body("[]"))
        assert wheres(refused) == [f"query.{query.partition('=')[0]}"]
    assert len(calls.messages(ids[0])) == before


SEND = {"id": "call-1", "tool": "send_mail", "arguments": {"to": "ann"}}


@pytest.mark.scenario("content-pull", "Inline view of an approval")
def test_a_call_that_waits_for_a_person_is_told_and_the_stream_goes_on(calls: Calls) -> None:
    context_id = calls.create()
    posted = calls.run(context_id, ["text", "Wait. "], ["approve", SEND], ["text", "done"])
    ids = (context_id, posted["reply_message_id"])
    with calls.inline(*ids) as ours, calls.inline(*ids, dialect="agent") as another:
        asked = ours.until("approval_requested")
        (approval,) = calls.approvals(context_id)
        assert calls.decide(context_id, approval["id"], "approve").status == 200
        rest = without_heartbeats(ours.rest())
        names = [event.name for event in another.rest()]
    call = asked.data["data"]
    assert (call["id"], call["name"], call["arguments"]) == ("call-1", "send_mail", SEND["arguments"])
    assert call["approval"].items() >= {"id": approval["id"], "editable": False}.items()
    assert (rest[0].type, rest[0].data["data"]["id"]) == ("tool_call_finished", "call-1")
    assert ([event.type for event in rest[-2:]], rest[-2].data["text"]) == (["text_delta", "run_finished"], "done")
    assert names[1:5] == ["LLM_CHUNK", "TOOL_CALL_START", "APPROVAL_REQUESTED", "TOOL_CALL_FINISH"]

"""``POST /chat``: post and stream in one call, in a conversation that is kept by the caller's key."""

import json
from collections.abc import Iterator, Mapping
from typing import Any
from uuid import UUID

import pytest

from tests.blackbox.calls import SCRIPTED, Calls, release, script
from tests.blackbox.sse import Event, EventStream
from tests.blackbox.wire import message_body, problem, reached, rows, together, wheres
from tests.databases import KINDS
from tests.server import Server

DATABASES = KINDS


@pytest.fixture(scope="module")
def calls(database_kind: str | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    with Server(tmp_path_factory.mktemp("chat"), agent=SCRIPTED) as server:
        yield Calls(server)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def chat(calls: Calls, text: str, headers: Mapping[str, str] | None = None, **fields: Any) -> list[Event]:
    """The events of one call."""
    body = json.dumps({"content": text, **fields}).encode()
    with EventStream(calls.server.port, "/chat", headers or {}, method="POST", content=body) as stream:
        assert stream.status == 200, stream.body
        return stream.rest()


def said(events: list[Event]) -> str:
    return "".join(event.data["payload"]["chunk"] for event in events if event.name == "text_chunk")


def contexts(calls: Calls) -> list[dict[str, Any]]:
    return list(calls.call("GET", "/contexts?limit=200").json["items"])


@pytest.mark.scenario("dialects", "Chat in one call")
def test_one_call_posts_and_streams(calls: Calls) -> None:
    text = script(["text", "Hello, "], ["data", "step", {"number": 1}], ["text", "you."])
    stamp = {"client_timestamp_utc": "2026-11-21T10:00:00Z", "client_timezone_offset": -60}
    events = chat(calls, text, bearer("one"), **stamp)
    assert [event.name for event in events] == [
        "run_started",
        *["text_chunk"] * 3,
        "run_finished",
    ]
    assert events[0].data["payload"] == {"owner_key": "one", "user_input": text}
    assert said(events) == "Hello, you."
    (context,) = [each for each in contexts(calls) if calls.messages(each["id"])[0]["client_metadata"] == stamp]
    assert UUID(context["id"]).version == 8
    assert [each["content"] for each in calls.messages(context["id"])] == [text, "Hello, you."]
    assert calls.messages(context["id"])[1]["run_id"] == events[0].data["run_id"]


@pytest.mark.scenario("dialects", "A conversation for each key")
def test_a_conversation_is_kept_by_its_key(calls: Calls) -> None:
    before = {each["id"] for each in contexts(calls)}
    for headers in (bearer("a"), bearer("b"), {}, bearer("a"), {"Authorization": "Basic Zm9vOmJhcg=="}):
        chat(calls, script(["text", "x"]), headers)
    made = [each["id"] for each in contexts(calls) if each["id"] not in before]
    assert sorted(len(calls.messages(context_id)) for context_id in made) == [2, 4, 4]
    kept = rows(calls.server, "SELECT id, owner, title, metadata FROM contexts")
    assert "secret-key" not in str(kept)


@pytest.mark.scenario("dialects", "A conversation for each key")
def test_the_first_calls_of_a_key_at_once_make_one_conversation(calls: Calls) -> None:
    before = {each["id"] for each in contexts(calls)}
    body = {"content": script(["text", "x"])}
    answers = together(4, lambda _: calls.call("POST", "/chat", body, headers=bearer("at-once")))
    assert sorted({answer.status for answer in answers}) in ([200], [200, 409])
    made = [each["id"] for each in contexts(calls) if each["id"] not in before]
    assert len(made) == 1
    assert len(calls.messages(made[0])) == 2 * [answer.status for answer in answers].count(200)


@pytest.mark.scenario("dialects", "Chat in a named context")
def test_a_call_may_name_its_context(calls: Calls) -> None:
    context_id = calls.create()
    chat(calls, script(["text", "x"]), bearer("elsewhere"), context_id=context_id)
    assert len(calls.messages(context_id)) == 2
    refused = calls.call("POST", "/chat", {"content": "x", "context_id": "no such"})
    problem(refused, 404, "context-not-found")


@pytest.mark.scenario("dialects", "Chat while a reply is being written")
def test_a_busy_conversation_refuses_and_a_cut_call_ends_nothing(calls: Calls) -> None:
    context_id = calls.create()
    body = json.dumps(
        {"content": script(["text", "a"], ["wait", "chat-gate"], ["text", "b"]), "context_id": context_id}
    ).encode()
    with EventStream(calls.server.port, "/chat", method="POST", content=body) as stream:
        assert stream.next().name == "run_started"
        assert stream.next().name == "text_chunk"
    busy = calls.call("POST", "/chat", {"content": "x", "context_id": context_id})
    problem(busy, 409, "command-not-allowed")
    reply = calls.messages(context_id)[1]["id"]
    reached(calls, context_id, reply, 1)
    release(calls.server, "chat-gate")
    assert calls.ended(context_id, reply)["content"] == "ab"


@pytest.mark.scenario("dialects", "Chat sent again")
def test_a_call_that_is_sent_again_is_done_once(calls: Calls) -> None:
    text = script(["text", "once"])
    keyed = {**bearer("again"), "Idempotency-Key": "chat-1"}
    first, second = chat(calls, text, keyed), chat(calls, text, keyed)
    assert said(first) == said(second) == "once"
    assert first[0].data["run_id"] == second[0].data["run_id"]
    of_another = calls.call("POST", "/chat", {"content": text}, headers={**keyed, **bearer("another")})
    problem(of_another, 422, "idempotency-key-reused")


@pytest.mark.scenario("dialects", "A command by chat")
def test_a_command_is_answered_in_a_stream_of_one_event(calls: Calls) -> None:
    context_id = calls.create()
    (event,) = chat(calls, "/ping", context_id=context_id)
    assert event.name == event.data["event"] == "command_result"
    assert event.data["payload"].items() >= {"status": "success", "message": "pong"}.items()
    assert calls.messages(context_id) == []


def test_a_call_of_another_shape_is_refused(calls: Calls) -> None:
    before = len(contexts(calls))
    for body, where in (
        ({}, "body.content"),
        ({"content": ""}, "body.content"),
        ({"content": "x", "model": "y"}, "body.model"),
        ({"content": "x", "client_timezone_offset": 1e9}, "body.client_timezone_offset"),
        ({"content": "x", "client_timezone_offset": float("nan")}, "body.client_timezone_offset"),
    ):
        assert wheres(calls.call("POST", "/chat", body, headers=bearer("shapes"))) == [where]
    problem(calls.call("POST", "/chat", b"{"), 400, "invalid-json")
    assert wheres(calls.call("POST", "/chat?dialect=agent", message_body("x")))[0].startswith("query.")
    assert len(contexts(calls)) == before

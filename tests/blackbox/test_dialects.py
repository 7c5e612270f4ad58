"""One log, several wires: the inline view in the event names and payloads of other frontends, over a real socket."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.blackbox.calls import SCRIPTED, Calls, release, script
from tests.blackbox.sse import Event, EventStream
from tests.blackbox.wire import CALL, RESULT, STEPS, TEXT, begin, message_body, reached, written
from tests.databases import KINDS
from tests.server import Server

DATABASES = KINDS

TEXT_OF = {
    "nexus": ("text_chunk", lambda data: data["payload"]["chunk"]),
    "assistant": ("assistant_delta", lambda data: data["delta"]),
    "agent": ("LLM_CHUNK", lambda data: data["content"]),
    "default": ("text_delta", lambda data: data["text"]),
}


@pytest.fixture(scope="module")
def calls(database_kind: str | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    with Server(tmp_path_factory.mktemp("dialects"), agent=SCRIPTED) as server:
        yield Calls(server)


def text_in(dialect: str, events: list[Event]) -> str:
    """What a client of a dialect joins."""
    name, text_of = TEXT_OF[dialect]
    return "".join(text_of(event.data) for event in events if event.name == name)


def names(events: list[Event]) -> list[str | None]:
    return [event.name for event in events if event.name != "heartbeat"]


@pytest.mark.scenario("dialects", "A live reply in every dialect")
def test_every_dialect_tells_a_live_reply_as_the_pull_does(calls: Calls) -> None:
    ids = begin(calls, ["words", 200, 0.3], gate="every-dialect")
    with ExitStack() as open_streams:
        streams = {name: open_streams.enter_context(calls.inline(*ids, dialect=name, named="true")) for name in TEXT_OF}
        for stream in streams.values():
            stream.next()
        release(calls.server, "every-dialect")
        for stream in streams.values():
            stream.rest()
    heard = {name: text_in(name, stream.seen) for name, stream in streams.items()}
    pulled = calls.ended(*ids)["content"]
    assert heard == dict.fromkeys(TEXT_OF, pulled)
    assert pulled.startswith(TEXT)
    assert pulled.endswith("199 ")


SAID: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "nexus": [
        ("run_started", {"owner_key": "local", "user_input": script(*STEPS)}),
        ("tool_call_started", {"tool_name": "look_up", "args": CALL["arguments"]}),
        ("tool_call_finished", {"tool_name": "look_up", "status": "ok", "result": '{"found": "naïve 😀"}'}),
        ("text_chunk", {"chunk": "First, ", "is_final": False}),
        ("text_chunk", {"chunk": "naïve \U0001f600 ", "is_final": False}),
        ("text_chunk", {"chunk": "and 'last'.\n", "is_final": False}),
        ("text_chunk", {"chunk": "", "is_final": True}),
        ("run_finished", {"status": "completed"}),
    ],
    "assistant": [
        ("assistant_typing", {}),
        ("assistant_delta", {"delta": "First, "}),
        ("assistant_delta", {"delta": "naïve \U0001f600 "}),
        ("assistant_delta", {"delta": "and 'last'.\n"}),
        ("usage_info", {}),
        ("assistant_complete", {"content": TEXT, "status": "completed"}),
    ],
    "agent": [
        ("AGENT_START", {"input": script(*STEPS)}),
        ("THINKING", {"content": "Let me see. "}),
        ("TOOL_CALL_START", {"tool_name": "look_up", "parameters": CALL["arguments"]}),
        ("TOOL_CALL_FINISH", {"tool_name": "look_up", "result": RESULT["result"], "status": "ok"}),
        ("LLM_CHUNK", {"content": "First, ", "delta": "First, "}),
        ("STEP_START", {"step": 1, "max_steps": None}),
        ("LLM_CHUNK", {"content": "naïve \U0001f600 ", "delta": "naïve \U0001f600 "}),
        ("THINKING", {"content": "Enough."}),
        ("LLM_CHUNK", {"content": "and 'last'.\n", "delta": "and 'last'.\n"}),
        ("AGENT_FINISH", {"result": TEXT, "status": "completed"}),
    ],
}


@pytest.mark.scenario("dialects", "Events of a dialect")
@pytest.mark.parametrize("dialect", SAID)
def test_a_dialect_has_its_own_names_and_payloads(calls: Calls, dialect: str) -> None:
    ids = written(calls, *STEPS)
    with calls.inline(*ids, dialect=dialect) as stream:
        events = stream.rest()
    assert names(events) == [name for name, _ in SAID[dialect]]
    for event, (name, payload) in zip(events, SAID[dialect], strict=True):
        data = event.data
        if dialect == "nexus":
            assert (data["event"], data["run_id"]) == (name, calls.message(*ids)["run_id"])
            data = data["payload"]
        assert data.items() >= payload.items()
    assert events[0].id == "0"
    assert events[-1].id == f"{len(STEPS)}:end"


@pytest.mark.scenario("dialects", "A dialect resumed between a call and its result")
def test_a_dialect_goes_on_after_a_break_and_still_knows_the_tool(calls: Calls) -> None:
    context_id = calls.create()
    posted = calls.run(context_id, ["data", "tool_call", CALL], ["wait", "between"], ["data", "tool_result", RESULT])
    ids = (context_id, posted["reply_message_id"])
    reached(calls, *ids, 1)
    with calls.inline(*ids, dialect="agent") as stream:
        seen = [stream.next(), stream.next()]
    release(calls.server, "between")
    calls.ended(*ids)
    with calls.inline(*ids, dialect="agent", headers={"Last-Event-ID": seen[-1].id or ""}) as resumed:
        seen += resumed.rest()
    assert names(seen) == ["AGENT_START", "TOOL_CALL_START", "TOOL_CALL_FINISH", "AGENT_FINISH"]
    assert seen[2].data["tool_name"] == CALL["name"]


@pytest.mark.scenario("dialects", "Failure in a dialect")
def test_a_failed_reply_is_an_error_in_every_dialect(calls: Calls) -> None:
    ids = written(calls, ["text", "so far"], ["fail", "secret"])
    heard = {}
    for dialect in SAID:
        with calls.inline(*ids, dialect=dialect) as stream:
            heard[dialect] = [(event.name, event.data.get("payload", event.data)) for event in stream.rest()[1:]]
    detail = calls.message(*ids)["error"]["detail"]
    assert heard["nexus"][-2:] == [("error", {"message": detail}), ("run_finished", {"status": "error"})]
    assert heard["assistant"][-1][0] == "assistant_error"
    assert heard["assistant"][-1][1].items() >= {"error": detail, "code": "agent-error"}.items()
    assert heard["agent"][-1] == ("ERROR", {"error_type": "agent-error", "message": detail, "error": detail})


@pytest.mark.scenario("dialects", "Types of a dialect")
def test_only_the_asked_types_of_a_dialect_come(calls: Calls) -> None:
    ids = written(calls, *STEPS)
    with calls.inline(*ids, dialect="agent", types="LLM_CHUNK,TOOL_CALL_START") as stream:
        events = stream.rest()
    assert names(events) == ["TOOL_CALL_START", *["LLM_CHUNK"] * 3, "AGENT_FINISH"]


@pytest.mark.scenario("dialects", "A post in a dialect")
def test_a_post_is_answered_in_a_dialect_without_an_accept_header(calls: Calls) -> None:
    context_id = calls.create()
    body = message_body(script(["text", "a"]))
    path = f"/contexts/{context_id}/messages?dialect=assistant"
    with EventStream(calls.server.port, path, method="POST", content=body) as stream:
        assert names(stream.rest()) == ["assistant_typing", "assistant_delta", "usage_info", "assistant_complete"]
    assert len(calls.messages(context_id)) == 2


@pytest.mark.scenario("dialects", "A regenerated reply")
def test_a_regenerated_reply_is_told_as_one(calls: Calls) -> None:
    ids = written(calls, ["text", "a"])
    path = f"/contexts/{ids[0]}/messages/{ids[1]}/regenerate?dialect=assistant"
    with EventStream(calls.server.port, path, method="POST") as stream:
        told = stream.rest()
    again = told[0].data["message_id"]
    with calls.inline(ids[0], again, dialect="assistant") as stream:
        told_later = stream.rest()
    with calls.inline(*ids, dialect="assistant") as stream:
        first = stream.rest()
    expected = ["assistant_regenerating", "assistant_delta", "usage_info", "assistant_regenerated"]
    assert names(told) == names(told_later) == expected
    assert names(first) == ["assistant_typing", "assistant_delta", "usage_info", "assistant_complete"]
    assert again != ids[1]


@pytest.mark.scenario("dialects", "A reply that is deleted")
def test_a_stream_in_a_dialect_ends_with_its_context(calls: Calls) -> None:
    ids = begin(calls, gate="never-opened")
    with calls.inline(*ids, dialect="nexus") as stream:
        stream.next()
        assert calls.call("DELETE", f"/contexts/{ids[0]}").status == 204
        assert "run_finished" not in names(stream.rest())
    assert calls.call("GET", f"/contexts/{ids[0]}/messages/{ids[1]}/events?dialect=nexus").status == 404

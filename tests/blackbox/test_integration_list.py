"""The integration list of the frontend that the project grew from, one test for each entry, over a real network path.

Tool calls, file references, workflows, approval requests, plan → act, branch operations, concurrent messages,
reconnection, cancellation: an agent of Pydantic AI with a model on a server of its own, seen as that frontend sees it,
by signals and pulls.
"""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.blackbox.calls import PATIENCE_MS, Calls, eventually, faults
from tests.model_server import MODEL, SILENCE, ModelServer, call, gate, say, whole
from tests.server import Server

AGENT = "tests.blackbox.integrated_agent:workflows"


@pytest.fixture(scope="module")
def model() -> Iterator[ModelServer]:
    with ModelServer() as running:
        yield running


@pytest.fixture(scope="module")
def calls(model: ModelServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    settings = {"model": f"openai-chat:{MODEL}", "model_url": model.url, "signal_patience_ms": PATIENCE_MS}
    with Server(tmp_path_factory.mktemp("list"), agent=AGENT, log_format="json", **settings) as server:
        yield Calls(server)
        assert faults(server) == []


def told(model: ModelServer) -> list[dict[str, Any]]:
    """The messages of the last request to the model."""
    return list(model.asked[-1]["messages"])


@pytest.mark.scenario("agents", "The integration list: tool calls")
def test_tool_calls(calls: Calls, model: ModelServer) -> None:
    model.play(whole(call("look", {"city": "Oslo"})), whole(say("It is ", "4 degrees.")))
    context_id = calls.create()
    with calls.signals(context_id) as stream:
        posted = calls.post(context_id, "How is Oslo?")
        stream.until("message_completed", message_id=posted["reply_message_id"])
    kinds = [chunk["kind"] for chunk in calls.chunks(context_id, posted["reply_message_id"])]
    assert list(dict.fromkeys(kind for kind in kinds if kind != "step")) == ["tool_call", "tool_result", "text"]
    assert calls.pull(context_id, posted["reply_message_id"])["content"] == "It is 4 degrees."


@pytest.mark.scenario("agents", "The integration list: file references")
def test_file_references(calls: Calls, model: ModelServer) -> None:
    model.play(whole(say("It says hello.")))
    headers = {"Content-Type": "text/plain"}
    uploaded = calls.call("POST", "/files?name=note.txt", b"hello from a file", headers=headers)
    assert uploaded.status == 201, uploaded
    context_id = calls.create()
    payload = {"type": "file", "file_id": uploaded.json["id"], "content": "What does it say?"}
    answer = calls.call("POST", f"/contexts/{context_id}/messages", {"payload": payload})
    assert calls.ended(context_id, answer.json["reply_message_id"])["content"] == "It says hello."
    assert "hello from a file" in json.dumps(told(model))
    (asked, _) = calls.messages(context_id)
    assert [each["name"] for each in asked["payload"]["files"]] == ["note.txt"]


@pytest.mark.scenario("agents", "The integration list: workflows")
def test_workflows(calls: Calls, model: ModelServer) -> None:
    model.play(whole(say("Take a coat.")))
    context_id = calls.create()
    payload = {"type": "workflow", "name": "trip", "input": {"city": "Oslo"}}
    answer = calls.call("POST", f"/contexts/{context_id}/messages", {"payload": payload})
    message = calls.ended(context_id, answer.json["reply_message_id"])
    assert (message["status"], message["content"]) == ("completed", "Take a coat.")
    steps = [
        (chunk["data"]["name"], chunk["data"]["status"])
        for chunk in calls.chunks(context_id, message["id"])
        if chunk["kind"] == "step" and "workflow" in chunk["data"]
    ]
    assert steps == [("look", "started"), ("look", "finished"), ("prompt", "started"), ("prompt", "finished")]
    assert told(model)[-1]["content"] == "Pack for Oslo."


@pytest.mark.scenario("agents", "The integration list: approval requests")
def test_approval_requests(calls: Calls, model: ModelServer) -> None:
    model.play(whole(call("send", {"to": "ann"})), whole(say("Done.")))
    context_id = calls.create()
    with calls.signals(context_id) as stream:
        posted = calls.post(context_id, "Write to Ann.")
        stream.until("state_changed", new_state="awaiting_approval")
        (approval,) = calls.approvals(context_id)
        assert not (calls.server.directory / "sent").exists()
        calls.decide(context_id, approval["id"], "approve")
        stream.until("message_completed", message_id=posted["reply_message_id"])
    assert calls.pull(context_id, posted["reply_message_id"])["content"] == "Done."
    assert (calls.server.directory / "sent").read_text() == "ann\n"


@pytest.mark.scenario("agents", "The integration list: plan → act")
def test_plan_to_act(calls: Calls, model: ModelServer) -> None:
    context_id = calls.create(mode="plan")
    offered = []
    for mode in ("plan", "act"):
        calls.call("PATCH", f"/contexts/{context_id}", {"mode": mode})
        model.play(whole(say(mode)))
        reply = calls.ended(context_id, calls.post(context_id, "Go on.")["reply_message_id"])
        assert reply["mode"] == mode
        offered.append({tool["function"]["name"] for tool in model.asked[-1]["tools"]})
    assert offered == [{"look"}, {"look", "send", "nap"}]


@pytest.mark.scenario("agents", "The integration list: branch operations")
def test_branch_operations(calls: Calls, model: ModelServer) -> None:
    context_id = calls.create()
    model.play(whole(say("one")))
    first = calls.post(context_id, "first")
    calls.ended(context_id, first["reply_message_id"])
    model.play(whole(say("ONE")))
    again = calls.regenerate(context_id, first["reply_message_id"])
    calls.ended(context_id, again["reply_message_id"])
    calls.call("PATCH", f"/contexts/{context_id}", {"head_message_id": first["reply_message_id"]})
    model.play(whole(say("two")))
    second = calls.post(context_id, "second")
    calls.ended(context_id, second["reply_message_id"])
    said = [part["content"] for part in told(model) if part["role"] in ("user", "assistant")]
    assert said == ["first", "one", "second"]
    fork_id = calls.fork(context_id, again["reply_message_id"])
    model.play(whole(say("three")))
    calls.ended(fork_id, calls.post(fork_id, "third")["reply_message_id"])
    said = [part["content"] for part in told(model) if part["role"] in ("user", "assistant")]
    assert said == ["first", "ONE", "third"]


@pytest.mark.scenario("agents", "The integration list: concurrent messages")
def test_concurrent_messages(calls: Calls, model: ModelServer) -> None:
    model.play(whole(say("answer")))
    contexts = [calls.create() for _ in range(5)]
    with ThreadPoolExecutor(10) as pool:
        posted = list(
            pool.map(
                lambda number: (
                    contexts[number % 5],
                    calls.send(contexts[number % 5], f"message {number}", fields={"if_busy": "queue"}).json,
                ),
                range(10),
            )
        )
    for context_id, answer in posted:
        assert calls.ended(context_id, answer["reply_message_id"])["content"] == "answer"
    for context_id in contexts:
        assert [message["role"] for message in calls.messages(context_id)] == ["user", "assistant"] * 2


@pytest.mark.scenario("agents", "The integration list: reconnection")
def test_reconnection(calls: Calls, model: ModelServer) -> None:
    held = threading.Event()
    model.play(whole(say("before "), gate(held), say("after")))
    context_id = calls.create()
    with calls.signals(context_id) as stream:
        posted = calls.post(context_id, "Speak.")
        delta = stream.until("content_delta", message_id=posted["reply_message_id"]).data
    page = calls.pull(context_id, posted["reply_message_id"])
    held.set()
    with calls.signals(context_id) as stream:
        stream.until("message_completed", message_id=posted["reply_message_id"])
    rest = calls.pull(context_id, posted["reply_message_id"], from_sequence=page["sequence"])
    assert page["sequence"] >= delta["current_sequence"]
    assert page["content"] + rest["content"] == "before after"
    assert rest["sequence"] == rest["final_sequence"]


@pytest.mark.scenario("agents", "The integration list: cancellation")
@pytest.mark.parametrize(
    "when", ["a tool runs", "the model is silent", "it is queued behind another", "a person is asked"]
)
def test_cancellation(calls: Calls, model: ModelServer, when: str) -> None:
    context_id = calls.create()
    match when:
        case "a tool runs":
            model.play(whole(call("nap", {})))
            posted, state = calls.post(context_id, "Rest."), "calling_tool"
        case "a person is asked":
            model.play(whole(call("send", {"to": "bob"})))
            posted, state = calls.post(context_id, "Write to Bob."), "awaiting_approval"
        case "the model is silent":
            model.play([SILENCE])
            posted, state = calls.post(context_id, "Speak."), "thinking"
        case _:
            model.play([say("Hm"), SILENCE])
            calls.post(context_id, "Speak.")
            calls.settled(context_id, "streaming")
            posted, state = calls.send(context_id, "And then?", fields={"if_busy": "queue"}).json, "streaming"
    calls.settled(context_id, state)
    if when == "the model is silent":
        eventually(lambda: model.asked, "the request")
    started = time.monotonic()
    calls.cancel(context_id)
    calls.settled(context_id, "idle")
    print(f"idle after {time.monotonic() - started:.3f} s")
    reply = calls.ended(context_id, posted["reply_message_id"])
    assert reply["status"] == "cancelled"
    if "queued" not in when:
        assert reply["usage"]["requests"] >= 1 or reply["usage"]["estimated"]
    model.play(whole(say("next")))
    assert calls.ended(context_id, calls.post(context_id, "Go on.")["reply_message_id"])["content"] == "next"
    for message in told(model):
        for made in message.get("tool_calls", []):
            answered = [each["tool_call_id"] for each in told(model) if each["role"] == "tool"]
            assert answered.count(made["id"]) == 1

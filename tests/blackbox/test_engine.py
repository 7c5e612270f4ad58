"""Agents of Pydantic AI in a real server, with a model on a real network path."""

import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.blackbox.calls import Calls, eventually, faults
from tests.model_server import (
    CUT,
    MODEL,
    SILENCE,
    ModelServer,
    Step,
    call,
    gate,
    reason,
    say,
    status,
    whole,
)
from tests.server import Server

AGENT = "tests.blackbox.engine_agents:agent"


@pytest.fixture(scope="module")
def model() -> Iterator[ModelServer]:
    with ModelServer() as running:
        yield running


@pytest.fixture(scope="module")
def settings(model: ModelServer) -> dict[str, Any]:
    return {"model": f"openai-chat:{MODEL}", "model_url": model.url, "log_format": "json", "model_retries": 1}


@pytest.fixture(scope="module")
def plain(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    """A server with a model and no agent of its own."""
    with Server(tmp_path_factory.mktemp("plain"), **settings) as server:
        yield Calls(server)
        assert faults(server) == []


@pytest.fixture(scope="module")
def tooled(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    """A server with an agent that has tools."""
    with Server(tmp_path_factory.mktemp("tooled"), agent=AGENT, **settings) as server:
        yield Calls(server)
        assert faults(server) == []


@pytest.fixture(autouse=True)
def no_traces(tooled: Calls) -> None:
    for name in ("sent", "waiting"):
        (tooled.server.directory / name).unlink(missing_ok=True)


def ask(calls: Calls, context_id: str, text: str = "hello") -> dict[str, Any]:
    """The reply to a message, once it has ended."""
    return calls.ended(context_id, calls.post(context_id, text)["reply_message_id"])


def kinds(chunks: list[dict[str, Any]]) -> list[str]:
    return [each["kind"] for each in chunks]


@pytest.mark.scenario("agents", "A model without code")
def test_a_model_replies_without_code_and_is_given_what_was_said_before_a_restart(
    plain: Calls, model: ModelServer
) -> None:
    model.play(whole(reason("hm"), say("It is ", "cold.")), whole(say("Still.")))
    context_id = plain.create()
    reply = ask(plain, context_id, "weather?")
    assert reply["status"] == "completed"
    assert reply["usage"] | {"estimated": False} == reply["usage"]
    assert (reply["usage"]["input_tokens"], reply["usage"]["output_tokens"]) == (12, 5)
    told = kinds(plain.chunks(context_id, reply["id"]))
    assert [kind for kind, _ in itertools.groupby(told)] == ["step", "reasoning", "text", "step"]
    plain.server.kill()
    plain.server.start()
    ask(plain, context_id, "and now?")
    assert model.asked[1]["messages"] == [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "It is cold."},
        {"role": "user", "content": "and now?"},
    ]


@pytest.mark.scenario("agents", "Keys stay secret")
def test_a_key_is_used_and_shown_nowhere(tmp_path: Path, settings: dict[str, Any], model: ModelServer) -> None:
    key = "sk-very-secret"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", key)
        with Server(tmp_path, **settings) as server:
            calls = Calls(server)
            model.play(status(401, body=json.dumps({"error": {"message": f"bad key {key}"}})))
            context_id = calls.create()
            reply = ask(calls, context_id)
            shown = json.dumps([reply, calls.context(context_id), calls.call("GET", "/readyz").json])
            shown += calls.call("GET", "/metrics").body.decode()
    assert model.keys == [f"Bearer {key}"]
    assert reply["error"]["code"] == "model-rejected"
    assert key not in shown
    assert f":{model.port}" not in server.log.read_text()
    held = [path for path in tmp_path.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
    assert held == []


@pytest.mark.scenario("agents", "Failures of models")
@pytest.mark.parametrize(
    ("answer", "code", "requests"),
    [
        (status(429, {"Retry-After": "0"}), "model-rate-limited", 2),
        (status(500), "model-unavailable", 2),
        ([say("As I "), CUT], "model-cut", 1),
    ],
    ids=["429", "500", "cut"],
)
def test_a_failed_model_ends_the_reply_with_its_code_and_the_next_message_works(
    plain: Calls, model: ModelServer, answer: list[Step], code: str, requests: int
) -> None:
    model.play(*[answer] * requests, whole(say("Better.")))
    context_id = plain.create()
    failed = ask(plain, context_id, "my secret")
    assert (failed["status"], failed["error"]["code"]) == ("failed", code)
    assert len(model.asked) == requests
    assert plain.pull(context_id, failed["id"])["content"] == ("As I " if code == "model-cut" else "")
    better = ask(plain, context_id, "again")
    assert plain.pull(context_id, better["id"])["content"] == "Better."
    assert "secret" not in plain.server.log.read_text()


@pytest.mark.scenario("agents", "Retries before the first word")
def test_a_passing_failure_is_not_seen(plain: Calls, model: ModelServer) -> None:
    model.play(status(503), whole(say("Here.")))
    context_id = plain.create()
    assert plain.pull(context_id, ask(plain, context_id)["id"])["content"] == "Here."


@pytest.mark.scenario("agents", "Cancelling")
def test_a_silent_model_is_cancelled_at_once(plain: Calls, model: ModelServer) -> None:
    model.play([say("Well, "), SILENCE], whole(say("Yes.")))
    context_id = plain.create()
    posted = plain.post(context_id, "hello")
    eventually(lambda: plain.pull(context_id, posted["reply_message_id"])["content"], "the first word")
    plain.cancel(context_id)
    reply = plain.ended(context_id, posted["reply_message_id"])
    assert reply["status"] == "cancelled"
    assert reply["usage"]["estimated"] is True
    assert reply["usage"]["output_tokens"] > 0
    assert model.closed.wait(30)
    assert plain.pull(context_id, ask(plain, context_id)["id"])["content"] == "Yes."


def test_text_is_read_while_the_model_speaks(plain: Calls, model: ModelServer) -> None:
    go_on = threading.Event()
    model.play([say("first "), gate(go_on), *whole(say("second"))])
    context_id = plain.create()
    posted = plain.post(context_id, "hello")
    eventually(lambda: plain.pull(context_id, posted["reply_message_id"])["content"] == "first ", "the first word")
    go_on.set()
    assert plain.ended(context_id, posted["reply_message_id"])["status"] == "completed"


@pytest.mark.scenario("agents", "An agent of the library")
def test_an_agent_with_tools_tells_its_calls(tooled: Calls, model: ModelServer) -> None:
    model.play(whole(say("Let me look. "), call("look", {"city": "Oslo"}), why="tool_calls"), whole(say("Cold.")))
    context_id = tooled.create()
    reply = ask(tooled, context_id)
    chunks = tooled.chunks(context_id, reply["id"])
    assert kinds(chunks) == ["step", "text", "step", "tool_call", "tool_result", "step", "text", "step"]
    assert chunks[4]["data"]["result"] == {"city": "Oslo", "celsius": 4}
    assert reply["usage"]["tool_calls"] == 1


@pytest.mark.scenario("agents", "Plan mode")
def test_in_plan_mode_the_model_is_offered_what_changes_nothing(tooled: Calls, model: ModelServer) -> None:
    model.play(whole(say("I would look.")))
    ask(tooled, tooled.create(mode="plan"))
    ask(tooled, tooled.create(mode="act"))
    offered = [sorted(tool["function"]["name"] for tool in asked["tools"]) for asked in model.asked]
    assert offered == [["look"], ["look", "pay", "send", "wait"]]
    told = ["plan mode" in json.dumps(asked["messages"]) for asked in model.asked]
    assert told == [True, False]


@pytest.mark.scenario("agents", "An approved call")
def test_an_approved_call_runs_once_after_a_kill_with_the_arguments_that_a_person_gave(
    tooled: Calls, model: ModelServer
) -> None:
    model.play(whole(call("send", {"to": "him"}), why="tool_calls"), whole(say("Sent.")))
    context_id = tooled.create()
    posted = tooled.post(context_id, "send it")
    tooled.settled(context_id, "awaiting_approval")
    tooled.server.kill()
    tooled.server.start()
    (approval,) = tooled.approvals(context_id)
    assert (approval["tool"], approval["arguments"]) == ("send", {"to": "him"})
    assert not (tooled.server.directory / "sent").exists()
    assert tooled.decide(context_id, approval["id"], "approve", arguments={"to": "her"}).status == 200
    reply = tooled.ended(context_id, posted["reply_message_id"])
    assert (reply["status"], reply["usage"]["requests"]) == ("completed", 2)
    assert (tooled.server.directory / "sent").read_text() == "her\n"
    assert tooled.pull(context_id, reply["id"])["content"] == "Sent."
    assert kinds(tooled.chunks(context_id, reply["id"])) == [
        "step",
        "step",
        "tool_call",
        "tool_result",
        "step",
        "text",
        "step",
    ]
    *_, asked, returned = model.asked[1]["messages"]
    assert (asked["role"], returned["role"], returned["content"]) == ("assistant", "tool", "sent to her")


@pytest.mark.scenario("agents", "A denied call")
def test_a_denied_call_is_not_run_and_the_model_goes_on(tooled: Calls, model: ModelServer) -> None:
    model.play(whole(call("send", {"to": "him"}), why="tool_calls"), whole(say("Then not.")))
    context_id = tooled.create()
    posted = tooled.post(context_id, "send it")
    tooled.settled(context_id, "awaiting_approval")
    (approval,) = tooled.approvals(context_id)
    assert tooled.decide(context_id, approval["id"], "deny", note="too early").status == 200
    reply = tooled.ended(context_id, posted["reply_message_id"])
    assert reply["status"] == "completed"
    assert not (tooled.server.directory / "sent").exists()
    assert "too early" in model.asked[1]["messages"][-1]["content"]


def test_a_tool_may_find_out_by_itself_that_it_needs_an_approval(tooled: Calls, model: ModelServer) -> None:
    model.play(whole(call("pay", {"euros": 500}), why="tool_calls"), whole(say("Paid.")), whole(say("ok")))
    context_id = tooled.create()
    posted = tooled.post(context_id, "pay")
    tooled.settled(context_id, "awaiting_approval")
    (approval,) = tooled.approvals(context_id)
    assert tooled.decide(context_id, approval["id"], "approve").status == 200
    reply = tooled.ended(context_id, posted["reply_message_id"])
    (result,) = [each for each in tooled.chunks(context_id, reply["id"]) if each["kind"] == "tool_result"]
    assert (reply["status"], result["data"]["result"]) == ("completed", "paid 500")
    ask(tooled, context_id, "thanks")
    roles = [each["role"] for each in model.asked[2]["messages"]]
    assert roles == ["system", "user", "assistant", "tool", "assistant", "user"]


@pytest.mark.scenario("agents", "A call without a result")
def test_a_call_that_was_cancelled_leaves_a_sound_history(tooled: Calls, model: ModelServer) -> None:
    model.play(whole(call("wait", {}), why="tool_calls"), whole(say("Fine.")))
    context_id = tooled.create()
    posted = tooled.post(context_id, "wait")
    eventually((tooled.server.directory / "waiting").exists, "the tool")
    tooled.cancel(context_id)
    assert tooled.ended(context_id, posted["reply_message_id"])["status"] == "cancelled"
    ask(tooled, context_id, "and now?")
    roles = [each["role"] for each in model.asked[1]["messages"]]
    assert roles == ["system", "user", "assistant", "tool", "user"]
    assert "not known" in model.asked[1]["messages"][3]["content"]


@pytest.mark.scenario("agents", "Steering and a mode that changes")
def test_a_message_that_steers_is_handed_to_the_next_step(tooled: Calls, model: ModelServer) -> None:
    go_on = threading.Event()
    first = [say("Let me look. "), gate(go_on), *whole(call("look", {"city": "Oslo"}), why="tool_calls")]
    model.play(first, whole(say("Froid.")), whole(say("ok")))
    context_id = tooled.create()
    posted = tooled.post(context_id, "weather?")
    eventually(lambda: tooled.pull(context_id, posted["reply_message_id"])["content"], "the first words")
    assert tooled.send(context_id, "in French", fields={"if_busy": "steer"}).status == 202
    go_on.set()
    reply = tooled.ended(context_id, posted["reply_message_id"])
    asked = [(each["role"], each["content"]) for each in model.asked[1]["messages"]]
    assert asked[-1] == ("user", "in French")
    ask(tooled, context_id, "thanks")
    roles = [each["role"] for each in model.asked[2]["messages"]]
    assert roles == ["system", "user", "assistant", "tool", "user", "assistant", "user"]
    assert reply["status"] == "completed"


@pytest.mark.scenario("agents", "A model that cannot be had")
def test_a_model_that_cannot_be_had_is_one_line_at_the_start(tmp_path: Path) -> None:
    server = Server(tmp_path, model="nobody:model")
    with pytest.raises(AssertionError, match="the server did not start"):
        server.start()
    assert server.log.read_text() == "context-server: model 'nobody:model': Unknown model: nobody:model\n"

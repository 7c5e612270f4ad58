"""Workflows: sequences of prompts and tools that stop for approvals and survive a restart."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.blackbox.calls import PATIENCE_MS, SCRIPTED, Calls, eventually
from tests.databases import KINDS
from tests.server import Server

DATABASES = KINDS

AGENT = "tests.blackbox.workflow_agents:workflows"


@pytest.fixture(scope="module")
def calls(database_kind: str | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    with Server(tmp_path_factory.mktemp("workflows"), agent=AGENT, signal_patience_ms=PATIENCE_MS) as server:
        yield Calls(server)


def start(calls: Calls, name: str, context_id: str | None = None, **given: Any) -> tuple[str, str]:
    """Starts a workflow: the context's id, and the reply's."""
    context_id = context_id or calls.create()
    body = {"payload": {"type": "workflow", "name": name, "input": given}}
    answer = calls.call("POST", f"/contexts/{context_id}/messages", body)
    assert answer.status == 202, answer
    return context_id, answer.json["reply_message_id"]


def steps(calls: Calls, context_id: str, reply_id: str) -> list[tuple[int, str, str]]:
    data = [chunk["data"] for chunk in calls.chunks(context_id, reply_id) if chunk["kind"] == "step"]
    return [(each["number"], each["name"], each["status"]) for each in data]


def noted(calls: Calls) -> list[str]:
    path = calls.server.directory / "noted"
    return path.read_text().splitlines() if path.exists() else []


def asked_for(calls: Calls, context_id: str, tool: str) -> str:
    """The id of the approval of a tool, once it is waited for."""
    return str(
        eventually(
            lambda: next((each["id"] for each in calls.approvals(context_id) if each["tool"] == tool), None),
            f"a request for {tool}",
        )
    )


@pytest.mark.scenario("workflows", "A workflow runs its steps")
def test_a_workflow_runs_its_steps(calls: Calls) -> None:
    context_id, reply_id = start(calls, "release", version="skip-1")
    message = calls.ended(context_id, reply_id)
    assert (message["status"], message["content"]) == ("completed", "notes of skip-1 Skipped.")
    assert steps(calls, context_id, reply_id) == [
        (number, name, status)
        for number, name in enumerate(("prompt", "note", "say"), start=1)
        for status in ("started", "finished")
    ]
    (first, *_) = [chunk["data"] for chunk in calls.chunks(context_id, reply_id) if chunk["kind"] == "step"]
    assert (first["workflow"], first["total"]) == ("release", 4)
    asked = calls.messages(context_id)[0]["payload"]
    assert (asked["type"], asked["name"], asked["input"]) == ("workflow", "release", {"version": "skip-1"})
    assert message["usage"]["output_tokens"] == 2


@pytest.mark.scenario("workflows", "A workflow stops for an approval")
def test_a_workflow_stops_for_an_approval_and_takes_no_step_twice(calls: Calls) -> None:
    context_id, reply_id = start(calls, "release", version="1.0")
    calls.settled(context_id, "awaiting_approval")
    (approval,) = calls.approvals(context_id)
    assert (approval["tool"], approval["arguments"]) == ("publish", {"version": "1.0"})
    calls.decide(context_id, approval["id"], "approve")
    message = calls.ended(context_id, reply_id)
    assert message["content"] == "notes of 1.0 Published at /releases/1.0."
    lines = [line for line in noted(calls) if line.endswith("1.0")]
    assert lines == ["notes of 1.0", "publish 1.0"]
    assert message["usage"]["output_tokens"] == 2


@pytest.mark.scenario("workflows", "A denied step")
def test_a_workflow_may_go_on_after_a_denial_or_fail(calls: Calls) -> None:
    context_id, reply_id = start(calls, "release", version="2.0", is_quiet=True)
    calls.settled(context_id, "awaiting_approval")
    calls.decide(context_id, calls.approvals(context_id)[0]["id"], "deny", note="too early")
    assert calls.ended(context_id, reply_id)["content"] == "Not published: too early."
    context_id, reply_id = start(calls, "strict")
    calls.settled(context_id, "awaiting_approval")
    calls.decide(context_id, calls.approvals(context_id)[0]["id"], "deny")
    message = calls.ended(context_id, reply_id)
    assert (message["status"], message["error"]["code"]) == ("failed", "workflow-failed")
    assert "publish 2.0" not in noted(calls)


@pytest.mark.scenario("workflows", "A restart in the middle")
def test_a_workflow_survives_a_restart(database_kind: str | None, tmp_path: Path) -> None:
    with Server(tmp_path, agent=AGENT) as server:
        calls = Calls(server)
        context_id, reply_id = start(calls, "release", version="3.0")
        calls.settled(context_id, "awaiting_approval")
        server.kill()
        server.start()
        calls.decide(context_id, calls.approvals(context_id)[0]["id"], "approve", arguments={"version": "3.1"})
        assert calls.ended(context_id, reply_id)["content"] == "notes of 3.0 Published at /releases/3.1."
        assert noted(calls) == ["notes of 3.0", "publish 3.1"]


@pytest.mark.scenario("workflows", "What cannot be started")
@pytest.mark.parametrize(
    ("name", "given", "code", "said"),
    [
        ("nothing", {}, "workflow-unknown", "release"),
        ("release", {}, "workflow-input", "version: str"),
        ("release", {"version": "1", "other": 2}, "workflow-input", "version: str"),
        ("release", {"version": [1]}, "workflow-input", "; version: string_type."),
        ("broken", {}, "agent-error", ""),
    ],
)
def test_what_cannot_be_started_says_why(calls: Calls, name: str, given: dict[str, Any], code: str, said: str) -> None:
    message = calls.ended(*start(calls, name, **given))
    assert (message["status"], message["error"]["code"]) == ("failed", code)
    assert said in message["error"]["detail"]


def test_a_failed_step_leaves_no_open_call(calls: Calls) -> None:
    context_id, reply_id = start(calls, "broken")
    calls.ended(context_id, reply_id)
    kinds = [chunk["kind"] for chunk in calls.chunks(context_id, reply_id)]
    assert kinds == ["step", "tool_call", "tool_result", "step"]


@pytest.mark.scenario("workflows", "A step that fails is over")
def test_a_step_that_failed_is_not_taken_again(calls: Calls) -> None:
    context_id, reply_id = start(calls, "clumsy")
    for tool in ("tumble", "publish"):
        calls.decide(context_id, asked_for(calls, context_id, tool), "approve")
    message = calls.ended(context_id, reply_id)
    assert (message["status"], message["content"]) == ("completed", "tumble failed. Published at /releases/c.")
    assert noted(calls).count(f"tumble {message['run_id']}") == 1


@pytest.mark.scenario("workflows", "Steps at once")
def test_steps_at_once_fail_the_reply(calls: Calls) -> None:
    context_id, reply_id = start(calls, "hasty")
    message = calls.ended(context_id, reply_id)
    assert (message["status"], message["error"]["code"]) == ("failed", "agent-error")
    assert {number for number, _, _ in steps(calls, context_id, reply_id)} <= {1}


@pytest.mark.scenario("workflows", "Cancelled")
def test_a_workflow_is_cancelled_in_the_middle_of_a_step(calls: Calls) -> None:
    context_id, reply_id = start(calls, "wait")
    calls.settled(context_id, "calling_tool")
    calls.cancel(context_id)
    message = calls.ended(context_id, reply_id)
    assert (message["status"], message["content"]) == ("cancelled", "begun ")
    result = calls.chunks(context_id, reply_id)[-1]
    assert (result["kind"], result["data"]["status"]) == ("tool_result", "cancelled")


def test_other_messages_go_to_the_agent(calls: Calls) -> None:
    context_id = calls.create()
    posted = calls.post(context_id, "hello there")
    assert calls.ended(context_id, posted["reply_message_id"])["content"] == "hello there "


@pytest.mark.scenario("workflows", "An agent without workflows")
def test_an_agent_without_workflows_says_so(database_kind: str | None, tmp_path: Path) -> None:
    with Server(tmp_path, agent=SCRIPTED) as server:
        calls = Calls(server)
        message = eventually(lambda: calls.ended(*start(calls, "release")), "an ending")
        assert message["error"]["code"] == "workflow-unknown"
